"""From samples to micro-batches: packed rows under a token budget, or padded rows.

Both give the same log-probs, losses and gradients. A packed row holds a prompt once for all its
samples that are in it: with n samples per prompt the prompt is computed once, not n times. The
last token of a sample is a label only and never goes through the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchrft.models.attention import Layout, Packed
from torchrft.models.vision import ImageBatch, Vision
from torchrft.types import Prompt, RolloutBatch


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass over the samples `rows` of a RolloutBatch.

    M is the number of their response tokens. `cells[m]` is where response token m belongs in the
    flattened [len(rows), T] of those samples.
    """

    rows: list[int]
    input_ids: Tensor  # int64 [1, N] packed, [len(rows), L] padded
    position_ids: Tensor  # int64, as input_ids, or three times that where images move them
    layout: Layout | None  # None: padded rows
    targets: Tensor  # int64 [M], flat positions in input_ids whose next token is a response token
    labels: Tensor  # int64 [M], those next tokens
    cells: Tensor  # int64 [M]
    images: ImageBatch | None = None

    def scatter(self, values: Tensor, width: int) -> Tensor:
        """Values [M] as [len(rows), width], zero where there is no response token."""
        out = values.new_zeros(len(self.rows) * width)
        return out.index_copy(0, self.cells, values).view(len(self.rows), width)


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
            length = batch.sequences[row].numel() - prompt
            if prompt + length > max_tokens:
                raise ValueError(
                    f"a sample of {prompt + length} tokens exceeds the budget of {max_tokens}"
                )
            if tokens + length > max_tokens:
                pieces.append((tokens, piece))
                tokens, piece = prompt, []
            tokens += length
            piece.append(row)
        pieces.append((tokens, piece))
    bins: list[list[int]] = []
    room: list[int] = []
    for tokens, piece in sorted(pieces, key=lambda item: -item[0]):
        fit = next((i for i, left in enumerate(room) if left >= tokens), None)
        if fit is None:
            bins.append(piece)
            room.append(max_tokens - tokens)
        else:
            bins[fit].extend(piece)
            room[fit] -= tokens
    return bins


def build(
    batch: RolloutBatch, rows: list[int], packed: bool, width: int, vision: Vision | None = None
) -> MicroBatch:
    """The micro-batch of the samples `rows`; `width` is the T of the batch's [B, T] tensors.

    `vision` is given where samples may have images.
    """
    device = batch.mask.device
    prompts = batch.prompt_lens[rows].tolist()
    lengths = [batch.sequences[row].numel() - p for row, p in zip(rows, prompts, strict=True)]
    if packed:
        ids, positions, starts, layout = _packed_row(batch, rows)
    else:
        ids = pad_sequence([batch.sequences[row][:-1] for row in rows], batch_first=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        starts = [(i * ids.shape[1] + p - 1, i * ids.shape[1] + p) for i, p in enumerate(prompts)]
        layout = None
    # Response token 0 is predicted at the prompt's last position, token t at response token t - 1.
    repeats = torch.tensor(lengths)
    step = torch.arange(int(repeats.sum())) - (repeats.cumsum(0) - repeats).repeat_interleave(
        repeats
    )
    first, rest = torch.tensor(starts).repeat_interleave(repeats, dim=0).unbind(1)
    images = None
    if vision is not None:
        spans = _spans(batch, rows, packed, ids.shape[1])
        positions, images = vision.see(positions, spans)
    targets = torch.where(step == 0, first, rest + step - 1)
    cells = torch.arange(len(rows)).repeat_interleave(repeats) * width + step
    labels = torch.cat([batch.sequences[row][p:] for row, p in zip(rows, prompts, strict=True)])
    return MicroBatch(
        rows,
        ids.to(device),
        positions.to(device),
        layout.to(device) if layout else None,
        targets.to(device),
        labels.to(device),
        cells.to(device),
        None if images is None else images.to(device),
    )


def _spans(
    batch: RolloutBatch, rows: list[int], packed: bool, length: int
) -> list[tuple[Prompt, int, int]]:
    """The prompts of a pass: where each begins, and where the last token after it ends."""
    if batch.prompts is None:
        return []
    if not packed:
        return [(batch.prompts[r], i * length, (i + 1) * length) for i, r in enumerate(rows)]
    spans, end = [], 0
    for members in _by_prompt(batch, rows):
        start, prompt = end, int(batch.prompt_lens[members[0]])
        end += prompt + sum(batch.sequences[row].numel() - prompt - 1 for row in members)
        spans.append((batch.prompts[members[0]], start, end))
    return spans


def _packed_row(
    batch: RolloutBatch, rows: list[int]
) -> tuple[Tensor, Tensor, list[tuple[int, int]], Packed]:
    """Token ids and positions [1, N], where each sample's prompt ends and its response begins
    (position of the prompt's last token, of the response's first), and the layout."""
    order = {row: index for index, row in enumerate(rows)}
    starts = [(0, 0)] * len(rows)
    ids: list[Tensor] = []
    groups: list[tuple[int, list[int]]] = []
    position = 0
    for members in _by_prompt(batch, rows):
        prompt = int(batch.prompt_lens[members[0]])
        ids.append(batch.sequences[members[0]][:prompt])
        last, position = position + prompt - 1, position + prompt
        branches = []
        for row in members:
            response = batch.sequences[row][prompt:-1]
            ids.append(response)
            starts[order[row]] = (last, position)
            position += response.numel()
            branches.append(response.numel())
        groups.append((prompt, branches))
    layout = Packed.of(groups)
    return torch.cat(ids)[None], layout.positions[None], starts, layout


def _by_prompt(batch: RolloutBatch, rows: list[int]) -> list[list[int]]:
    """`rows` in lists of equal prompts, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for row in rows:
        prompt = batch.sequences[row][: int(batch.prompt_lens[row])]
        images = () if batch.prompts is None else batch.prompts[row].images
        groups.setdefault((prompt.numpy().tobytes(), images), []).append(row)
    return list(groups.values())
