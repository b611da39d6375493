"""Policy losses: log-probs and advantages of tokens in, one differentiable number out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from torchrft.algorithms.aggregation import Denominators, aggregate, token_mean
from torchrft.algorithms.kl import kl_divergence
from torchrft.config.registry import Registry

Metrics = dict[str, Tensor]

LOSSES: Registry[Any] = Registry("policy_loss")


def policy_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_aggregation: str = "seq_mean_token_mean",
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    init_kl_coef: float = 0.001,
    denominators: Denominators | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """agg(token losses of the registered loss `name`) + init_kl_coef * agg(KL to the reference).

    Args: logprobs, old_logprobs, advantages, ref_logprobs float32 [B, T]; mask bool [B, T];
        loss_aggregation and denominators as in `aggregation` (left out, the batch's own);
        without ref_logprobs there is no KL term; options by the names of the loss's keywords.
    Returns: the scalar loss, and metrics that add up over micro-batches and ranks when
        `denominators` are global: policy/loss, policy/kl, policy/approx_kl (k3 of policy and old
        policy) and the loss's own.
    Raises: ValueError for an unknown loss, option or aggregation, or unequal shapes.
    """
    function = LOSSES.get(name)
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise ValueError(f'policy loss "{name}" has no option "{option}"')
    for tensor in (old_logprobs, advantages, mask, ref_logprobs):
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(f"shape {tuple(tensor.shape)} differs from {tuple(logprobs.shape)}")
    denominators = denominators or Denominators.of(mask)
    # Masked before use, not only after: a gradient of 0 times a masked NaN would still be NaN.
    logprobs, old_logprobs, advantages = (
        x.where(mask, 0.0) for x in (logprobs, old_logprobs, advantages)
    )
    losses, extra = function(logprobs, old_logprobs, advantages, mask, **options)
    loss = aggregate(losses, mask, loss_aggregation, denominators)
    approx_kl = kl_divergence(old_logprobs, logprobs.detach(), "k3")
    metrics = {key: token_mean(value, mask, denominators) for key, value in extra.items()}
    metrics["policy/approx_kl"] = token_mean(approx_kl, mask, denominators)
    metrics["policy/kl"] = torch.zeros_like(loss)
    if ref_logprobs is not None:
        kl = kl_divergence(logprobs, ref_logprobs.where(mask, 0.0), kl_estimator)
        loss = loss + init_kl_coef * aggregate(kl, mask, loss_aggregation, denominators)
        metrics["policy/kl"] = token_mean(kl, mask, denominators)
    metrics["policy/loss"] = loss.detach()
    return loss, metrics


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """l = logprobs - old_logprobs, clamped to +-20 so that exp(l) stays finite."""
    return (logprobs - old_logprobs).clamp(-20.0, 20.0)


@LOSSES.register("ppo_clip")
def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    clip_range_higher: float = 0.3,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (arXiv:1707.06347), with separate bounds (clip-higher, DAPO).

    max(-r A, -clamp(r, 1 - clip_range, 1 + clip_range_higher) A) with r = exp(l), per token [B, T].
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range_higher)
    plain, bounded = -ratio * advantages, -clipped * advantages
    return torch.maximum(plain, bounded), {"policy/clip_fraction": (bounded > plain).float()}
