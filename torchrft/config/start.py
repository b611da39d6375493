"""What a run decides and says at its start: its precision, its schedule, its sampling."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torchrft.config.fields import is_set, label
from torchrft.config.job import job_of
from torchrft.config.job_config import JobConfig, Optimizer
from torchrft.config.needs import is_chosen

# What Linux calls the instructions, on x86 and on ARM.
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


@cache
def lacks_bf16() -> bool:
    """Whether this machine computes on a CPU without bfloat16 instructions, as far as it shows."""
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and _BF16 & set(cpu.read_text().split()):
        return False
    import torch  # here, since help and faults must not wait for it

    return not torch.cuda.is_available()


def with_precision(config: JobConfig, lacks: Callable[[], bool]) -> JobConfig:
    """The config with `bf16`, if unset, as it is here: false where the CPU `lacks` instructions for
    it, unless an option needs it."""
    needed = any(is_chosen(config, name) for name in ("bf16", "use_mp_opt", "fp32_head"))
    if needed or not config.training.bf16 or not lacks():
        return config
    training = config.training.model_copy(update={"bf16": False})
    training.model_fields_set.discard("bf16")  # it stays unset
    return config.model_copy(update={"training": training})


def lr_factor(step: int, total_steps: int, config: Optimizer) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total_steps`.

    Rises linearly to 1 over the first ceil(lr_warmup_ratio * total_steps) steps, then follows
    `lr_decay` down to `lr_min_ratio`, where it stays.
    """
    warmup = math.ceil(config.lr_warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_decay == "constant":
        return 1.0
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    shape = 1 - progress if config.lr_decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * shape


def optimizer_steps(config: JobConfig, rollouts: int) -> int:
    """Optimizer steps of so many rollouts, at least one."""
    samples = rollouts * config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
    return max(1, -(-samples * config.training.max_epochs // config.training.train_batch_size))


def start_notes(config: JobConfig, prompts: int | None, lacks: bool) -> list[str]:
    """What a user should know before the first step; `prompts` is their number, if known, and
    `lacks` whether a machine of the job lacks bfloat16 instructions."""
    notes, why, bf16 = [], "the CPU has no bfloat16 instructions", config.training.bf16
    if bf16 and lacks:
        notes.append(f"[training] bf16 = true is slow here, about tenfold: {why}; try bf16 = false")
    elif not bf16 and not is_set(config, "bf16"):
        notes.append(f"[training] bf16 = false: left unset, and {why}")
    if job_of(config).truncates and not config.rollout.truncation_replay:
        notes.append(
            f"{label(config, 'top_p' if config.rollout.top_p < 1 else 'top_k')} truncates what is "
            "sampled, but training takes log-probs over all tokens, which biases gradient and "
            'ratios: set truncation_replay = true (engine_type = "native"), or top_p = 1, top_k = 0'
        )
    return notes if prompts is None else notes + _schedule_notes(config, prompts)


def _schedule_notes(config: JobConfig, prompts: int) -> list[str]:
    """Says so where the run ends within the warm-up, or before half of the decay."""
    options, training = config.optimizer, config.training
    planned = -(-training.num_episodes * prompts // config.rollout.rollout_batch_size)
    span = options.lr_total_steps or optimizer_steps(config, planned)
    rollouts = min(training.max_steps or planned, planned) - training.freezing_actor_steps
    steps = optimizer_steps(config, max(rollouts, 0))
    warmup = math.ceil(options.lr_warmup_ratio * span)
    last = lr_factor(steps - 1, span, options)
    early = steps < min(warmup, span)
    chosen = options.lr_total_steps or options.lr_decay == "constant" or steps >= span
    if not early and (chosen or last <= (1 + options.lr_min_ratio) / 2):
        return []
    where = (
        f"in its warm-up of {warmup}" if early else f"above lr_min_ratio = {options.lr_min_ratio}"
    )
    name = "max_steps" if training.max_steps else "num_episodes"
    return [
        f"{label(config, name)} makes {steps} of the {span} optimizer steps of the learning rate's "
        f"schedule, which ends at {last:.0%} of its peak, {where}; lr_total_steps = {steps} fits it"
    ]


def jsonl_rows(config: JobConfig) -> int | None:
    """Prompts in a JSON-lines file of this machine; None where counting would take a loader."""
    path = Path(config.data.prompt_data or "")
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    return sum(1 for line in path.read_bytes().splitlines() if line.strip())
