"""DeepSpeed's learning-rate schedules, as functions of the number of the step.

`step` counts optimizer steps and is -1 before the first one is over; `base_lr` is the optimizer's
own learning rate. Options have DeepSpeed's names and defaults (deepspeed/runtime/lr_schedules.py).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch


def _rise(step: int, steps: int, kind: str) -> float:
    """From 0 to 1 over `steps` steps, along a logarithm or a line."""
    if kind not in ("log", "linear"):
        raise ValueError(f'warmup_type = {kind!r} must be "log" or "linear"')
    return math.log(step + 1) / math.log(steps) if kind == "log" else step / steps


def warmup_lr(
    step: int,
    base_lr: float,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float | None = None,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> float:
    """Rises to `warmup_max_lr` (None: the optimizer's) and stays there."""
    top = base_lr if warmup_max_lr is None else warmup_max_lr
    steps = max(2, warmup_num_steps)
    share = 0.0 if step < 0 else 1.0 if step >= steps else _rise(step, steps, warmup_type)
    return warmup_min_lr + (top - warmup_min_lr) * share


def warmup_decay_lr(
    step: int,
    base_lr: float,
    total_num_steps: int,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float | None = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> float:
    """Rises to `warmup_max_lr`, then falls to `warmup_min_lr` along a line."""
    steps = max(2, warmup_num_steps)
    if step < steps:
        return warmup_lr(step, base_lr, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)
    top = base_lr if warmup_max_lr is None else warmup_max_lr
    share = max(0.0, (total_num_steps - step) / max(1.0, total_num_steps - steps))
    return warmup_min_lr + (top - warmup_min_lr) * share


def warmup_cosine_lr(
    step: int,
    base_lr: float,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
) -> float:
    """Rises to the optimizer's rate, then falls to `cos_min_ratio` of it along a cosine."""
    steps = max(2, warmup_num_steps)
    if step < 0:
        return 0.0
    if step < steps:
        share = _rise(step, steps, warmup_type)
        return base_lr * (warmup_min_ratio + share * (1 - warmup_min_ratio))
    progress = min(1.0, (step - steps + 1) / max(1, total_num_steps - steps))
    return base_lr * (cos_min_ratio + (1 - cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def lr_range_test(
    step: int,
    base_lr: float,
    lr_range_test_min_lr: float = 1e-3,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
) -> float:
    """Rises from `lr_range_test_min_lr` without end (arXiv:1803.09820)."""
    interval = (step + 1) / lr_range_test_step_size
    interval = math.floor(interval) if lr_range_test_staircase else interval
    return lr_range_test_min_lr * (1 + lr_range_test_step_rate * interval)


def _cycle(step: int, first: float, second: float, stairs: tuple[int, int]) -> float:
    """0 at the ends of a cycle of first + second steps and 1 at its peak."""
    place = step % (first + second)
    rising = place <= first
    share = place / first if rising else (first + second - place) / second
    count = stairs[0] if rising else stairs[1]
    return math.floor(share * count + 1e-9) / count if count else share


def one_cycle(
    step: int,
    base_lr: float,
    cycle_min_lr: float,
    cycle_max_lr: float,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
    cycle_momentum: bool = True,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
) -> tuple[float, float | None]:
    """One cycle from `cycle_min_lr` to `cycle_max_lr` and back, then a decay (arXiv:1803.09820).

    Returns the learning rate and, with `cycle_momentum`, the first beta, which goes the other way.
    """
    first = cycle_first_step_size
    second = first if cycle_second_step_size is None else cycle_second_step_size
    falling = (
        cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
    )
    if step < 0:
        return cycle_min_lr, cycle_min_mom if cycle_momentum else None
    if step < first + second:
        share = _cycle(step + 1, first, second, (cycle_first_stair_count, falling))
        lr = cycle_min_lr + (cycle_max_lr - cycle_min_lr) * share
        momentum = cycle_max_mom - (cycle_max_mom - cycle_min_mom) * share
    else:
        interval = (step - first - second + 1) / decay_step_size if decay_step_size else 0.0
        lr = cycle_min_lr / (1 + decay_lr_rate * interval)
        momentum = cycle_max_mom * (1 + decay_mom_rate * interval)
    return lr, momentum if cycle_momentum else None


SCHEDULES: dict[str, Callable[..., float | tuple[float, float | None]]] = {
    "WarmupLR": warmup_lr,
    "WarmupDecayLR": warmup_decay_lr,
    "WarmupCosineLR": warmup_cosine_lr,
    "OneCycle": one_cycle,
    "LRRangeTest": lr_range_test,
}


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Raises ValueError for options that schedule `kind` has not, and for missing ones."""
    _, _, *parameters = inspect.signature(SCHEDULES[kind]).parameters.values()
    valid = {parameter.name: parameter for parameter in parameters}
    for name in options:
        if name != "last_batch_iteration" and name not in valid:
            near = get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else "valid: " + ", ".join(valid)
            raise ValueError(f"scheduler.params.{name} is no option of {kind}; {hint}")
    for name, parameter in valid.items():
        if parameter.default is inspect.Parameter.empty and options.get(name) is None:
            raise ValueError(f'scheduler {kind} needs scheduler.params.{name}; "auto" has no value')


class Schedule:
    """A schedule of `SCHEDULES` that sets the learning rate of every parameter group.

    An option may be a list with a value for each group. As in DeepSpeed, the first two optimizer
    steps of a warm-up have its lowest learning rate.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, kind: str, options: dict[str, Any]
    ) -> None:
        check_options(kind, options)
        self.optimizer, self.kind = optimizer, kind
        self.last_batch_iteration = int(options.get("last_batch_iteration", -1))
        groups = range(len(optimizer.param_groups))
        for name, value in options.items():
            if isinstance(value, list | tuple) and len(value) != len(groups):
                raise ValueError(
                    f"scheduler.params.{name} = {value} must be one value, or one for each of the "
                    f"{len(groups)} parameter groups"
                )
        self.options = [
            {
                name: value[index] if isinstance(value, list | tuple) else value
                for name, value in options.items()
                if name != "last_batch_iteration"
            }
            for index in groups
        ]
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._apply()

    def get_lr(self) -> list[float]:
        """The learning rate of every group now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    get_last_lr = get_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Goes on by one optimizer step, or to the given one."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = (
            following if last_batch_iteration is None else last_batch_iteration
        )
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        self._apply()

    def _apply(self) -> None:
        rule = SCHEDULES[self.kind]
        groups = zip(self.optimizer.param_groups, self.base_lrs, self.options, strict=True)
        for group, base_lr, options in groups:
            found = rule(self.last_batch_iteration, base_lr, **options)
            lr, momentum = found if isinstance(found, tuple) else (found, None)
            group["lr"] = lr
            if momentum is not None:
                group["betas"] = (momentum, 0.99)
