"""The mismatch between the engine's log-probs and the trainer's, for the same tokens.

w_t = exp(old_logprob_t - rollout_logprob_t) is the importance weight of a token that the engine
sampled, under the trainer's policy of the same weights.
"""

import torch
from torch import Tensor

from torchrft.algorithms.aggregation import Denominators, token_mean
from torchrft.algorithms.kl import kl_divergence

CORRECTIONS = ("none", "token_tis", "seq_tis", "token_mask", "seq_mask")


@torch.no_grad()
def correction_weights(
    rollout_correction: str,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    rollout_correction_cap: float = 2.0,
) -> Tensor:
    """Factor [B, T] on the policy loss of each token, without gradient; C is the cap.

    token_tis: min(w_t, C); seq_tis: min(prod_t w_t, C) (truncated importance sampling,
    https://fengyao.notion.site/off-policy-rl); token_mask: 1 where 1/C <= w_t <= C, else 0;
    seq_mask: the same for the geometric mean of a sequence's w_t. Dropped terms stay in the
    denominators.
    Raises: ValueError for an unknown correction, or a cap below 1.
    """
    cap = rollout_correction_cap
    if cap < 1:
        raise ValueError(f"rollout_correction_cap {cap} must be at least 1")
    log_w = (old_logprobs - rollout_logprobs).where(mask, 0.0).clamp(-20.0, 20.0)
    if rollout_correction == "none":
        return torch.ones_like(log_w)
    if rollout_correction == "token_tis":
        return log_w.exp().clamp(max=cap)
    if rollout_correction == "token_mask":
        return ((log_w.exp() <= cap) & (log_w.exp() >= 1 / cap)).to(log_w.dtype)
    total = log_w.sum(-1, keepdim=True)
    if rollout_correction == "seq_tis":
        return total.clamp(-20.0, 20.0).exp().clamp(max=cap).expand_as(log_w)
    if rollout_correction == "seq_mask":
        mean = (total / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
        return ((mean <= cap) & (mean >= 1 / cap)).to(log_w.dtype).expand_as(log_w)
    choices = ", ".join(CORRECTIONS)
    raise ValueError(f'rollout_correction "{rollout_correction}" is unknown; choose from {choices}')


@torch.no_grad()
def mismatch(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, denominators: Denominators
) -> tuple[dict[str, Tensor], Tensor]:
    """How far the engine was from the trainer's policy of the same weights.

    Args: old_logprobs, rollout_logprobs float32 [B, T]; mask bool [B, T].
    Returns: metrics that add up over micro-batches and ranks (mean absolute difference, k3 estimate
        of KL(engine || trainer), means of w and w^2), and the largest absolute difference.
        The effective sample size is mean(w)^2 / mean(w^2), a share of the tokens.
    """
    difference = (old_logprobs - rollout_logprobs).abs()
    weight = (old_logprobs - rollout_logprobs).clamp(-20.0, 20.0).exp()
    values = {
        "mismatch/logprob_abs_mean": difference,
        "mismatch/kl": kl_divergence(rollout_logprobs, old_logprobs, "k3"),
        "mismatch/weight_mean": weight,
        "mismatch/weight_square_mean": weight.square(),
    }
    metrics = {name: token_mean(value, mask, denominators) for name, value in values.items()}
    return metrics, difference.where(mask, 0.0).max()
