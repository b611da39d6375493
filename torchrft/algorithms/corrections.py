"""The mismatch between the engine's log-probs and the trainer's, for the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrft.algorithms.aggregation import Denominators, token_mean
from torchrft.algorithms.kl import kl_divergence


@torch.no_grad()
def mismatch(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, denominators: Denominators
) -> tuple[dict[str, Tensor], Tensor]:
    """How far the engine was from the trainer's policy of the same weights.

    Args: old_logprobs, rollout_logprobs float32 [B, T]; mask bool [B, T].
    Returns: metrics that add up over micro-batches and ranks (mean absolute difference, and k3
        estimate of KL(engine || trainer)), and the largest absolute difference, a scalar.
    """
    difference = (old_logprobs - rollout_logprobs).abs()
    metrics = {
        "mismatch/logprob_abs_mean": token_mean(difference, mask, denominators),
        "mismatch/kl": token_mean(
            kl_divergence(rollout_logprobs, old_logprobs, "k3"), mask, denominators
        ),
    }
    return metrics, difference.where(mask, 0.0).max()
