"""DeepSpeed's learning-rate schedules: the rate at an optimizer step, by its number.

Steps count from -1, before the first one is over; `base_lr` is the optimizer's own learning rate.
Options have DeepSpeed's names and defaults (deepspeed/runtime/lr_schedules.py).
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any

from torch.optim import Optimizer


@dataclass(kw_only=True)
class WarmupLR:
    """Rises to `warmup_max_lr` (None: the optimizer's) and stays there."""

    warmup_min_lr: float = 0.0
    warmup_max_lr: float | None = None
    warmup_num_steps: int = 1000
    warmup_type: str = "log"

    def __call__(self, step: int, base_lr: float) -> float:
        top = base_lr if self.warmup_max_lr is None else self.warmup_max_lr
        share = _risen(step, self.warmup_num_steps, self.warmup_type) * self.left(step)
        return self.warmup_min_lr + (top - self.warmup_min_lr) * share

    def left(self, step: int) -> float:
        """What is left of the peak."""
        return 1.0


@dataclass(kw_only=True)
class WarmupDecayLR(WarmupLR):
    """Rises to `warmup_max_lr`, then falls to `warmup_min_lr` along a line."""

    total_num_steps: int
    warmup_max_lr: float | None = 0.001

    def left(self, step: int) -> float:
        total, rising = self.total_num_steps, max(2, self.warmup_num_steps)
        return 1.0 if step < rising else max(0.0, (total - step) / max(1.0, total - rising))


@dataclass(kw_only=True)
class WarmupCosineLR:
    """Rises to the optimizer's rate, then falls to `cos_min_ratio` of it along a cosine."""

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    warmup_num_steps: int = 1000
    cos_min_ratio: float = 0.0001
    warmup_type: str = "log"

    def __call__(self, step: int, base_lr: float) -> float:
        steps = max(2, self.warmup_num_steps)
        if step < 0:
            return 0.0
        if step < steps:
            low, share = self.warmup_min_ratio, _risen(step, steps, self.warmup_type)
        else:
            progress = min(1.0, (step - steps + 1) / max(1, self.total_num_steps - steps))
            low, share = self.cos_min_ratio, (1 + math.cos(math.pi * progress)) / 2
        return base_lr * (low + (1 - low) * share)


def _risen(step: int, steps: int, kind: str) -> float:
    """From 0 to 1 over `steps` steps, along a logarithm or a line."""
    steps = max(2, steps)
    if not 0 <= step < steps:
        return float(step > 0)
    return math.log(step + 1) / math.log(steps) if kind == "log" else step / steps


SCHEDULES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Raises ValueError for options that schedule `kind` has not, and for missing ones."""
    valid = {field.name: field.default for field in fields(SCHEDULES[kind])}
    for name in options:
        if name != "last_batch_iteration" and name not in valid:
            near = get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else "valid: " + ", ".join(valid)
            raise ValueError(f"scheduler.params.{name} is no option of {kind}; {hint}")
    for name, default in valid.items():
        if default is MISSING and options.get(name) is None:
            raise ValueError(f'scheduler {kind} needs scheduler.params.{name}; "auto" has no value')


def maker(kind: str) -> Callable[..., "Schedule"]:
    """What DeepSpeed calls `kind`: a function of the optimizer and the schedule's options.

    By position, they come in the order of DeepSpeed's signature.
    """
    names = sorted((f.name for f in fields(SCHEDULES[kind])), key=lambda n: n != "total_num_steps")

    def make(optimizer: Optimizer, *values: Any, **options: Any) -> Schedule:
        options |= zip((*names, "last_batch_iteration"), values, strict=False)
        check_options(kind, options)
        return Schedule(optimizer, kind, options)

    return make


class Schedule:
    """A schedule of `SCHEDULES` that sets the learning rate of every parameter group.

    An option may be a list with a value for each group. As in DeepSpeed, the first two optimizer
    steps of a warm-up have its lowest learning rate.
    """

    def __init__(self, optimizer: Optimizer, kind: str, options: dict[str, Any]) -> None:
        options = dict(options)
        self.optimizer = optimizer
        self.last_batch_iteration = int(options.pop("last_batch_iteration", -1))
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        count = len(self.base_lrs)
        for name, value in options.items():
            if not isinstance(value, list | tuple):
                options[name] = [value] * count
            elif len(value) != count:
                raise ValueError(
                    f"scheduler.params.{name} = {value} must be one value, or one for each of the "
                    f"{count} parameter groups"
                )
        self.rules = [
            SCHEDULES[kind](**{name: values[index] for name, values in options.items()})
            for index in range(count)
        ]
        self.step(self.last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The learning rate of every group now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    get_last_lr = get_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Goes on by one optimizer step, or to the given one."""
        if (step := last_batch_iteration) is None:
            step = self.last_batch_iteration + 1
        self.last_batch_iteration = step
        groups = zip(self.optimizer.param_groups, self.base_lrs, self.rules, strict=True)
        for group, base_lr, rule in groups:
            group["lr"] = rule(step, base_lr)

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The learning rates come with the optimizer's state, as in DeepSpeed."""
        self.last_batch_iteration = state_dict["last_batch_iteration"]
