"""DeepSpeed's `initialize` and engine, on FSDP2: `from torchrft import deepspeed`.

ZeRO stages (arXiv:1910.02054) become the equivalent sharding, see `zero.py`; what becomes of every
key of the configuration is in `deepspeed/keys.toml`. No code of DeepSpeed is used or needed.

>>> engine, optimizer, _, _ = initialize(model=model, config="ds.json")      # doctest: +SKIP
>>> for batch in data:                                                       # doctest: +SKIP
...     engine.backward(loss(engine(batch)))
...     engine.step()
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchrft.deepspeed import checkpointing, comm, modules, utils, zero
from torchrft.deepspeed.accelerator import get_accelerator
from torchrft.deepspeed.adam import adam_of
from torchrft.deepspeed.comm import init_distributed
from torchrft.deepspeed.config import DeepSpeedConfigError, Settings, read
from torchrft.deepspeed.engine import DeepSpeedEngine
from torchrft.deepspeed.keys import KEYS
from torchrft.deepspeed.schedules import Schedule, check_options
from torchrft.deepspeed.utils import log_dist
from torchrft.deepspeed.whole import shard_of
from torchrft.parallel.fsdp import check_shardable
from torchrft.tools import distributed
from torchrft.tools.logging import logger, setup_logging

__all__ = [
    "DeepSpeedConfigError",
    "DeepSpeedEngine",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "log_dist",
    "utils",
    "zero",
]

Config = Mapping[str, Any] | str | Path
Groups = list[dict[str, Any]]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Config | None = None,
    mesh_param: Any = None,
    config_params: Config | None = None,
) -> tuple[DeepSpeedEngine, torch.optim.Optimizer | None, DataLoader[Any] | None, Any]:
    """(engine, optimizer, data loader, schedule), as `deepspeed.initialize`.

    `model` is sharded in place, with rank 0's weights. An optimizer is the config's, or yours: an
    instance without state, or a function of the parameters. `lr_scheduler` is an object or a
    function of the optimizer. Raises ValueError, before the model is touched, for a config that
    `deepspeed_config.read` refuses, what is missing, scalar parameters or a second call.
    """
    configs = [config, config_params, getattr(args, "deepspeed_config", None)]
    chosen = [given for given in configs if given is not None]
    if model is None or len(chosen) != 1:
        raise ValueError("initialize needs model=... and one of config=... and --deepspeed_config")
    if mpu is not None or mesh_param is not None:
        raise ValueError("mpu and mesh_param are not supported: use torchrft.parallel.parallelize")
    world = distributed.setup()
    if not logger.hasHandlers():  # a script that set up none would not see a line
        setup_logging(world.rank)
    settings = read(chosen[0], world.world_size)
    check_shardable(model)
    own = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else None
    groups = _named_groups(model, model_parameters if own is None else own)
    _check(settings, optimizer, lr_scheduler)
    if optimizer is None:
        _check_auto(settings, groups, lr_scheduler is None)
    engine = DeepSpeedEngine(model, settings, world.device)
    for group in groups:
        group["params"] = [shard_of(model.get_parameter(name)) for name in group["params"]]
    engine.adopt(_make_optimizer(settings, optimizer, groups))
    engine.lr_scheduler = _make_schedule(settings, lr_scheduler, engine.optimizer)
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --deepspeed, for the script to look at, and --deepspeed_config, for `initialize`."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="for the script to look at")
    group.add_argument("--deepspeed_config", help="JSON file that initialize(args=...) reads")
    return parser


def _named_groups(model: nn.Module, given: Iterable[Any] | None) -> Groups:
    """Parameter groups, with names in place of the parameters, which sharding replaces."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    items: list[Any] = list(trained if given is None else given)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    named = []
    for group in groups:
        held = group["params"]
        parameters = [held] if isinstance(held, Tensor) else list(held)
        for parameter in parameters:
            if id(parameter) not in names:
                what = tuple(getattr(parameter, "shape", ())) or repr(parameter)
                raise ValueError(
                    f"initialize was given a parameter {what} that is not the model's: pass those "
                    "of the very model"
                )
        named.append({**group, "params": [names[id(parameter)] for parameter in parameters]})
    return named


def _check(settings: Settings, optimizer: Any, lr_scheduler: Any) -> None:
    """Refuses what could not be made, and says what is not looked at."""
    if isinstance(optimizer, torch.optim.Optimizer) and optimizer.state:
        raise ValueError("initialize needs an optimizer that has not made a step yet")
    configured = settings.get("optimizer.type") is not None
    if configured and optimizer is not None:
        logger.info("the section optimizer has no effect beside initialize(optimizer=...)")
    kind = settings.get("scheduler.type")
    if kind is not None and lr_scheduler is not None:
        logger.info("the section scheduler has no effect beside initialize(lr_scheduler=...)")
    elif kind is not None:
        check_options(kind, settings.judged.section("scheduler.params"))
        if optimizer is None and not configured:
            raise ValueError(f'scheduler.type = "{kind}" needs an optimizer')


def _check_auto(settings: Settings, groups: Groups, scheduled: bool) -> None:
    """Refuses "auto" where neither the parameter groups nor the section scheduler have a value."""
    known = set(groups[0]).intersection(*groups[1:])
    if scheduled and "warmup_max_lr" in settings.judged.section("scheduler.params"):
        known.add("lr")
    for name, value in settings.judged.values.items():
        option = name.removeprefix("optimizer.params.")
        mapped = option != name and KEYS[name].disposition == "mapped"
        if value == "auto" and mapped and option not in known:
            raise ValueError(
                f'DeepSpeed key {name} = "auto" has no value: set one here or in every group of '
                "model_parameters, or leave it out for the default"
            )


def _make_optimizer(settings: Settings, given: Any, groups: Groups) -> Any:
    """The given optimizer on the sharded parameters, or the config's."""
    if isinstance(given, torch.optim.Optimizer):
        for group, sharded in zip(given.param_groups, groups, strict=True):
            group["params"] = sharded["params"]
        return given
    # A function gets what it would have got: parameters, or groups of them.
    plain = groups[0]["params"] if len(groups) == 1 and len(groups[0]) == 1 else groups
    if given is not None:
        return given(plain)
    kind = settings.get("optimizer.type")
    if kind is None:
        return None
    options = settings.judged.section("optimizer.params")
    return adam_of(options, kind.lower() == "adamw")(plain)


def _make_schedule(settings: Settings, given: Any, optimizer: Any) -> Any:
    """The given schedule, or the config's."""
    if given is not None:
        return given(optimizer) if callable(given) else given
    kind = settings.get("scheduler.type")
    if kind is None:
        return None
    return Schedule(optimizer, kind, settings.judged.section("scheduler.params"))


modules.register(__name__)
