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

    `max_response_length` is the response budget that `seq_mean_token_sum_norm` divides by. No batch
    tells it, and the longest response of a batch is no constant, so it has no default.
    """

    tokens: float
    sequences: float
    max_response_length: float | None = None

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        """Those of the mask [B, T] alone."""
        return cls(float(mask.sum()), float(mask.any(-1).sum()))


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
    Raises: ValueError for an unknown mode, or if max_response_length is missing where it is needed.
    """
    if mode == "token_mean":
        return masked_sum(values, mask) / max(denominators.tokens, 1.0)
    sums = values.where(mask, 0.0).sum(-1)
    if mode == "seq_mean_token_mean":
        sums = sums / mask.sum(-1).clamp(min=1)
    elif mode == "seq_mean_token_sum_norm":
        budget = denominators.max_response_length or 0.0
        if not budget > 0:
            raise ValueError(
                f'loss_aggregation "{mode}" divides by a constant, the most tokens a response may '
                f"have: pass max_response_length > 0 (it is {denominators.max_response_length})"
            )
        sums = sums / budget
    else:
        raise ValueError(f'loss_aggregation "{mode}" is unknown; choose from {", ".join(MODES)}')
    return sums.sum() / max(denominators.sequences, 1.0)


def token_mean(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Detached mean over tokens, for metrics."""
    with torch.no_grad():
        return masked_sum(values.detach().float(), mask) / max(denominators.tokens, 1.0)
