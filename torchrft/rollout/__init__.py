"""Rollout engines: `build_engine(config, ...)` gives the one that `engine_type` names."""

from torchrft.rollout.build import build_engine
from torchrft.rollout.engine import RolloutEngine

__all__ = ["RolloutEngine", "build_engine"]
