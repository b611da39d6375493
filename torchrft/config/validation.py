"""Rules that join several fields. They judge, they never rewrite a value.

Every message writes out the fields and numbers it depends on. The manager relies on that: a
message that mentions a field whose own value is faulty is held back until that one is mended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torchrft.config.fields import is_set, label, show, value_of
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import NEEDS, is_chosen, kl_adapts, policy_loss


class Finding(NamedTuple):
    is_error: bool
    message: str


class Findings(NamedTuple):
    """What `check` found: errors stop the job, warnings are printed."""

    errors: list[str]
    warnings: list[str]


def check(config: JobConfig, world_size: int) -> Findings:
    """Judge a config for a job of `world_size` ranks."""
    found = [finding for rule in RULES for finding in rule(config, world_size)]
    return Findings(
        [finding.message for finding in found if finding.is_error],
        [finding.message for finding in found if not finding.is_error],
    )


def data_parallel(config: JobConfig, world_size: int) -> int:
    """Data-parallel ranks: those that work on different samples."""
    return world_size // (config.parallel.tp_size * config.parallel.sp_size)


def smallest_world_size(config: JobConfig) -> int:
    """The fewest ranks that the layout fits on."""
    parallel = config.parallel
    ranks = parallel.tp_size * parallel.sp_size * parallel.dp_replicate
    ranks *= max(parallel.dp_shard, 1)
    return math.lcm(ranks, config.rollout.engine_tp_size)


def _layout(config: JobConfig, world_size: int) -> Iterator[Finding]:
    parallel = config.parallel
    ranks = parallel.tp_size * parallel.sp_size * parallel.dp_replicate
    if world_size % ranks:
        yield Finding(
            True,
            f"[parallel] world_size = {world_size} must be a multiple of tp_size x sp_size x "
            f"dp_replicate = {parallel.tp_size} x {parallel.sp_size} x {parallel.dp_replicate} = "
            f"{ranks}; start a multiple of {ranks} ranks or lower one of the three",
        )
    elif parallel.dp_shard > 0 and world_size != ranks * parallel.dp_shard:
        yield Finding(
            True,
            f"{label(config, 'dp_shard')} must fill the job: tp_size x sp_size x dp_replicate x "
            f"dp_shard = {parallel.tp_size} x {parallel.sp_size} x {parallel.dp_replicate} x "
            f"{parallel.dp_shard} = {ranks * parallel.dp_shard}, but world_size = {world_size}; "
            f"use -1 or {world_size // ranks}",
        )
    tp_size = config.rollout.engine_tp_size
    if world_size % tp_size:
        yield Finding(
            True,
            f"{label(config, 'engine_tp_size')} must divide the world size: world_size % "
            f"engine_tp_size = {world_size} % {tp_size} = {world_size % tp_size}; use a divisor "
            f"of {world_size}",
        )


def _on_policy(config: JobConfig, world_size: int) -> Iterator[Finding]:
    prompts, n = config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt
    batch, samples = config.training.train_batch_size, prompts * n
    equation = f"rollout_batch_size x n_samples_per_prompt = {prompts} x {n} = {samples}"
    at = label(config, "train_batch_size")
    if batch > samples and batch % samples:
        yield Finding(
            True,
            f"{at} is above {equation}, so it must be a multiple of it, but {batch} % {samples} = "
            f"{batch % samples}; use {batch // samples * samples} or "
            f"{(batch // samples + 1) * samples}",
        )
    elif batch < samples and samples % batch:
        yield Finding(
            True,
            f"{at} is below {equation}, so it must divide it, but {samples} % {batch} = "
            f"{samples % batch}; use {samples} or a divisor of it",
        )
    elif batch < samples:
        epochs = config.training.max_epochs
        steps = epochs * samples // batch
        strict = config.training.strict_batch_rule
        yield Finding(
            strict,
            f"{at} is below {equation}: a rollout makes max_epochs x {samples} / {batch} = "
            f"{epochs} x {samples // batch} = {steps} optimizer steps, {steps - 1} of them "
            f"off-policy; "
            + ("strict_batch_rule = true demands at least " if strict else "on-policy from ")
            + str(samples),
        )


def _batches(config: JobConfig, world_size: int) -> Iterator[Finding]:
    parallel, training = config.parallel, config.training
    ranks = parallel.tp_size * parallel.sp_size
    if world_size % ranks:
        return  # _layout has said so; the sums below would only be wrong
    dp = world_size // ranks
    why = (
        f"dp = world_size / (tp_size x sp_size) = {world_size} / "
        f"({parallel.tp_size} x {parallel.sp_size}) = {dp}"
    )
    batch, micro = training.train_batch_size, training.micro_train_batch_size
    if rest := batch % (micro * dp):
        near = batch - rest or micro * dp
        yield Finding(
            True,
            f"{label(config, 'train_batch_size')} must be a multiple of micro_train_batch_size x "
            f"dp = {micro} x {dp} = {micro * dp} ({why}), but {batch} % {micro * dp} = {rest}; "
            f"use {near}" + (f" or {batch - rest + micro * dp}" if batch > rest else ""),
        )
    prompts = config.rollout.rollout_batch_size
    if rest := prompts % dp:
        yield Finding(
            True,
            f"{label(config, 'rollout_batch_size')} must be a multiple of dp ({why}), but "
            f"{prompts} % {dp} = {rest}; use {prompts - rest + dp}",
        )


def _lengths(config: JobConfig, world_size: int) -> Iterator[Finding]:
    data, rollout = config.data, config.rollout
    if is_set(config, "prompt_max_len") and data.prompt_max_len >= data.max_len:
        yield Finding(
            True,
            f"{label(config, 'prompt_max_len')} must be below max_len = {data.max_len}, or no "
            f"token is left for a response; use at most {data.max_len - 1}",
        )
    if data.max_len < 2:
        yield Finding(
            True,
            f"{label(config, 'max_len')} leaves no room for a prompt and a response; use 2 or more",
        )
    budget = min(data.max_len - 1, rollout.max_new_tokens or data.max_len)
    terms = f"min(max_len - 1, max_new_tokens) = {budget}"
    if rollout.min_new_tokens > budget:
        yield Finding(
            True,
            f"{label(config, 'min_new_tokens')} is above the longest response, {terms}; use "
            f"at most {budget}",
        )
    if rollout.max_new_tokens and rollout.max_new_tokens >= data.max_len:
        yield Finding(
            False,
            f"{label(config, 'max_new_tokens')} has no effect: max_len = {data.max_len} leaves "
            f"at most {data.max_len - 1} tokens; lower it or leave it out",
        )
    if config.reward.overlong_buffer_len > budget:
        yield Finding(
            True,
            f"{label(config, 'overlong_buffer_len')} is above the longest response, {terms}; use "
            f"at most {budget}",
        )
    tokens = config.training.max_tokens_per_microbatch
    if tokens is not None and tokens < data.max_len:
        yield Finding(
            True,
            f"{label(config, 'max_tokens_per_microbatch')} is below max_len = {data.max_len}, so "
            f"that a long sample fits nowhere; use at least {data.max_len}",
        )


def _rewards(config: JobConfig, world_size: int) -> Iterator[Finding]:
    for fault in config.reward.name_faults(config.reward.names(config.model.pretrain)):
        yield Finding(True, fault)


def _needs(config: JobConfig, world_size: int) -> Iterator[Finding]:
    for need in NEEDS:
        if is_chosen(config, need.field) and not need.met(config):
            yield Finding(
                need.is_error,
                f"{label(config, need.field)} has no effect without {need.needs}; set that, or "
                f"leave {need.field} out",
            )


def _combinations(config: JobConfig, world_size: int) -> Iterator[Finding]:
    algorithm = config.algorithm
    if config.parallel.fsdp and is_set(config, "zero_stage"):
        yield Finding(
            True,
            f"{label(config, 'zero_stage')} and fsdp = true exclude each other; leave one out",
        )
    if config.parallel.fsdp_cpu_offload and config.optimizer.adam_offload:
        yield Finding(
            True,
            f"{label(config, 'adam_offload')} moves what fsdp_cpu_offload = true keeps in host "
            "memory anyway; leave one out",
        )
    rollout = config.rollout
    if (
        rollout.async_level
        and is_set(config, "enable_engine_sleep")
        and rollout.enable_engine_sleep
    ):
        yield Finding(
            True,
            f"{label(config, 'enable_engine_sleep')} and async_level = 1 exclude each other: the "
            "servers generate while the trainer computes; leave one out",
        )
    if rollout.async_level and algorithm.rollout_correction == "none":
        yield Finding(
            False,
            f"{label(config, 'async_level')} trains on samples that are one policy version late; "
            'a rollout_correction, e.g. "token_tis", weighs them',
        )
    if algorithm.kl_controller == "adaptive" and not algorithm.init_kl_coef:
        yield Finding(
            True,
            f"{label(config, 'kl_controller')} cannot adapt init_kl_coef = 0.0, which stays "
            '0 under scaling; start above 0 or use "fixed"',
        )
    if algorithm.clip_range >= 1 and policy_loss(config) == "cpgd":
        yield Finding(
            True,
            f"{label(config, 'clip_range')} must be below 1 for the cpgd policy loss, which clips "
            "at log(1 - clip_range); use e.g. 0.2",
        )
    chooses_tokens = algorithm.high_entropy_token_ratio < 1 or algorithm.rollout_correction in (
        "token_tis",
        "token_mask",
    )
    if chooses_tokens and policy_loss(config) == "gmpo":
        yield Finding(
            True,
            f"{label(config, 'high_entropy_token_ratio')} and "
            f"{label(config, 'rollout_correction')}: tokens cannot be chosen or weighed in the "
            "gmpo policy loss, which is one number per sequence; use seq_tis or seq_mask",
        )
    if config.rollout.n_samples_per_prompt == 1:
        yield from _single_samples(config)
    rates = config.optimizer
    if algorithm.advantage_estimator == "gae" and (
        rates.actor_learning_rate > rates.critic_learning_rate
    ):
        yield Finding(
            False,
            f"{label(config, 'actor_learning_rate')} is above critic_learning_rate = "
            f"{rates.critic_learning_rate}; the critic usually learns faster: lower the first or "
            "raise the second",
        )


def _single_samples(config: JobConfig) -> Iterator[Finding]:
    if config.rollout.dynamic_sampling:
        yield Finding(
            True,
            f"{label(config, 'dynamic_sampling')} drops groups of equal rewards, which every group "
            f"of {label(config, 'n_samples_per_prompt')} is; use 2 or more samples",
        )
    estimator = config.algorithm.advantage_estimator
    if estimator in ("reinforce", "reinforce_plus_plus", "gae"):
        return
    yield Finding(
        estimator == "rloo",
        f"{label(config, 'n_samples_per_prompt')} gives advantage_estimator = {show(estimator)} no "
        "other sample to compare with"
        + ("" if estimator == "rloo" else ", so that every advantage is 0")
        + "; use 2 or more",
    )


def _ranges(config: JobConfig, world_size: int) -> Iterator[Finding]:
    for name, (low, high) in RANGES.items():
        value = value_of(config, name)
        if low <= value <= high or not _range_applies(config, name):
            continue
        yield Finding(
            False,
            f"{label(config, name)} is outside the usual range {low} to {high}; make sure that it "
            "is meant",
        )


def _range_applies(config: JobConfig, name: str) -> bool:
    if name == "init_kl_coef" and config.algorithm.init_kl_coef == 0:
        return False  # no KL term at all, which is common practice
    if name == "clip_range" and policy_loss(config) in ("gspo", "gmpo"):
        return False  # these clip sequence ratios (order 3e-4) and log ratios (order 0.4)
    return is_set(config, name) or (name == "kl_target" and kl_adapts(config))


def batch_arithmetic(config: JobConfig, world_size: int) -> list[str]:
    """The numbers that follow from the batch fields, a readable line each."""
    rollout, training = config.rollout, config.training
    prompts, n = rollout.rollout_batch_size, rollout.n_samples_per_prompt
    samples, batch, epochs = prompts * n, training.train_batch_size, training.max_epochs
    dp, micro = data_parallel(config, world_size), training.micro_train_batch_size
    lines = [
        f"samples per rollout = rollout_batch_size x n_samples_per_prompt = {prompts} x {n} = "
        f"{samples}",
        f"samples per rank and rollout = {samples} / dp = {samples} / {dp} = {samples // dp}",
    ]
    if batch > samples:
        lines.append(
            f"rollouts per optimizer step = train_batch_size / {samples} = {batch} / {samples} = "
            f"{batch // samples}, with max_epochs = {epochs}"
        )
    else:
        lines.append(
            f"optimizer steps per rollout = max_epochs x {samples} / train_batch_size = {epochs} x "
            f"{samples} / {batch} = {epochs * samples // batch}"
        )
    if training.packing_samples:
        budget = training.max_tokens_per_microbatch or micro * config.data.max_len
        lines.append(f"tokens per packed micro-batch <= {budget}, {batch // dp} samples per rank")
    else:
        lines.append(
            "micro-batches per optimizer step and rank = train_batch_size / "
            f"(micro_train_batch_size x dp) = {batch} / ({micro} x {dp}) = {batch // (micro * dp)}"
        )
    return lines


# The guide's "Range" of each field: outside it a set value is unusual, not wrong.
RANGES: dict[str, tuple[float, float]] = {
    "lr_warmup_ratio": (0.0, 0.1),
    "init_kl_coef": (0.0001, 0.01),
    "kl_target": (0.001, 0.01),
    "clip_range": (0.1, 0.3),
    "temperature": (0.6, 1.2),
    "top_p": (0.8, 1.0),
    "engine_mem_util": (0.3, 0.9),
}

RULES: tuple[Callable[[JobConfig, int], Iterator[Finding]], ...] = (
    _layout,
    _on_policy,
    _batches,
    _lengths,
    _rewards,
    _needs,
    _combinations,
    _ranges,
)
