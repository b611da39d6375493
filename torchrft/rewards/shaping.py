"""What happens to rewards between the sources and the estimator, in the order it happens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchrft.config.reward_config import Reward
from torchrft.types import Completion, Score

Reduce = Callable[[Tensor], Tensor]  # sums a float64 tensor over ranks


def overlong_penalty(length: int, budget: int, buffer_len: int, factor: float) -> float:
    """DAPO's soft punishment (arXiv:2503.14476) of a response of `length` tokens.

    0 up to budget - buffer_len, then linear to -factor at budget, and never below that.

    >>> [overlong_penalty(length, 100, 20, 1.0) for length in (80, 90, 100)]
    [-0.0, -0.5, -1.0]
    """
    excess = max(length - (budget - buffer_len), 0) / buffer_len
    return -factor * min(excess, 1.0)


class RunningNorm:
    """Mean and variance of every reward seen (Welford's method, merged batch by batch).

    All ranks pass their own rewards and hold the same statistics afterwards.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, rewards: Tensor, reduce: Reduce = lambda tensor: tensor) -> None:
        """Takes in `rewards` [B] of every rank."""
        values = rewards.double()
        count, total = reduce(torch.stack([torch.ones_like(values).sum(), values.sum()])).tolist()
        if not count:
            return
        mean = total / count
        squares = float(reduce((values - mean).square().sum()[None])[0])
        both, shift = self.count + count, mean - self.mean
        self.squares += squares + shift**2 * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    def normalize(self, rewards: Tensor, minus_mean: bool) -> Tensor:
        """R / (std + 1e-8), or (R - mean) / (std + 1e-8), with the unbiased std.

        Unchanged while fewer than two rewards were seen.
        """
        if self.count < 2:
            return rewards
        std = (self.squares / (self.count - 1)) ** 0.5
        return ((rewards.double() - (self.mean if minus_mean else 0.0)) / (std + 1e-8)).float()

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean, self.squares = (state[k] for k in ("count", "mean", "squares"))


class RewardShaper:
    """Overlong penalty, running normalization and clipping, as the config asks for."""

    def __init__(self, config: Reward) -> None:
        self.config = config
        self.norm = RunningNorm()

    def penalize(
        self, scores: Sequence[Score], completions: Sequence[Completion], budgets: Sequence[int]
    ) -> list[Score]:
        """Adds the overlong penalty, as a part of its own; `budgets` bound each response."""
        if not self.config.overlong_buffer_len:
            return list(scores)
        penalized = []
        for score, completion, budget in zip(scores, completions, budgets, strict=True):
            penalty = overlong_penalty(
                len(completion.token_ids),
                budget,
                self.config.overlong_buffer_len,
                self.config.overlong_penalty_factor,
            )
            parts = {**score.parts, "overlong": penalty}
            penalized.append(replace(score, value=score.value + penalty, parts=parts))
        return penalized

    def shape(self, rewards: Tensor, reduce: Reduce) -> tuple[Tensor, dict[str, float]]:
        """Normalized and clipped rewards [B] of a training rollout, and metrics."""
        metrics = {}
        if self.config.reward_running_norm:
            self.norm.update(rewards, reduce)
            rewards = self.norm.normalize(rewards, self.config.reward_running_norm_minus_mean)
            metrics["reward/running_mean"] = self.norm.mean
        limit = self.config.reward_clip
        if limit > 0:
            beyond = (rewards.abs() > limit).double()
            counts = torch.stack([beyond.sum(), torch.ones_like(beyond).sum()])
            clipped, total = reduce(counts).tolist()
            metrics["reward/clipped_fraction"] = clipped / max(total, 1.0)
            rewards = rewards.clamp(-limit, limit)
        return rewards, metrics

    def state_dict(self) -> dict[str, float]:
        return self.norm.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norm.load_state_dict(state)
