"""Estimators of the KL divergence from samples (Schulman, http://joschu.net/blog/kl-approx.html).

What their gradients descend: arXiv:2510.01555.
"""

from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Token-wise estimate of KL(policy || reference) from tokens the policy sampled.

    With d = logprobs - ref_logprobs: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, where d is clamped
    to +-20. All shapes are equal, [B, T] say; float32.

    As a term of the loss, over the policy's samples, the gradients' means are those of
    KL(policy || reference) for k1 and k2, and of KL(reference || policy) for k3. The gradient of k1
    is k2's, d grad(logprobs): the derivative of d is grad(logprobs), whose mean is 0 for every
    reference. (verl calls this k1+.) A token beyond +-20 keeps the gradient of +-20.
    Raises: ValueError for an unknown estimator.
    """
    gap = (logprobs - ref_logprobs).clamp(-1e4, 1e4)  # finite, so that gap - gap is 0
    # The clamp without its zero gradient: the farthest tokens must be pulled back too.
    d = gap.clamp(-20.0, 20.0).detach() + (gap - gap.detach())
    k2 = d.square() / 2
    if estimator == "k1":
        return d.detach() + (k2 - k2.detach())
    if estimator == "k2":
        return k2
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
