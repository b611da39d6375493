"""A DeepSpeed configuration, checked key by key, as settings of this package."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrft.deepspeed.json_config import Judged, read_json
from torchrft.parallel.mesh import ParallelDims
from torchrft.parallel.zero import Sharding, stage
from torchrft.tools.logging import logger


class DeepSpeedConfigError(ValueError):
    """What scripts catch; `read` raises ValueErrors of this kind."""


@dataclass
class Settings:
    """What `read` makes of a configuration."""

    judged: Judged
    train_batch_size: int
    micro_batch_size: int
    accumulation: int
    sharding: Sharding
    dims: ParallelDims

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; the default where it is "auto" or not set."""
        return self.judged.get(name, default)


def read(config: Mapping[str, Any] | str | Path, world_size: int) -> Settings:
    """Checks a configuration, a dict or a JSON file, for `world_size` data-parallel ranks.

    Raises ValueError for what `read_json` refuses, and sizes that do not fit the ranks.
    """
    try:
        judged = read_json(config)
        settings = Settings(judged, *_batches(judged, world_size), *_zero(judged, world_size))
    except ValueError as error:
        raise DeepSpeedConfigError(str(error)) from error
    for note in judged.notes:
        logger.info(note)
    return settings


def offloads(settings: Settings) -> bool:
    """Whether parameters, gradients and optimizer state live in host memory."""
    zero = settings.judged.section("zero_optimization")
    devices = [zero.get(f"{name}.device") for name in ("offload_optimizer", "offload_param")]
    return "cpu" in devices or any(zero.get(k) for k in ("cpu_offload", "cpu_offload_param"))


def _batches(judged: Judged, world_size: int) -> tuple[int, int, int]:
    """The three sizes, of which each may follow from the others."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (judged.get(name) for name in names)
    if total is None and micro is None:
        raise ValueError(f"DeepSpeed config: set {names[0]} or {names[1]}")
    given = {names[1]: micro, names[2]: steps}
    divisors = [f"{name} = {value}" for name, value in given.items() if value is not None]
    divisor = math.prod(value for value in given.values() if value is not None) * world_size
    if total is not None and None in given.values() and total % divisor:
        factors = " x ".join([*divisors, f"{world_size} ranks"])
        raise ValueError(f"train_batch_size = {total} must be a multiple of {factors}")
    if steps is None:
        steps = total // (micro * world_size) if total and micro else 1
    micro = total // (steps * world_size) if micro is None else micro
    product = micro * steps * world_size
    if total not in (None, product):
        raise ValueError(
            f"train_batch_size = {total} must be train_micro_batch_size_per_gpu x "
            f"gradient_accumulation_steps x ranks = {micro} x {steps} x {world_size} = {product}"
        )
    return product, micro, steps


def _zero(judged: Judged, world_size: int) -> tuple[Sharding, ParallelDims]:
    number = judged.get("zero_optimization.stage", 0)
    size = 1 if number == 0 else world_size
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        size = asked if (asked := judged.get(f"zero_optimization.{key}", 1)) > 1 else size
        if world_size % size:
            raise ValueError(f"zero_optimization.{key} = {size} must divide the {world_size} ranks")
    if number == 3 and judged.get("gradient_allreduce_op") == "sum":
        raise ValueError(
            'gradient_allreduce_op = "sum" does not go with ZeRO stage 3, as in DeepSpeed; use '
            '"mean", or a lower stage'
        )
    return stage(number), ParallelDims(dp_replicate=world_size // size, dp_shard=size)
