"""The rewards that environments give in the course of their episodes, as a source among others."""

from collections.abc import Sequence

from torchrft.rewards.source import RewardRequest, RewardResult


class EnvironmentRewards:
    """What the episodes' environments gave; an environment's fault leaves its episode without."""

    name = "environment"
    collective = False

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        episodes = [request.completion for request in requests]
        return [RewardResult(e.reward, metrics=e.metrics, error=e.fault) for e in episodes]

    def close(self) -> None:
        """There is nothing to end."""
