"""How values of tokens become one number, with denominators that may span a whole optimizer step.

A step's loss is a sum over micro-batches and ranks of what `aggregate` returns, each divided by
the same global `Denominators`: so it does not depend on how the samples were cut.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")


@dataclass(frozen=True)
class Denominators:
    """Response tokens and non-empty sequences of an optimizer step, over all ranks.

    `max_response_length` is the response budget that `seq_mean_token_sum_norm` divides by.
    """

    tokens: float
    sequences: float
    max_response_length: float

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        """Those of the mask [B, T] alone; its longest response stands in for the budget."""
        lengths = mask.sum(-1)
        longest = float(lengths.max()) if lengths.numel() else 0.0
        return cls(float(lengths.sum()), float((lengths > 0).sum()), max(longest, 1.0))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` [B, T] where `mask` is true; what is elsewhere, even NaN, has no effect."""
    return values.where(mask, 0.0).sum()


def aggregate(values: Tensor, mask: Tensor, mode: str, denominators: Denominators) -> Tensor:
    """One number from token values.

    - token_mean: sum over tokens / all tokens (DAPO, arXiv:2503.14476)
    - seq_mean_token_mean: mean over sequences of the mean over their tokens (GRPO)
    - seq_mean_token_sum_norm: mean over sequences of the sum over their tokens /
      max_response_length (Dr. GRPO, arXiv:2503.20783)

    A sequence with an empty mask counts neither above nor below.

    Args: values float [B, T], mask bool [B, T].
    Raises: ValueError for an unknown mode.
    """
    if mode == "token_mean":
        return masked_sum(values, mask) / max(denominators.tokens, 1.0)
    sums = values.where(mask, 0.0).sum(-1)
    if mode == "seq_mean_token_mean":
        sums = sums / mask.sum(-1).clamp(min=1)
    elif mode == "seq_mean_token_sum_norm":
        sums = sums / denominators.max_response_length
    else:
        raise ValueError(f'loss_aggregation "{mode}" is unknown; choose from {", ".join(MODES)}')
    return sums.sum() / max(denominators.sequences, 1.0)


def token_mean(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Detached mean over tokens, for metrics."""
    with torch.no_grad():
        return masked_sum(values.detach().float(), mask) / max(denominators.tokens, 1.0)
