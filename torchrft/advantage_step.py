"""From the rewards of a rollout to the advantages of its tokens."""

import inspect
from dataclasses import replace
from typing import Any

import torch

from torchrft.algorithms import advantages
from torchrft.algorithms.options import options_of
from torchrft.algorithms.presets import Preset
from torchrft.config.fields import is_set
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import CRITIC_FIELDS, is_chosen
from torchrft.data.batch import counted_rows, gather_rows
from torchrft.rewards.shaping import RewardShaper
from torchrft.tools.distributed import DataRanks, any_rank
from torchrft.types import RolloutBatch


class AdvantageStep:
    """Shapes rewards and runs the estimator.

    Raises ValueError, from the constructor, for options that the estimator does not take or lacks.
    """

    def __init__(
        self, config: JobConfig, preset: Preset, shaper: RewardShaper, ranks: DataRanks
    ) -> None:
        self.algorithm, self.preset = config.algorithm, preset
        self.shaper, self.ranks = shaper, ranks
        self.estimator = advantages.ESTIMATORS.get(preset.estimator)
        self.needs_values = advantages.needs_values(preset.estimator)
        settings = {**config.algorithm.model_dump(), "values": None}
        options_of(self.estimator, settings, config.algorithm.advantage_options, 1)
        taken = inspect.signature(self.estimator).parameters
        set_names = [name for name in ("gamma", "lambd") if is_set(config, name)]
        idle = [(name, "does not take it", name) for name in set_names if name not in taken]
        if not self.needs_values:
            critics = [name for name in CRITIC_FIELDS if is_chosen(config, name)]
            idle += [(name, "needs no critic", "values") for name in critics]
        for name, why, parameter in idle:
            raise ValueError(
                f"{name} has no effect: {config.algorithm.advantage_estimator} {why}; leave it "
                f"out, or give the function a parameter {parameter}"
            )

    def add(
        self, batch: RolloutBatch, kl_coef: float, split_groups: bool
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """The batch with advantages and returns, and metrics of the shaping.

        Statistics span all ranks; fillers do not count. With `split_groups` the samples of a group
        may be on several ranks, which then look at all samples.
        """
        algorithm, preset = self.algorithm, self.preset
        counted = counted_rows(batch)
        rewards, metrics = self.shaper.shape(counted.rewards, self.ranks.sum_tensor)
        in_reward = preset.kl_placement == "reward" and batch.ref_logprobs is not None
        parts: dict[str, Any] = {
            "rewards": rewards,
            "group": counted.group,
            "mask": counted.mask,
            "old_logprobs": counted.old_logprobs if in_reward else None,
            "ref_logprobs": counted.ref_logprobs if in_reward else None,
            "values": counted.old_values,
        }
        mine = slice(None)
        if split_groups:  # the estimator needs whole groups
            parts, mine = gather_rows(parts, self.ranks)
        measured = {"values": parts.pop("values"), "init_kl_coef": kl_coef}
        settings = {**algorithm.model_dump(), **measured}
        result = advantages.compute(
            preset.estimator,
            **parts,
            **options_of(advantages.compute, settings, {}, 4),
            reduce=(lambda tensor: tensor) if split_groups else self.ranks.sum_tensor,
            **options_of(self.estimator, settings, algorithm.advantage_options, 1),
        )
        found: dict[str, Any] = {}
        for name, values in (("advantages", result.advantages), ("returns", result.returns)):
            found[name] = torch.zeros_like(batch.rollout_logprobs)
            rows = slice(None) if batch.filler is None else ~batch.filler
            found[name][rows] = values[mine, : batch.mask.shape[1]]
        some = any_rank(bool((found["advantages"] * batch.mask).any()), "advantages")
        metrics |= {} if some else {"advantages/all_zero": 1.0}
        return replace(batch, **found), metrics | result.metrics
