"""From scored samples to the tensors of the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchrft.tools.distributed import DataRanks
from torchrft.types import RolloutBatch, Sample


def make_batch(
    samples: Sequence[Sample],
    device: torch.device | str = "cpu",
    overlong_filtering: bool = False,
) -> RolloutBatch:
    """The samples as a RolloutBatch, in their order.

    With `overlong_filtering` the mask leaves out responses that the length limit cut off: they
    take part in their group's statistics, but not in the loss.

    Sequences and prompt lengths stay on the host, where micro-batches are built; [B, T] tensors go
    to `device`. Raises ValueError for a sample without tokens or whose log-probs do not match them.
    """
    for sample in samples:
        tokens, values = sample.completion.token_ids, sample.completion.logprobs
        if not tokens or len(tokens) != len(values):
            raise ValueError(
                f"the completion of prompt row {sample.prompt.row} has {len(tokens)} tokens and "
                f"{len(values)} log-probs"
            )
    lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples])
    logprobs = pad_sequence(
        [torch.tensor(sample.completion.logprobs) for sample in samples], batch_first=True
    )
    mask: Tensor = torch.arange(logprobs.shape[1]) < lengths[:, None]
    filler = torch.tensor([sample.filler for sample in samples])
    mask &= ~filler[:, None]
    if overlong_filtering:
        cut = [sample.completion.finish_reason == "length" for sample in samples]
        mask &= ~torch.tensor(cut)[:, None]
    return RolloutBatch(
        sequences=tuple(
            torch.tensor(sample.prompt.token_ids + sample.completion.token_ids)
            for sample in samples
        ),
        prompt_lens=torch.tensor([len(sample.prompt.token_ids) for sample in samples]),
        mask=mask.to(device),
        rewards=torch.tensor([sample.score.value for sample in samples]).to(device),
        group=torch.tensor([sample.group for sample in samples]).to(device),
        rollout_logprobs=logprobs.to(device),
        filler=filler.to(device),
        prompts=(
            tuple(sample.prompt for sample in samples)
            if any(sample.prompt.images for sample in samples)
            else None
        ),
    )


def counted_rows(batch: RolloutBatch) -> RolloutBatch:
    """Without the fillers."""
    if batch.filler is None or not bool(batch.filler.any()):
        return batch
    return batch.select((~batch.filler).nonzero().flatten().tolist())


def gather_rows(
    parts: Mapping[str, Tensor | None], ranks: DataRanks
) -> tuple[dict[str, Any], slice]:
    """All ranks' rows of [B] and [B, T] tensors, and which of them are this rank's.

    T becomes the longest of all ranks; new columns are zeros. None stays None.
    """
    gathered: list[Any] = ranks.gather(
        {k: None if v is None else v.cpu() for k, v in parts.items()}
    )
    out: dict[str, Any] = {}
    for name, own in parts.items():
        out[name] = own
        if own is not None:
            rows = [part[name] for part in gathered]
            if own.dim() == 2:
                width = max(row.shape[1] for row in rows)
                rows = [F.pad(row, (0, width - row.shape[1])) for row in rows]
            out[name] = torch.cat(rows).to(own.device)
    sizes = [len(part["rewards"]) for part in gathered]
    first = sum(sizes[: ranks.rank])
    return out, slice(first, first + sizes[ranks.rank])
