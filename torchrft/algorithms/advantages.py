"""Advantage estimators: rewards of samples in, advantages of tokens out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from torchrft.config.registry import Registry


@dataclass(frozen=True)
class Advantages:
    """What an estimator returns.

    `advantages` and `returns` are float32 [B, T] and zero outside the mask; `metrics` are floats.
    """

    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Estimator(Protocol):
    """A registered function; what it takes by keyword are its options."""

    def __call__(
        self, rewards: Tensor, group: Tensor, mask: Tensor, **options: Any
    ) -> Advantages: ...


ESTIMATORS: Registry[Any] = Registry("advantage_estimator")


def compute(
    estimator: str, rewards: Tensor, group: Tensor, mask: Tensor, **options: Any
) -> Advantages:
    """Advantages of B samples by the registered `estimator`.

    Args: rewards float [B]; group int [B], equal for the samples of one prompt; mask bool [B, T] of
        response tokens; options by the names of the estimator's keywords.
    Raises: ValueError for an unknown estimator or option, shapes that do not fit, or a reward that
        is not finite (naming the sample).

    >>> rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([7, 7])
    >>> compute("group_norm", rewards, group, torch.ones(2, 1).bool()).advantages.squeeze(1)
    tensor([ 0.7071, -0.7071])
    """
    function = ESTIMATORS.get(estimator)
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            raise ValueError(f'advantage estimator "{estimator}" has no option "{name}"')
    if rewards.shape != mask.shape[:1] or group.shape != rewards.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, group {tuple(group.shape)} and mask "
            f"{tuple(mask.shape)} must be [B], [B], [B, T]"
        )
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the reward of sample {bad[0]} is {rewards[bad[0]].item()}")
    return function(rewards, group, mask, **options)


@ESTIMATORS.register("group_norm")
def group_norm(rewards: Tensor, group: Tensor, mask: Tensor) -> Advantages:
    """GRPO (arXiv:2402.03300): (R_i - mean_g) / (std_g + 1e-6) on every token of sample i.

    std is the unbiased one; a group of one sample, or of equal rewards, gives 0.
    """
    centered, std = center_by_group(rewards, group)
    per_sample = (centered / (std + 1e-6)).float()
    advantages = per_sample[:, None] * mask
    return Advantages(advantages, advantages)


def center_by_group(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(R_i - mean_g, unbiased std_g) in float64 [B]; exactly 0 where a group's rewards are equal.

    Groups are the samples of equal `group`, in any order and of any size.
    """
    _, index = group.unique(return_inverse=True)
    count = index.bincount().double()
    value = rewards.double()
    mean = torch.zeros_like(count).index_add_(0, index, value) / count
    lowest = torch.full_like(count, torch.inf).scatter_reduce_(0, index, value, "amin")
    highest = torch.full_like(count, -torch.inf).scatter_reduce_(0, index, value, "amax")
    # The mean of equal numbers may be off by a rounding error, which dividing by a tiny standard
    # deviation would blow up.
    centered = (value - mean[index]).where((lowest < highest)[index], 0.0)
    squares = torch.zeros_like(count).index_add_(0, index, centered.square())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return centered, std[index]
