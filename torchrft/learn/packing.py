"""From samples to micro-batches: packed rows under a token budget, or padded rows.

Both give the same log-probs, losses and gradients. A packed row holds once what the samples of a
prompt that are in it begin with alike: with n samples per prompt the prompt is computed once, not n
times; so is what the branches of episodes share. The last token of a sequence is a label only and
never goes through the model.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchrft.models.attention import Layout
from torchrft.models.prefix_tree import PrefixTree
from torchrft.types import Kept, Prompt, RolloutBatch

if TYPE_CHECKING:
    from torchrft.models.vision import ImageBatch, Vision


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass over the samples `rows` of a RolloutBatch.

    M is the number of their sampled tokens. `cells[m]` is where sampled token m belongs in the
    flattened [len(rows), T] of those `samples`.
    """

    rows: list[int]
    samples: RolloutBatch
    input_ids: Tensor  # int64 [1, N] packed, [len(rows), L] padded
    position_ids: Tensor  # int64, as input_ids, or three times that where images move them
    layout: Layout | None  # None: padded rows
    targets: Tensor  # int64 [M], flat positions in input_ids whose next token was sampled
    labels: Tensor  # int64 [M], those next tokens
    cells: Tensor  # int64 [M]
    images: ImageBatch | None = None
    kept: Kept | None = None  # of the M tokens: log-probs are over these alone

    def scatter(self, values: Tensor) -> Tensor:
        """Values [M] as [len(rows), T], zero where there is no response token."""
        shape = self.samples.mask.shape
        return values.new_zeros(shape).view(-1).index_copy(0, self.cells, values).view(shape)

    def uncounted(self) -> Self:
        """The same input, for a pass that does not count in the loss."""
        mask = torch.zeros_like(self.samples.mask)
        return replace(self, samples=replace(self.samples, mask=mask))


def plan(
    batch: RolloutBatch, rows: list[int], packed: bool, samples: int, max_tokens: int
) -> list[list[int]]:
    """Which of the samples `rows` share a forward pass.

    Padded: `samples` at a time, in order. Packed: samples of one prompt stay together as far as
    the budget of `max_tokens` allows, since they share it; those pieces go first-fit-decreasing
    into passes (Johnson, 1973: at most 11/9 of the fewest possible). An episode stays whole, even
    one whose branches exceed the budget together.
    Raises: ValueError for a sequence longer than the budget.
    """
    if not packed:
        return [rows[start : start + samples] for start in range(0, len(rows), samples)]
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(_group(batch, row), []).append(row)
    pieces: list[tuple[int, list[int]]] = []  # (tokens, rows)
    for members in groups.values():
        tree, tokens = PrefixTree(), 0
        piece: list[int] = []
        for row in members:
            sequences = _sequences(batch, row)
            longest = max(sequence.ids.numel() for sequence in sequences)
            if longest > max_tokens:
                raise ValueError(f"a sample of {longest} tokens exceeds the budget of {max_tokens}")
            added = sum(tree.add(sequence.ids) for sequence in sequences)
            if piece and tokens + added > max_tokens:
                pieces.append((tokens, piece))
                tree, piece, tokens = PrefixTree(), [], 0
                added = sum(tree.add(sequence.ids) for sequence in sequences)
            tokens += added
            piece.append(row)
        pieces.append((tokens, piece))
    bins: list[list[int]] = []
    room: list[int] = []
    for tokens, piece in sorted(pieces, key=lambda item: -item[0]):
        fit = next((i for i, left in enumerate(room) if left >= tokens), len(room))
        if fit == len(room):
            bins.append([])
            room.append(max_tokens)
        bins[fit] += piece
        room[fit] -= tokens
    return bins


def build(
    batch: RolloutBatch, rows: list[int], packed: bool, vision: Vision | None = None
) -> MicroBatch:
    """The micro-batch of the samples `rows`; `vision` is given where samples may have images."""
    sequences = [(i, one) for i, row in enumerate(rows) for one in _sequences(batch, row)]
    groups = [_group(batch, row) for row in rows]
    layout = None
    if packed:
        tree = PrefixTree()
        for i, one in sequences:
            tree.add(one.ids[:-1], groups[i])
        ids, layout, places = tree.pack()
        ids, positions = ids[None], layout.positions[None]
    else:
        ids = pad_sequence([one.ids[:-1] for _, one in sequences], batch_first=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        places = list(torch.arange(ids.numel()).view_as(ids))
    # A token is predicted at the one before it.
    targets = [at[one.places - 1] for at, (_, one) in zip(places, sequences, strict=True)]
    labels = [one.ids[one.places] for _, one in sequences]
    repeats = torch.tensor([one.places.numel() for _, one in sequences])
    owner = torch.tensor([i for i, _ in sequences]).repeat_interleave(repeats)
    counts = owner.bincount(minlength=len(rows))
    column = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    cells = owner * batch.mask.shape[1] + column
    images = None
    if vision is not None:
        spans: dict[Hashable, tuple[Prompt, int, int]] = {}  # rows, or groups of the packed row
        for k, (i, _) in enumerate(sequences):
            if batch.prompts is None:
                break
            key, prompt = groups[i] if packed else k, batch.prompts[rows[i]]
            begin, end = int(places[k][0]), int(places[k][-1]) + 1
            _, first, last = spans.get(key, (prompt, begin, end))
            spans[key] = (prompt, min(first, begin), max(last, end))
        positions, images = vision.see(positions, spans.values())
    kept = None if batch.kept is None else Kept.join([batch.kept[row] for row in rows])
    inputs = (ids, positions, layout, torch.cat(targets), torch.cat(labels), cells, images, kept)
    device = batch.mask.device
    on_device: list[Any] = [None if value is None else value.to(device) for value in inputs]
    return MicroBatch(rows, batch.select(rows), *on_device)


@dataclass(frozen=True)
class _Sequence:
    """A prompt of so many tokens with what follows it; sampled tokens are at `places` of `ids`."""

    ids: Tensor  # int64 [L]
    prompt: int
    places: Tensor  # int64 [S]


def _sequences(batch: RolloutBatch, row: int) -> list[_Sequence]:
    """What goes through the model for sample `row`: one sequence, or an episode's branches."""
    if batch.branches is None:
        ids, prompt = batch.sequences[row], int(batch.prompt_lens[row])
        return [_Sequence(ids, prompt, torch.arange(prompt, ids.numel()))]
    return [
        _Sequence(torch.tensor(b.prompt + b.token_ids), len(b.prompt), b.places())
        for b in batch.branches[row]
    ]


def _group(batch: RolloutBatch, row: int) -> Hashable:
    """Equal for samples that may share prefixes: those of equal prompts."""
    prompt = batch.sequences[row][: int(batch.prompt_lens[row])]
    return prompt.numpy().tobytes(), () if batch.prompts is None else batch.prompts[row].images
