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

    M is the number of their response tokens. `cells[m]` is where response token m belongs in the
    flattened [len(rows), T] of those `samples`.
    """

    rows: list[int]
    samples: RolloutBatch
    input_ids: Tensor  # int64 [1, N] packed, [len(rows), L] padded
    position_ids: Tensor  # int64, as input_ids, or three times that where images move them
    layout: Layout | None  # None: padded rows
    targets: Tensor  # int64 [M], flat positions in input_ids whose next token is a response token
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
    into passes (Johnson, 1973: at most 11/9 of the fewest possible).
    Raises: ValueError for a sample longer than the budget.
    """
    if not packed:
        return [rows[start : start + samples] for start in range(0, len(rows), samples)]
    pieces: list[tuple[int, list[int]]] = []  # (tokens, rows)
    for members in _by_prompt(batch, rows):
        prompt = int(batch.prompt_lens[members[0]])
        tokens = prompt
        piece: list[int] = []
        for row in members:
            whole = batch.sequences[row].numel()
            if whole > max_tokens:
                raise ValueError(f"a sample of {whole} tokens exceeds the budget of {max_tokens}")
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
    prompts = batch.prompt_lens[rows].tolist()
    responses = [batch.sequences[row][p:] for row, p in zip(rows, prompts, strict=True)]
    layout = None
    if packed:
        ids, positions, starts, bounds, layout = _packed_row(batch, rows)
    else:
        ids = pad_sequence([batch.sequences[row][:-1] for row in rows], batch_first=True)
        length = ids.shape[1]
        positions = torch.arange(length).expand_as(ids)
        starts = [(i * length + p - 1, i * length + p) for i, p in enumerate(prompts)]
        bounds = [(row, i * length, (i + 1) * length) for i, row in enumerate(rows)]
    # Response token 0 is predicted at the prompt's last position, token t at response token t - 1.
    repeats = torch.tensor([response.numel() for response in responses])
    begins = (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    step = torch.arange(int(repeats.sum())) - begins
    first, rest = torch.tensor(starts).repeat_interleave(repeats, dim=0).unbind(1)
    targets = torch.where(step == 0, first, rest + step - 1)
    cells = torch.arange(len(rows)).repeat_interleave(repeats) * batch.mask.shape[1] + step
    images = None
    if vision is not None:
        known = batch.prompts
        spans = [] if known is None else [(known[row], a, b) for row, a, b in bounds]
        positions, images = vision.see(positions, spans)
    kept = None if batch.kept is None else Kept.join([batch.kept[row] for row in rows])
    inputs = (ids, positions, layout, targets, torch.cat(responses), cells, images, kept)
    device = batch.mask.device
    on_device: list[Any] = [None if value is None else value.to(device) for value in inputs]
    return MicroBatch(rows, batch.select(rows), *on_device)


def _packed_row(
    batch: RolloutBatch, rows: list[int]
) -> tuple[Tensor, Tensor, list[tuple[int, int]], list[tuple[int, int, int]], Packed]:
    """Token ids and positions [1, N], where each sample's prompt ends and its response begins
    (position of the prompt's last token, of the response's first), each prompt's bounds (a sample
    of it, where the prompt begins, where the last token after it ends), and the layout."""
    starts: dict[int, tuple[int, int]] = {}
    ids: list[Tensor] = []
    groups: list[tuple[int, list[int]]] = []
    bounds: list[tuple[int, int, int]] = []
    position = 0
    for members in _by_prompt(batch, rows):
        begin, prompt = position, int(batch.prompt_lens[members[0]])
        responses = [batch.sequences[row][prompt:-1] for row in members]
        ids += [batch.sequences[members[0]][:prompt], *responses]
        position += prompt
        for row, response in zip(members, responses, strict=True):
            starts[row] = (begin + prompt - 1, position)
            position += response.numel()
        groups.append((prompt, [response.numel() for response in responses]))
        bounds.append((members[0], begin, position))
    layout = Packed.of(groups)
    return torch.cat(ids)[None], layout.positions[None], [starts[r] for r in rows], bounds, layout


def _by_prompt(batch: RolloutBatch, rows: list[int]) -> list[list[int]]:
    """`rows` in lists of equal prompts, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for row in rows:
        prompt = batch.sequences[row][: int(batch.prompt_lens[row])]
        images = () if batch.prompts is None else batch.prompts[row].images
        groups.setdefault((prompt.numpy().tobytes(), images), []).append(row)
    return list(groups.values())
