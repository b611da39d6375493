"""Policy losses: log-probs and advantages of tokens in, one differentiable number out."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchrft.algorithms.aggregation import Denominators, aggregate, token_mean
from torchrft.algorithms.corrections import correction_weights
from torchrft.algorithms.kl import kl_divergence
from torchrft.algorithms.options import check_options
from torchrft.config.registry import Registry

Metrics = dict[str, Tensor]

LOSSES: Registry[Any] = Registry("policy_loss")
_TOKEN_MEAN = {"cispo"}  # the others' papers average over each sequence first


def policy_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_aggregation: str | None = None,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    init_kl_coef: float = 0.001,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    keep: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_correction: str = "none",
    rollout_correction_cap: float = 2.0,
    denominators: Denominators | None = None,
    max_response_length: float | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """agg(w * token losses of `name`) + init_kl_coef * agg(KL) - entropy_coef * agg(entropy).

    Args: logprobs, old_logprobs, advantages, ref_logprobs, rollout_logprobs, entropy float32
        [B, T]; mask bool [B, T] of response tokens. Left out, loss_aggregation is that of the
        loss's paper, denominators are the batch's own, and there is no KL term without a reference.
        `seq_mean_token_sum_norm` needs max_response_length, here or in `denominators`.
        `keep` bool [B, T] is the part of the mask that keeps its policy loss (see
        `high_entropy_mask`); the denominators count the others too. rollout_correction weights or
        drops terms by the engine's rollout_logprobs (see `corrections`). Options are the loss's own
        keywords; its clip ranges are by default those of its paper.
    Returns: the scalar loss, and metrics that add up over micro-batches and ranks when
        `denominators` are global: policy/loss, policy/kl, policy/approx_kl (k3 of policy and old
        policy) and the loss's own.
    Raises: ValueError for an unknown loss, option or aggregation, unequal shapes, a missing
        max_response_length, or tokens chosen or weighed in gmpo, whose loss is of sequences.
    """
    optional = (ref_logprobs, rollout_logprobs, entropy, keep)
    _check_shapes(logprobs, old_logprobs, advantages, mask, *optional)
    function = LOSSES.get(name)
    check_options(function, options, f'policy loss "{name}"')
    if name == "gmpo" and (keep is not None or rollout_correction.startswith("token_")):
        raise ValueError("tokens cannot be chosen or weighed in gmpo, whose loss is of sequences")
    how = loss_aggregation or ("token_mean" if name in _TOKEN_MEAN else "seq_mean_token_mean")
    denominators = _denominators(denominators, mask, max_response_length)
    # Masked before use, not only after: a gradient of 0 times a masked NaN would still be NaN.
    logprobs, old_logprobs = logprobs.where(mask, 0.0), old_logprobs.where(mask, 0.0)
    losses, extra = function(logprobs, old_logprobs, advantages.where(mask, 0.0), mask, **options)
    if rollout_correction != "none":
        what = f'rollout_correction "{rollout_correction}" needs rollout_logprobs'
        engine, cap = _given(rollout_logprobs, what), rollout_correction_cap
        losses = losses * correction_weights(rollout_correction, old_logprobs, engine, mask, cap)
    losses = losses if keep is None else losses.where(keep, 0.0)
    loss = aggregate(losses, mask, how, denominators)
    extra["policy/approx_kl"] = kl_divergence(old_logprobs, logprobs.detach(), "k3")
    extra["policy/kl"] = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        reference = ref_logprobs.where(mask, 0.0)
        kl = extra["policy/kl"] = kl_divergence(logprobs, reference, kl_estimator)
        loss = loss + init_kl_coef * aggregate(kl, mask, how, denominators)
    if entropy_coef:
        given = _given(entropy, f"entropy_coef = {entropy_coef} needs the tokens' entropy")
        loss = loss - entropy_coef * aggregate(given, mask, how, denominators)
    metrics = {key: token_mean(value, mask, denominators) for key, value in extra.items()}
    return loss, metrics | {"policy/loss": loss.detach()}


def _check_shapes(logprobs: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.shape != logprobs.shape:
            raise ValueError(f"shape {tuple(other.shape)} differs from {tuple(logprobs.shape)}")


def _denominators(given: Denominators | None, mask: Tensor, budget: float | None) -> Denominators:
    chosen = given or Denominators.of(mask)
    return chosen if budget is None else replace(chosen, max_response_length=budget)


def _given(tensor: Tensor | None, missing: str) -> Tensor:
    if tensor is None:
        raise ValueError(missing)
    return tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip: float = 0.2,
    loss_aggregation: str = "seq_mean_token_mean",
    denominators: Denominators | None = None,
    max_response_length: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's critic loss: agg(max((V_clip - ret)^2, (V - ret)^2)) / 2.

    V_clip = V_old + clamp(V - V_old, +-value_clip). Args: values, old_values, returns float32
    [B, T]; mask bool [B, T]; aggregation and denominators as in `policy_loss`.
    Returns: the scalar loss, and metrics that add up like those of `policy_loss`.
    """
    denominators = _denominators(denominators, mask, max_response_length)
    values, old_values, returns = (x.where(mask, 0.0) for x in (values, old_values, returns))
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    loss = aggregate(torch.maximum(plain, clipped), mask, loss_aggregation, denominators) / 2
    return loss, {
        "clip_fraction": token_mean((clipped > plain).float(), mask, denominators),
        "value_mean": token_mean(values, mask, denominators),
    }


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """l = logprobs - old_logprobs, clamped to +-20 so that exp(l) stays finite."""
    return (logprobs - old_logprobs).clamp(-20.0, 20.0)


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1], mean over each sequence's response tokens."""
    return values.where(mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Metrics]:
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    losses = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        limit = -dual_clip * advantages
        beyond = (advantages < 0) & (limit < losses)
        losses, clipped = torch.where(beyond, limit, losses), clipped | beyond
    return losses, {"policy/clip_fraction": clipped.float()}


