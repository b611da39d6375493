"""Estimators of the KL divergence from samples (Schulman, http://joschu.net/blog/kl-approx.html)."""

from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Token-wise estimate of KL(policy || reference) from tokens the policy sampled.

    With d = logprobs - ref_logprobs: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, where d is clamped
    to +-20. All shapes are equal, [B, T] say; float32.
    Raises: ValueError for an unknown estimator.
    """
    d = (logprobs - ref_logprobs).clamp(-20.0, 20.0)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return (-d).exp() - 1 + d
    raise ValueError(f'kl_estimator "{estimator}" is unknown; choose from {", ".join(ESTIMATORS)}')


def adapt_coefficient(
    coefficient: float, kl: float, kl_target: float, samples: int, kl_horizon: int
) -> float:
    """The next coefficient of the adaptive controller (arXiv:1909.08593).

    coefficient (1 + clip(kl / kl_target - 1, +-0.2) samples / kl_horizon), where `samples` is the
    size of the rollout in which `kl` was measured.

    >>> adapt_coefficient(0.1, kl=0.02, kl_target=0.01, samples=500, kl_horizon=10000)
    0.101
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / kl_horizon)
