"""A config as its rules see it: each field by its name alone, and what follows from the fields."""

import math
from types import SimpleNamespace
from typing import Any

from torchrft.config.fields import FIELDS, value_of
from torchrft.config.job_config import JobConfig


def job_of(config: JobConfig, world_size: int = 1, **switches: Any) -> SimpleNamespace:
    """All values of a config by name, with sizes and choices that follow for `world_size` ranks.

    Field names are unique over sections, so that `job.top_p` is `config.rollout.top_p`. Values of
    `switches` stand in for those of the config.
    """
    job = SimpleNamespace(**{name: value_of(config, name) for name in FIELDS} | switches)
    job.config, job.world_size = config, world_size
    job.loss, job.kl_in_reward = config.algorithm.loss, config.algorithm.kl_in_reward
    job.kl_adapts = job.kl_controller == "adaptive" or job.loss == "cpgd"
    job.truncates = job.top_p < 1 or job.top_k > 0
    job.sees_images = job.images_key is not None or job.mixed_mm_data
    job.corrects = job.rollout_correction != "none"
    job.scalar_models = config.reward.scalar_models(job.pretrain)  # with those of reward_pretrain
    job.models_here = job.scalar_models and not job.rm_use_engine
    job.judged = bool(job.functions or job.judges or job.remote_rm_url or job.name)
    job.runs_programs = any(entry.name == "code" for entry in job.functions)
    # Data-parallel ranks work on different samples; 0 where the layout does not come out even.
    split = job.tp_size * job.sp_size
    job.dp = 0 if world_size % split else world_size // split
    job.dp_equation = f"dp = world_size / (tp_size x sp_size) = {world_size} / ({job.tp_size} x "
    job.dp_equation += f"{job.sp_size}) = {job.dp}"
    replicas = split * job.dp_replicate
    job.shards = 0 if world_size % replicas else world_size // replicas
    job.samples = job.rollout_batch_size * job.n_samples_per_prompt
    job.batch = equation(job, "rollout_batch_size", "n_samples_per_prompt")
    job.remainder = job.samples % job.train_batch_size
    job.optimizer_steps = job.max_epochs * job.samples // job.train_batch_size
    on_policy = job.remainder or job.train_batch_size >= job.samples
    job.off_policy_steps = 0 if on_policy else job.optimizer_steps - 1
    job.longest = min(job.max_len - 1, job.max_new_tokens or job.max_len)
    return job


def equation(job: SimpleNamespace, *factors: str) -> str:
    """The product of fields: their names, their values and the result.

    >>> equation(SimpleNamespace(tp_size=2, sp_size=3), "tp_size", "sp_size")
    'tp_size x sp_size = 2 x 3 = 6'
    """
    values = [getattr(job, name) for name in factors]
    terms = [" x ".join(factors), " x ".join(map(str, values)), str(math.prod(values))]
    return " = ".join(dict.fromkeys(terms))


def smallest_world_size(config: JobConfig) -> int:
    """The fewest ranks that the layout fits on."""
    parallel = config.parallel
    ranks = parallel.tp_size * parallel.sp_size * parallel.dp_replicate * max(parallel.dp_shard, 1)
    return math.lcm(ranks, config.rollout.engine_tp_size)


def batch_arithmetic(config: JobConfig, world_size: int) -> list[str]:
    """The numbers that follow from the batch fields, a readable line each."""
    job = job_of(config, world_size)
    samples, batch, dp, epochs = job.samples, job.train_batch_size, job.dp, job.max_epochs
    micro = job.micro_train_batch_size
    steps = f"optimizer steps per rollout = max_epochs x {samples} / train_batch_size = "
    steps += f"{epochs} x {samples} / {batch} = {job.optimizer_steps}"
    if batch > samples:
        steps = f"rollouts per optimizer step = train_batch_size / {samples} = {batch} / {samples} "
        steps += f"= {batch // samples}, with max_epochs = {epochs}"
    passes = "micro-batches per optimizer step and rank = train_batch_size / (micro_train_batch_"
    passes += f"size x dp) = {batch} / ({micro} x {dp}) = {batch // (micro * dp)}"
    if job.packing_samples:
        budget = job.max_tokens_per_microbatch or micro * job.max_len
        passes = f"tokens per packed micro-batch <= {budget}, {batch // dp} samples per rank"
    by_rank = f"samples per rank and rollout = {samples} / dp = {samples} / {dp} = {samples // dp}"
    return [f"samples per rollout = {job.batch}", by_rank, steps, passes]
