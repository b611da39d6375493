"""Where rewards come from: `register` a function, `build_scorer` from the config, score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchrft.rewards.registry import register
from torchrft.rewards.source import RewardError, RewardRequest, RewardResult, RewardSource

if TYPE_CHECKING:
    from torchrft.rewards.scorer import Scorer, build_scorer

__all__ = [
    "RewardError",
    "RewardRequest",
    "RewardResult",
    "RewardSource",
    "Scorer",
    "build_scorer",
    "register",
]


def __getattr__(name: str) -> Any:
    """The scorer, when it is asked for: rule workers import this package without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchrft.rewards import scorer

    return getattr(scorer, name)
