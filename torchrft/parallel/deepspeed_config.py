"""A DeepSpeed configuration, checked key by key, as settings of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrft.config.deepspeed_json import read_json
from torchrft.parallel.mesh import ParallelDims
from torchrft.parallel.zero import Sharding, stage
from torchrft.tools.logging import logger


@dataclass
class Settings:
    """What `read` makes of a configuration."""

    train_batch_size: int
    micro_batch_size: int
    accumulation: int
    dims: ParallelDims
    sharding: Sharding
    values: dict[str, Any] = field(default_factory=dict)  # what was set, by dotted name

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; the default where it is "auto" or not set."""
        value = self.values.get(name)
        return default if value is None or value == "auto" else value

    def section(self, name: str) -> dict[str, Any]:
        """What was set below `name`, without "auto"."""
        start = name + "."
        below = {k.removeprefix(start): v for k, v in self.values.items() if k.startswith(start)}
        return {k: v for k, v in below.items() if v != "auto"}


def read(config: Mapping[str, Any] | str | Path, world_size: int) -> Settings:
    """Checks a configuration, a dict or a JSON file, for `world_size` data-parallel ranks.

    Raises ValueError for what `read_json` refuses, and sizes that do not fit the ranks.
    """
    values, notes = read_json(config)
    for note in notes:
        logger.info(note)
    settings = Settings(0, 0, 0, ParallelDims(), stage(0), values)
    _batches(settings, world_size)
    _zero(settings, world_size)
    return settings


def offloads(settings: Settings) -> bool:
    """Whether parameters, gradients and optimizer state live in host memory."""
    zero = "zero_optimization."
    devices = [
        settings.get(f"{zero}{section}.device")
        for section in ("offload_optimizer", "offload_param")
    ]
    switches = [settings.get(f"{zero}{name}") for name in ("cpu_offload", "cpu_offload_param")]
    return "cpu" in devices or any(switches)


def _batches(settings: Settings, world_size: int) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (settings.get(name) for name in names)
    if total is None and micro is None:
        raise ValueError(f"DeepSpeed config: set {names[0]} or {names[1]}")
    if total is None:
        steps = steps or 1
        total = micro * steps * world_size
    elif micro is None:
        steps = steps or 1
        micro = total // (steps * world_size)
    elif steps is None:
        steps = total // (micro * world_size)
    if micro * steps * world_size != total:
        raise ValueError(
            f"train_batch_size = {total} must be train_micro_batch_size_per_gpu x "
            f"gradient_accumulation_steps x ranks = {micro} x {steps} x {world_size} = "
            f"{micro * steps * world_size}"
        )
    settings.train_batch_size, settings.micro_batch_size = total, micro
    settings.accumulation = steps


def _zero(settings: Settings, world_size: int) -> None:
    number = settings.get("zero_optimization.stage", 0)
    settings.sharding = stage(number)
    size = 1 if number == 0 else world_size
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        size = asked if (asked := settings.get(f"zero_optimization.{key}", 1)) > 1 else size
    if world_size % size:
        raise ValueError(f"shards over {size} ranks do not divide {world_size} ranks")
    settings.dims = ParallelDims(dp_replicate=world_size // size, dp_shard=size)
