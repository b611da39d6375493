"""From samples to micro-batches: packed rows under a token budget, or padded rows.

Both give the same log-probs, losses and gradients. A packed row holds a prompt once for all its
samples that are in it: with n samples per prompt the prompt is computed once, not n times. The
last token of a sample is a label only and never goes through the model.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchrft.models.attention import Layout, Packed
from torchrft.models.vision import ImageBatch, Vision
from torchrft.types import Kept, RolloutBatch


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
    pieces: list[tuple[int, list[int]]] = []  # (tokens, rows)
    for members in _by_prompt(batch, rows):
        prompt = int(batch.prompt_lens[members[0]])
        tokens = prompt
        piece: list[int] = []
        for row in members:
            lengths = [sequence.ids.numel() for sequence in _sequences(batch, row)]
            if max(lengths) > max_tokens:
                longest = max(lengths)
                raise ValueError(f"a sample of {longest} tokens exceeds the budget of {max_tokens}")
            whole = sum(lengths)
            if tokens + whole - prompt > max_tokens:
                pieces.append((tokens, piece))
                tokens, piece = prompt, []
            tokens += whole - prompt
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
    layout = None
    if packed:
        ids, positions, starts, bounds, layout = _packed_row(batch, rows, sequences)
    else:
        ids = pad_sequence([one.ids[:-1] for _, one in sequences], batch_first=True)
        length = ids.shape[1]
        positions = torch.arange(length).expand_as(ids)
        starts = [
            (k * length + one.prompt - 1, k * length + one.prompt)
            for k, (_, one) in enumerate(sequences)
        ]
        bounds = [(rows[i], k * length, (k + 1) * length) for k, (i, _) in enumerate(sequences)]
    # Response token 0 is predicted at the prompt's last position, token t at response token t - 1.
    repeats = torch.tensor([one.places.numel() for _, one in sequences])
    step = torch.cat([one.places - one.prompt for _, one in sequences])
    first, rest = torch.tensor(starts).repeat_interleave(repeats, dim=0).unbind(1)
    targets = torch.where(step == 0, first, rest + step - 1)
    labels = torch.cat([one.ids[one.places] for _, one in sequences])
    owner = torch.tensor([i for i, _ in sequences]).repeat_interleave(repeats)
    counts = owner.bincount(minlength=len(rows))
    column = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    cells = owner * batch.mask.shape[1] + column
    images = None
    if vision is not None:
        known = batch.prompts
        spans = [] if known is None else [(known[row], a, b) for row, a, b in bounds]
        positions, images = vision.see(positions, spans)
    kept = None if batch.kept is None else Kept.join([batch.kept[row] for row in rows])
    inputs = (ids, positions, layout, targets, labels, cells, images, kept)
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


def _packed_row(
    batch: RolloutBatch, rows: list[int], sequences: list[tuple[int, _Sequence]]
) -> tuple[Tensor, Tensor, list[tuple[int, int]], list[tuple[int, int, int]], Packed]:
    """Token ids and positions [1, N], where each sequence's prompt ends and its response begins
    (position of the prompt's last token, of the response's first), each prompt's bounds (a sample
    of it, where the prompt begins, where the last token after it ends), and the layout."""
    starts: dict[int, tuple[int, int]] = {}
    ids: list[Tensor] = []
    groups: list[tuple[int, list[int]]] = []
    bounds: list[tuple[int, int, int]] = []
    position = 0
    prompts: dict[object, list[int]] = {}
    for k, (i, one) in enumerate(sequences):
        prompts.setdefault(_key(batch, rows[i], one.ids[: one.prompt]), []).append(k)
    for members in prompts.values():
        owner, first = sequences[members[0]]
        begin, prompt = position, first.prompt
        responses = [sequences[k][1].ids[prompt:-1] for k in members]
        ids += [first.ids[:prompt], *responses]
        position += prompt
        for k, response in zip(members, responses, strict=True):
            starts[k] = (begin + prompt - 1, position)
            position += response.numel()
        groups.append((prompt, [response.numel() for response in responses]))
        bounds.append((rows[owner], begin, position))
    layout, order = Packed.of(groups), range(len(sequences))
    return torch.cat(ids)[None], layout.positions[None], [starts[k] for k in order], bounds, layout


def _by_prompt(batch: RolloutBatch, rows: list[int]) -> list[list[int]]:
    """`rows` in lists of equal prompts, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for row in rows:
        prompt = batch.sequences[row][: int(batch.prompt_lens[row])]
        groups.setdefault(_key(batch, row, prompt), []).append(row)
    return list(groups.values())


def _key(batch: RolloutBatch, row: int, prompt: Tensor) -> object:
    """Equal for prompts that are computed once."""
    return prompt.numpy().tobytes(), () if batch.prompts is None else batch.prompts[row].images
