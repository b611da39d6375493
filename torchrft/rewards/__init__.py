"""Where rewards come from: `register` a function, `build_scorer` from the config, score."""

from torchrft.rewards import functions as functions  # registers the rewards that come with torchrft
from torchrft.rewards.registry import register
from torchrft.rewards.scorer import Scorer, build_scorer

__all__ = ["Scorer", "build_scorer", "register"]