@LOSSES.register("ppo_clip")
def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    clip_range_higher: float = 0.3,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (arXiv:1707.06347), with separate bounds (clip-higher, DAPO).

    max(-r A, -clamp(r, 1 - clip_range, 1 + clip_range_higher) A) with r = exp(l), per token [B, T];
    with dual_clip c > 1 (arXiv:1912.09729) and A < 0 at most -c A.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return _clipped(ratio, advantages, clip_range, clip_range_higher, dual_clip)


@LOSSES.register("gspo")
def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 3e-4,
    clip_range_higher: float = 4e-4,
) -> tuple[Tensor, Metrics]:
    """GSPO-token (arXiv:2507.18071): ppo_clip on the sequence's ratio, the gradient per token.

    s_i = exp(mean_t l_t), s_it = sg[s_i] exp(logprob_t - sg[logprob_t]). The clip ranges of the
    paper's experiments are 3e-4 and 4e-4: a mean of logarithms moves little.
    """
    sequence = _sequence_mean(log_ratio(logprobs, old_logprobs), mask).exp().detach()
    ratio = sequence * (logprobs - logprobs.detach()).exp()
    return _clipped(ratio, advantages, clip_range, clip_range_higher)


@LOSSES.register("gmpo")
def gmpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.4,
    clip_range_higher: float = 0.4,
) -> tuple[Tensor, Metrics]:
    """GMPO (arXiv:2507.20673): the geometric mean of the token ratios, clipped token by token.

    l'_t = sgn(A) min(sgn(A) l_t, sgn(A) clamp(l_t, -clip_range, clip_range_higher)), and the loss
    of sequence i is -A_i exp(mean_t l'_t), the same on all its tokens. The clip is in log space:
    the paper's range of ratios is e^-0.4 to e^0.4.
    """
    log_r = log_ratio(logprobs, old_logprobs)
    bounded = log_r.clamp(-clip_range, clip_range_higher)
    sign = advantages.sign()
    chosen = sign * torch.minimum(sign * log_r, sign * bounded)
    losses = -advantages * _sequence_mean(chosen, mask).exp()
    return losses, {"policy/clip_fraction": (sign * bounded < sign * log_r).float()}


@LOSSES.register("cpgd")
def cpgd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    clip_range_higher: float = 0.3,
    cpgd_drift_coef: float = 0.001,
) -> tuple[Tensor, Metrics]:
    """CPGD (arXiv:2505.12504): clipped log-ratio and a drift that holds the policy to the old one.

    -min(l A, clamp(l, ln(1 - clip_range), ln(1 + clip_range_higher)) A) + cpgd_drift_coef * drift,
    drift_t = (exp(l_t) - 1) - l_t, an estimate of KL(old || policy).
    Raises: ValueError for clip_range >= 1, whose logarithm does not exist.
    """
    if clip_range >= 1:
        raise ValueError(f"cpgd clips at ln(1 - clip_range): clip_range {clip_range} must be < 1")
    log_r = log_ratio(logprobs, old_logprobs)
    bounded = log_r.clamp(math.log(1 - clip_range), math.log(1 + clip_range_higher))
    plain, limited = log_r * advantages, bounded * advantages
    drift = log_r.exp() - 1 - log_r
    losses = -torch.minimum(plain, limited) + cpgd_drift_coef * drift
    clipped = (limited < plain).float()
    return losses, {"policy/clip_fraction": clipped, "policy/drift": drift.detach()}


@LOSSES.register("cispo")
def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 1.0,
    clip_range_higher: float = 0.3,
) -> tuple[Tensor, Metrics]:
    """CISPO (arXiv:2506.13585): -sg[clamp(r, 1 - clip_range, 1 + clip_range_higher)] A logprob.

    No token loses its gradient: the ratio is only a weight. The paper sets no lower bound, which is
    clip_range = 1, and gives no number for the upper one, which is the guide's.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp().detach()
    weight = ratio.clamp(1 - clip_range, 1 + clip_range_higher)
    return -weight * advantages * logprobs, {"policy/clip_fraction": (weight != ratio).float()}


@LOSSES.register("reinforce")
def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Metrics]:
    """REINFORCE (Williams, 1992): -A logprob; the ratio to the old policy plays no part."""
    return -advantages * logprobs, {"policy/clip_fraction": torch.zeros_like(advantages)}
