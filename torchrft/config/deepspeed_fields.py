"""A DeepSpeed JSON as fields of a run: what each mapped key is called in torchrft."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torchrft.config.deepspeed_json import Judged
from torchrft.config.deepspeed_keys import TRAINER
from torchrft.config.fields import FIELDS, show
from torchrft.config.job_config import JobConfig

_ZERO = "zero_optimization."
_ADAM = "optimizer.params."
_RATE = "scheduler.params."

FIELD_OF: dict[str, str] = TRAINER["fields"]

_DECAYS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


class Wanted(NamedTuple):
    """A field's value, and the key that asks for it as messages write it."""

    field: str
    value: Any
    key: str


def wanted(judged: Judged, ranks: int | None) -> Iterator[Wanted]:
    """What the JSON asks of fields, for `ranks` data-parallel ranks (None: not known).

    Raises ValueError, in one sentence, for what the trainer does not do.
    """
    values = {name: value for name, value in judged.values.items() if value != "auto"}
    for name, only in TRAINER["only"].items():
        if values.get(name, only["value"]) != only["value"]:
            raise _refusal(name, values[name], only["remedy"])
    all_offload = values.get(f"{_ZERO}offload_param.device") == "cpu"
    all_offload = all_offload or values.get(f"{_ZERO}cpu_offload_param", False)
    for name, field in FIELD_OF.items():
        if name in values and field not in ("lr_decay", "dp_shard"):
            value = values[name] == "cpu" if name.endswith(".device") else values[name]
            if field == "adam_offload" and value and all_offload:
                continue  # fsdp_cpu_offload moves the optimizer's state as well
            if field == "zero_stage" and value == 0:
                raise _refusal(name, 0, "use 1, 2 or 3, or dp_replicate")
            yield Wanted(field, value, f"{name} = {show(values[name])}")
    if values.get(f"{_ADAM}torch_adam") and f"{_ADAM}weight_decay" not in judged.values:
        yield Wanted("l2", 0.01, f"{_ADAM}torch_adam = true")
    if any(values[name] for name in values if name.startswith("activation_checkpointing.")):
        yield Wanted("gradient_checkpointing", True, "the section activation_checkpointing")
    yield from _layout(values, ranks)
    yield from _schedule(values)


def _refusal(name: str, value: Any, remedy: str) -> ValueError:
    key = f"DeepSpeed key {name} = {show(value)}"
    return ValueError(f"{key} is not supported by the trainer: {remedy}")


def _layout(values: dict[str, Any], ranks: int | None) -> Iterator[Wanted]:
    for name, field in FIELD_OF.items():
        size = values.get(name, 1)
        if field == "dp_shard" and size > 1:
            yield Wanted("dp_shard", size, f"{name} = {size}")
            if ranks is not None and ranks % size == 0:
                yield Wanted("dp_replicate", ranks // size, f"{name} = {size} on {ranks} ranks")


def _schedule(values: dict[str, Any]) -> Iterator[Wanted]:
    kind = values.get("scheduler.type")
    if kind is None:
        return
    if kind not in _DECAYS:
        raise _refusal("scheduler.type", kind, f"use {', '.join(_DECAYS)}")
    if f"{_RATE}warmup_type" not in values:
        raise _refusal(f"{_RATE}warmup_type", "log", 'its default is "log", so write "linear"')
    key = f'scheduler.type = "{kind}"'
    yield Wanted("lr_decay", _DECAYS[kind], key)
    if kind == "WarmupDecayLR":
        yield Wanted("lr_min_ratio", 0.0, key)
    elif kind == "WarmupCosineLR" and f"{_RATE}cos_min_ratio" not in values:
        yield Wanted("lr_min_ratio", 0.0001, key)


def merge(
    path: str, found: list[Wanted], values: dict[str, dict[str, Any]], origins: dict[str, str]
) -> list[str]:
    """Fills the fields that nobody has set, with their origins; returns a fault for each that is
    set to something else."""
    faults = []
    for field, value, key in found:
        table, at = values[FIELDS[field].section], f"{path}: {key}"
        if field not in table:
            table[field], origins[field] = value, at
        elif (list(v) if isinstance(v := table[field], tuple) else v) != value:
            faults.append(
                f'{origins[field]} and {at} differ; make them equal, or write "auto" in the JSON'
            )
    return faults


def accumulation_fault(judged: Judged, config: JobConfig, dp: int) -> list[str]:
    """Whether gradient_accumulation_steps is what follows from the batch sizes."""
    steps = judged.get("gradient_accumulation_steps")
    batch, micro = config.training.train_batch_size, config.training.micro_train_batch_size
    if steps is None or batch == micro * steps * dp:
        return []
    return [
        f"{config.parallel.deepspeed_config}: gradient_accumulation_steps = {steps} must be "
        f"train_batch_size / (micro_train_batch_size x dp) = {batch} / ({micro} x {dp}) = "
        f'{batch / (micro * dp):g}; change one of them, or write "auto"'
    ]
