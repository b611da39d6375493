"""A DeepSpeed JSON as fields of a run: what each mapped key is called in torchrft."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torchrft.config.fields import show
from torchrft.config.flags import Draft
from torchrft.config.job import job_of
from torchrft.config.job_config import JobConfig
from torchrft.config.manager import Filled
from torchrft.deepspeed.json_config import Judged, read_json
from torchrft.deepspeed.keys import TRAINER

_ZERO = "zero_optimization."
_ADAM = "optimizer.params."
_RATE = "scheduler.params."

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
    offloads_all = values.get(f"{_ZERO}cpu_offload_param")
    offloads_all = offloads_all or values.get(f"{_ZERO}offload_param.device") == "cpu"
    for name, field in TRAINER["fields"].items():
        value = said = values.get(name)
        if said is None or field == "lr_decay":
            continue
        if name.endswith(".device"):
            value = said == "cpu"
        if field == "adam_offload" and value and offloads_all:
            continue  # fsdp_cpu_offload moves the optimizer's state as well
        if field == "zero_stage" and value == 0:
            raise _refusal(name, 0, "use 1, 2 or 3, or dp_replicate")
        if field == "dp_shard":
            if said <= 1:
                continue
            if ranks is not None and ranks % said == 0:
                yield Wanted("dp_replicate", ranks // said, f"{name} = {said} on {ranks} ranks")
        yield Wanted(field, value, f"{name} = {show(said)}")
    if values.get(f"{_ADAM}torch_adam") and f"{_ADAM}weight_decay" not in judged.values:
        yield Wanted("l2", 0.01, f"{_ADAM}torch_adam = true")
    if any(value for name, value in values.items() if name.startswith("activation_checkpointing.")):
        yield Wanted("gradient_checkpointing", True, "the section activation_checkpointing")
    yield from _schedule(values)


def _refusal(name: str, value: Any, remedy: str) -> ValueError:
    key = f"DeepSpeed key {name} = {show(value)}"
    return ValueError(f"{key} is not supported by the trainer: {remedy}")


def _schedule(values: dict[str, Any]) -> Iterator[Wanted]:
    kind = values.get("scheduler.type")
    if kind is None:
        return
    if f"{_RATE}warmup_type" not in values:
        raise _refusal(f"{_RATE}warmup_type", "log", 'its default is "log", so write "linear"')
    key = f'scheduler.type = "{kind}"'
    yield Wanted("lr_decay", _DECAYS[kind], key)
    if kind == "WarmupDecayLR":
        yield Wanted("lr_min_ratio", 0.0, key)
    elif kind == "WarmupCosineLR" and f"{_RATE}cos_min_ratio" not in values:
        yield Wanted("lr_min_ratio", 0.0001, key)


def fill(path: str, draft: Draft, ranks: int | None) -> Filled:
    """Fills the fields that nobody has set from a JSON file; one set to something else is a fault.

    For `ranks` data-parallel ranks (None: not known). Raises ValueError, in one sentence, for a
    file that cannot be used.
    """
    judged = read_json(path)
    for field, value, key in list(wanted(judged, ranks)):
        at = f"{path}: {key}"
        held = draft.put(field, value, at)
        if (list(held) if isinstance(held, tuple) else held) != value:
            remedy = 'make them equal, or write "auto" in the JSON'
            draft.faults.append(f"{draft.origins[field]} and {at} differ; {remedy}")
    return Filled(judged.notes, partial(accumulation_fault, judged))


def accumulation_fault(judged: Judged, config: JobConfig, world_size: int) -> list[str]:
    """Whether gradient_accumulation_steps is what follows from the batch sizes."""
    steps, dp = judged.get("gradient_accumulation_steps"), job_of(config, world_size).dp or 1
    batch, micro = config.training.train_batch_size, config.training.micro_train_batch_size
    if steps is None or batch == micro * steps * dp:
        return []
    return [
        f"{config.parallel.deepspeed_config}: gradient_accumulation_steps = {steps} must be "
        f"train_batch_size / (micro_train_batch_size x dp) = {batch} / ({micro} x {dp}) = "
        f'{batch / (micro * dp):g}; change one of them, or write "auto"'
    ]
