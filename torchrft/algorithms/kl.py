"""Estimators of the KL divergence from samples (Schulman, http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

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
