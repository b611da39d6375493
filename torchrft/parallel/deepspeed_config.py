"""A DeepSpeed configuration, checked key by key, as settings of this package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torchrft.parallel.deepspeed_keys import KEYS, SECTIONS
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

    Raises ValueError for an unknown key, a key that is refused, and batch sizes that do not add up.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        if not path.is_file():
            raise ValueError(f"DeepSpeed config {path} is not a file")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"DeepSpeed config {path} is no JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError("a DeepSpeed config is a JSON object")
    values = dict(_walk(config, ""))
    for name, value in values.items():
        key = KEYS[name]
        if key.disposition == "refused" and not key.asks_nothing(value):
            raise ValueError(f"DeepSpeed key {name} = {value!r} is not supported: {key.reason}")
        if key.disposition == "meaningless":
            logger.info("DeepSpeed key %s has no effect: %s", name, key.reason)
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


def _walk(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = prefix + key
        if name in SECTIONS and isinstance(value, Mapping):
            yield from _walk(value, name + ".")
        elif name in KEYS:
            yield name, value
        elif name not in SECTIONS or value is not None:
            near = get_close_matches(name, [*KEYS, *SECTIONS], n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ValueError(f'DeepSpeed has no key "{name}"{hint}')


def _batches(settings: Settings, world_size: int) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (settings.get(name) for name in names)
    for name, value in zip(names, (total, micro, steps), strict=True):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"DeepSpeed key {name} = {value!r} must be an integer above 0")
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
    if number not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage = {number!r} must be 0, 1, 2 or 3")
    settings.sharding = stage(number)
    size = 1 if number == 0 else world_size
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        asked = settings.get(f"zero_optimization.{key}", -1)
        if number == 3 and asked > 1:
            size = asked
    if world_size % size:
        raise ValueError(f"shards over {size} ranks do not divide {world_size} ranks")
    settings.dims = ParallelDims(dp_replicate=world_size // size, dp_shard=size)
    for section in ("offload_optimizer", "offload_param"):
        device = settings.get(f"zero_optimization.{section}.device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(
                f'zero_optimization.{section}.device = "{device}" is not supported: use "cpu"'
            )
