"""From scored samples to the tensors of the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchrft.tools.distributed import DataRanks
from torchrft.types import Branch, RolloutBatch, Sample


def make_batch(
    samples: Sequence[Sample], device: torch.device | str = "cpu", overlong_filtering: bool = False
) -> RolloutBatch:
    """The samples as a RolloutBatch, in their order.

    With `overlong_filtering` the mask leaves out responses that the length limit cut off: they
    take part in their group's statistics, but not in the loss. So do episodes whose environment
    failed.

    Sequences and prompt lengths stay on the host, where micro-batches are built; [B, T] tensors go
    to `device`. Raises ValueError for a sample without tokens or whose log-probs do not match them,
    and where some samples say which tokens truncated sampling kept, and others do not.
    """
    prompts = tuple(sample.prompt for sample in samples)
    completions = [sample.completion for sample in samples]
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, values = len(completion.token_ids), len(completion.logprobs)
        if not tokens or tokens != values:
            counts = f"{tokens} tokens and {values} log-probs"
            raise ValueError(f"the completion of prompt row {prompt.row} has {counts}")
        if (completion.kept is None) != (completions[0].kept is None):
            raise ValueError(f"prompt row {prompt.row}: truncation_replay changed between samples")
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    logprobs = pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True)
    filler = torch.tensor([sample.filler for sample in samples])
    uncounted = filler | torch.tensor([c.fault is not None for c in completions])
    if overlong_filtering:
        uncounted |= torch.tensor([c.finish_reason == "length" for c in completions])
    mask = (torch.arange(logprobs.shape[1]) < lengths[:, None]) & ~uncounted[:, None]
    rows = [
        c.branches or (Branch(p.token_ids, c.token_ids, (True,) * len(c.token_ids), c.logprobs),)
        for p, c in zip(prompts, completions, strict=True)
    ]
    kept = tuple(c.kept for c in completions if c.kept is not None)
    return RolloutBatch(
        sequences=tuple(torch.tensor(first.prompt + first.token_ids) for first, *_ in rows),
        prompt_lens=torch.tensor([len(first.prompt) for first, *_ in rows]),
        mask=mask.to(device),
        rewards=torch.tensor([sample.score.value for sample in samples]).to(device),
        group=torch.tensor([sample.group for sample in samples]).to(device),
        rollout_logprobs=logprobs.to(device),
        filler=filler.to(device),
        prompts=prompts if any(prompt.images for prompt in prompts) else None,
        kept=kept or None,
        branches=tuple(rows) if any(c.branches for c in completions) else None,
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
    on_host = {name: None if own is None else own.cpu() for name, own in parts.items()}
    gathered: list[dict[str, Any]] = ranks.gather(on_host)
    out: dict[str, Any] = dict(parts)
    for name, own in parts.items():
        if own is not None:
            rows = [part[name] for part in gathered]
            if own.dim() == 2:
                width = max(row.shape[1] for row in rows)
                rows = [F.pad(row, (0, width - row.shape[1])) for row in rows]
            out[name] = torch.cat(rows).to(own.device)
    sizes = [len(part["rewards"]) for part in gathered]
    first = sum(sizes[: ranks.rank])
    return out, slice(first, first + sizes[ranks.rank])
