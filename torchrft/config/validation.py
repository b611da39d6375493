"""Rules that join several fields. They judge, they never rewrite a value.

Every message writes out the fields and numbers it depends on. The manager relies on that: a
message that mentions a field whose own value is faulty is held back until that one is mended.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torchrft.config.fields import FIELDS, is_set, label, show, value_of
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import NEEDS, is_chosen, kl_adapts, policy_loss, sees_images
from torchrft.tools.credentials import check_url
from torchrft.tools.text import secret_option


class Finding(NamedTuple):
    """What is wrong, after the name of the field or section that it is about."""

    text: str
    is_error: bool = True


class Findings(NamedTuple):
    """What `check` found: errors stop the job, warnings are printed."""

    errors: list[str]
    warnings: list[str]


def check(config: JobConfig, world_size: int) -> Findings:
    """Judge a config for a job of `world_size` ranks."""
    findings = Findings([], [])
    for text, is_error in (finding for rule in RULES for finding in rule(config, world_size)):
        name, _, rest = text.partition(" ")
        at = label(config, name) if name in FIELDS else f"[{name}]"
        (findings.errors if is_error else findings.warnings).append(f"{at} {rest}")
    return findings


def data_parallel(config: JobConfig, world_size: int) -> int:
    """Data-parallel ranks: those that work on different samples."""
    return world_size // (config.parallel.tp_size * config.parallel.sp_size)


def smallest_world_size(config: JobConfig) -> int:
    """The fewest ranks that the layout fits on."""
    parallel = config.parallel
    ranks = parallel.tp_size * parallel.sp_size * parallel.dp_replicate * max(parallel.dp_shard, 1)
    return math.lcm(ranks, config.rollout.engine_tp_size)


def _layout(config: JobConfig, world_size: int) -> Iterator[Finding]:
    tp, sp, replicas = (value_of(config, name) for name in ("tp_size", "sp_size", "dp_replicate"))
    ranks, shards = tp * sp * replicas, config.parallel.dp_shard
    if world_size % ranks:
        yield Finding(
            f"parallel world_size = {world_size} must be a multiple of tp_size x sp_size x "
            f"dp_replicate = {tp} x {sp} x {replicas} = {ranks}; start a multiple of {ranks} ranks "
            "or lower one of the three"
        )
    elif shards > 0 and world_size != ranks * shards:
        yield Finding(
            "dp_shard must fill the job: tp_size x sp_size x dp_replicate x dp_shard = "
            f"{tp} x {sp} x {replicas} x {shards} = {ranks * shards}, but world_size = "
            f"{world_size}; use -1 or {world_size // ranks}"
        )
    engine = config.rollout.engine_tp_size
    if rest := world_size % engine:
        fault = f"world_size % engine_tp_size = {world_size} % {engine} = {rest}"
        use = f"use a divisor of {world_size}"
        yield Finding(f"engine_tp_size must divide the world size: {fault}; {use}")


def _on_policy(config: JobConfig, world_size: int) -> Iterator[Finding]:
    prompts, n = config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt
    batch, samples = config.training.train_batch_size, prompts * n
    equation = f"rollout_batch_size x n_samples_per_prompt = {prompts} x {n} = {samples}"
    if batch > samples and (rest := batch % samples):
        fault = f"so it must be a multiple of it, but {batch} % {samples} = {rest}"
        use = f"use {batch - rest} or {batch - rest + samples}"
        yield Finding(f"train_batch_size is above {equation}, {fault}; {use}")
    elif batch < samples and (rest := samples % batch):
        fault = f"so it must divide it, but {samples} % {batch} = {rest}"
        use = f"use {samples} or a divisor of it"
        yield Finding(f"train_batch_size is below {equation}, {fault}; {use}")
    elif batch < samples:
        epochs, strict = config.training.max_epochs, config.training.strict_batch_rule
        steps = epochs * samples // batch
        bound = "strict_batch_rule = true demands at least" if strict else "on-policy from"
        yield Finding(
            f"train_batch_size is below {equation}: a rollout makes max_epochs x {samples} / "
            f"{batch} = {epochs} x {samples // batch} = {steps} optimizer steps, {steps - 1} of "
            f"them off-policy; {bound} {samples}",
            strict,
        )


def _batches(config: JobConfig, world_size: int) -> Iterator[Finding]:
    tp, sp, training = config.parallel.tp_size, config.parallel.sp_size, config.training
    if world_size % (tp * sp):
        return  # _layout has said so; the sums below would only be wrong
    dp = data_parallel(config, world_size)
    why = f"dp = world_size / (tp_size x sp_size) = {world_size} / ({tp} x {sp}) = {dp}"
    batch, micro = training.train_batch_size, training.micro_train_batch_size
    if rest := batch % (micro * dp):
        near = [str(size) for size in (batch - rest, batch - rest + micro * dp) if size]
        yield Finding(
            f"train_batch_size must be a multiple of micro_train_batch_size x dp = {micro} x {dp} "
            f"= {micro * dp} ({why}), but {batch} % {micro * dp} = {rest}; use {' or '.join(near)}"
        )
    prompts = config.rollout.rollout_batch_size
    if rest := prompts % dp:
        fault = f"must be a multiple of dp ({why}), but {prompts} % {dp} = {rest}"
        yield Finding(f"rollout_batch_size {fault}; use {prompts - rest + dp}")


def _lengths(config: JobConfig, world_size: int) -> Iterator[Finding]:
    length, wanted = config.data.max_len, config.rollout.max_new_tokens or 0
    if is_set(config, "prompt_max_len") and config.data.prompt_max_len >= length:
        fault = f"must be below max_len = {length}, or no token is left for a response"
        yield Finding(f"prompt_max_len {fault}; use at most {length - 1}")
    if length < 2:
        yield Finding("max_len leaves no room for a prompt and a response; use 2 or more")
    if wanted >= length:
        fault = f"has no effect: max_len = {length} leaves at most {length - 1} tokens"
        yield Finding(f"max_new_tokens {fault}; lower it or leave it out", False)
    budget = min(length - 1, wanted or length)
    longest = f"the longest response, min(max_len - 1, max_new_tokens) = {budget}"
    for name in ("min_new_tokens", "overlong_buffer_len"):
        if value_of(config, name) > budget:
            yield Finding(f"{name} is above {longest}; use at most {budget}")
    if (config.training.max_tokens_per_microbatch or length) < length:
        fault = f"is below max_len = {length}, so that a long sample fits nowhere"
        yield Finding(f"max_tokens_per_microbatch {fault}; use at least {length}")


def _rewards(config: JobConfig, world_size: int) -> Iterator[Finding]:
    for fault in config.reward.faults(config.model.pretrain):
        yield Finding("reward " + fault.removeprefix("[reward] "))


def _urls(config: JobConfig, world_size: int) -> Iterator[Finding]:
    options = {name: value_of(config, name) for name in ("server_urls", "remote_rm_url")}
    for judge in config.reward.judges:
        options[f"judge {judge.name!r}: server_url"] = judge.server_url
    for option, url in ((option, url) for option, urls in options.items() for url in urls):
        try:
            check_url(url, option)
        except ValueError as error:  # whose text begins with the option
            yield Finding(str(error) if option in FIELDS else f"reward {error}")

    urls = [url.rstrip("/").lower() for url in config.rollout.server_urls]
    if twice := {url for url in urls if urls.count(url) > 1}:
        yield Finding(f"server_urls names {min(twice)} twice; name every server once")


_OWN = {
    "vllm": "model dtype tensor_parallel_size max_model_len logprobs_mode load_format max_num_seqs "
    "gpu_memory_utilization enable_sleep_mode distributed_executor_backend skip_tokenizer_init "
    "trust_remote_code hf_overrides",  # by the latter fp32_head is set
    "sglang": "model_path dtype tp_size context_length load_format max_running_requests "
    "mem_fraction_static enable_memory_saver custom_weight_loader skip_tokenizer_init "
    "trust_remote_code",
}


def _engine_tables(config: JobConfig, world_size: int) -> Iterator[Finding]:
    """What torchrft tells an engine itself, and relies on."""
    options = (
        "pretrain, trust_remote_code, bf16, engine_tp_size, max_len, max_num_seqs, "
        "engine_mem_util, stop or fp32_head"
    )
    for table, names in _OWN.items():
        for name in names.split():
            if name in value_of(config, table):
                instead = f"torchrft sets it itself, from {options}"
                yield Finding(f"{table} holds {name!r}, which must not be there; {instead}")


def _secrets(config: JobConfig, world_size: int) -> Iterator[Finding]:
    """The config is written to config.toml and trackers, as it is."""
    tables = [(name, value_of(config, name)) for name in FIELDS]
    tables += [("functions", entry.options) for entry in config.reward.functions]
    for name, table in ((name, table) for name, table in tables if isinstance(table, dict)):
        for key in (key for key, value in table.items() if secret_option(key, value)):
            fault = f"holds a secret, {key}, which config.toml and trackers would show"
            yield Finding(f"{name} {fault}; leave it out, and read it from the environment")


def _needs(config: JobConfig, world_size: int) -> Iterator[Finding]:
    for name, met, needs, is_error in NEEDS:
        if is_chosen(config, name) and not met(config):
            text = f"{name} has no effect without {needs}; set that, or leave {name} out"
            yield Finding(text, is_error)


def _exclusions(config: JobConfig, world_size: int) -> Iterator[Finding]:
    data, parallel, training = config.data, config.parallel, config.training
    if parallel.fsdp and is_set(config, "zero_stage"):
        yield Finding("zero_stage and fsdp = true exclude each other; leave one out")
    if parallel.fsdp_cpu_offload and config.optimizer.adam_offload:
        fault = "moves what fsdp_cpu_offload = true keeps in host memory anyway"
        yield Finding(f"adam_offload {fault}; leave one out")
    sleeps = is_set(config, "enable_engine_sleep") and config.rollout.enable_engine_sleep
    if config.rollout.async_level and sleeps:
        fault = "exclude each other: the servers generate while the trainer computes"
        yield Finding(f"enable_engine_sleep and async_level = 1 {fault}; leave one out")
    for name in ("temperature", "first_token_temperature"):
        if (value_of(config, name) or 1) < 1e-5:
            yield Finding(f"{name} makes logits overflow; use at least 0.00001")
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        fault = f"is above max_pixels = {data.max_pixels}"
        yield Finding(f"min_pixels {fault}; lower it or raise the other")
    if parallel.tp_size > 1 and sees_images(config):
        fault = "does not split models that see images"
        yield Finding(f"tp_size {fault}; use fsdp, zero_stage = 3 or sp_size instead")
    if training.compile and parallel.tp_size > 1 and not training.gradient_checkpointing:
        fault = f"with tp_size = {parallel.tp_size} needs gradient_checkpointing = true"
        yield Finding(f"compile {fault}; set that, or leave compile out")


def _algorithm(config: JobConfig, world_size: int) -> Iterator[Finding]:
    algorithm, loss = config.algorithm, policy_loss(config)
    if config.rollout.async_level and algorithm.rollout_correction == "none":
        fault = "trains on samples that are one policy version late"
        remedy = 'a rollout_correction, e.g. "token_tis", weighs them'
        yield Finding(f"async_level {fault}; {remedy}", False)
    if algorithm.kl_controller == "adaptive" and not algorithm.init_kl_coef:
        fault = "cannot adapt init_kl_coef = 0.0, which stays 0 under scaling"
        yield Finding(f'kl_controller {fault}; start above 0 or use "fixed"')
    if algorithm.clip_range >= 1 and loss == "cpgd":
        fault = "must be below 1 for the cpgd policy loss, which clips at log(1 - clip_range)"
        yield Finding(f"clip_range {fault}; use e.g. 0.2")
    if algorithm.init_kl_coef and algorithm.kl_in_reward and algorithm.kl_estimator != "k1":
        fault = "in the reward hardly pulls to the reference, where only k1 has the right gradient"
        yield Finding(f'kl_estimator {fault}; use "k1", or kl_placement = "loss"', False)
    per_token = algorithm.rollout_correction in ("token_tis", "token_mask")
    fault = "chooses or weighs tokens, but the gmpo policy loss is one number per sequence"
    if per_token and loss == "gmpo":
        yield Finding(f"rollout_correction {fault}; use seq_tis or seq_mask")
    if algorithm.high_entropy_token_ratio < 1 and loss == "gmpo":
        yield Finding(f"high_entropy_token_ratio {fault}; use 1.0")
    actor, critic = config.optimizer.actor_learning_rate, config.optimizer.critic_learning_rate
    if actor > 1e-4 and config.model.init == "pretrained":
        fault = "is far above the 1e-6 to 1e-5 that pretrained models take, and may ruin this one"
        yield Finding(f"actor_learning_rate {fault}; make sure that it is meant", False)
    if algorithm.advantage_estimator == "gae" and actor > critic:
        fault = f"is above critic_learning_rate = {critic}; the critic usually learns faster"
        yield Finding(f"actor_learning_rate {fault}: lower the first or raise the second", False)


def _single_samples(config: JobConfig, world_size: int) -> Iterator[Finding]:
    if config.rollout.n_samples_per_prompt > 1:
        return
    if config.rollout.dynamic_sampling:
        groups = f"every group of {label(config, 'n_samples_per_prompt')}"
        fault = f"drops groups of equal rewards, which {groups} is"
        yield Finding(f"dynamic_sampling {fault}; use 2 or more samples")
    estimator = config.algorithm.advantage_estimator
    if estimator not in ("reinforce", "reinforce_plus_plus", "gae"):
        fault = f"gives advantage_estimator = {show(estimator)} no other sample to compare with"
        effect = "" if estimator == "rloo" else ", so that every advantage is 0"
        found = f"n_samples_per_prompt {fault}{effect}; use 2 or more"
        yield Finding(found, is_error=estimator == "rloo")


def _ranges(config: JobConfig, world_size: int) -> Iterator[Finding]:
    clips = CLIP_USUAL.get(policy_loss(config))
    both = dict.fromkeys(("clip_range", "clip_range_higher"), clips) if clips else {}
    for name, (low, high) in (RANGES | both).items():
        if not low <= value_of(config, name) <= high and _range_applies(config, name):
            text = f"{name} is outside the usual range {low} to {high}; make sure that it is meant"
            yield Finding(text, False)


def _range_applies(config: JobConfig, name: str) -> bool:
    if name == "init_kl_coef" and config.algorithm.init_kl_coef == 0:
        return False  # no KL term at all, which is common practice
    return is_set(config, name) or (name == "kl_target" and kl_adapts(config))


def batch_arithmetic(config: JobConfig, world_size: int) -> list[str]:
    """The numbers that follow from the batch fields, a readable line each."""
    rollout, training = config.rollout, config.training
    prompts, n = rollout.rollout_batch_size, rollout.n_samples_per_prompt
    samples, batch, epochs = prompts * n, training.train_batch_size, training.max_epochs
    dp, micro = data_parallel(config, world_size), training.micro_train_batch_size
    product = f"rollout_batch_size x n_samples_per_prompt = {prompts} x {n} = {samples}"
    lines = [f"samples per rollout = {product}"]
    lines += [f"samples per rank and rollout = {samples} / dp = {samples} / {dp} = {samples // dp}"]
    if batch > samples:
        equation = f"train_batch_size / {samples} = {batch} / {samples} = {batch // samples}"
        lines.append(f"rollouts per optimizer step = {equation}, with max_epochs = {epochs}")
    else:
        equation = f"{epochs} x {samples} / {batch} = {epochs * samples // batch}"
        steps = f"max_epochs x {samples} / train_batch_size = {equation}"
        lines.append(f"optimizer steps per rollout = {steps}")
    if training.packing_samples:
        budget = training.max_tokens_per_microbatch or micro * config.data.max_len
        lines.append(f"tokens per packed micro-batch <= {budget}, {batch // dp} samples per rank")
    else:
        quotient = "train_batch_size / (micro_train_batch_size x dp)"
        equation = f"{quotient} = {batch} / ({micro} x {dp}) = {batch // (micro * dp)}"
        lines.append(f"micro-batches per optimizer step and rank = {equation}")
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

# gspo clips the ratios of sequences, gmpo log-ratios; cispo's paper has no lower bound.
CLIP_USUAL = {"gspo": (1e-4, 0.01), "gmpo": (0.1, 1.0), "cispo": (0.1, math.inf)}

RULES: tuple[Callable[[JobConfig, int], Iterator[Finding]], ...] = (
    *(_layout, _on_policy, _batches, _lengths, _rewards, _urls),
    *(_needs, _engine_tables, _secrets, _exclusions, _algorithm, _single_samples, _ranges),
)
