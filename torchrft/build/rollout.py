"""The job's engines: the policy's and the judges'; and how the policy's samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchrft.config.job_config import JobConfig
from torchrft.config.reward_config import Judge
from torchrft.models.loader import load_config
from torchrft.models.support import refuse_unsupported
from torchrft.rollout import RolloutEngine, build_engine
from torchrft.rollout.native.engine import NativeEngine
from torchrft.types import SamplingParams

if TYPE_CHECKING:
    from torchrft.models.vision import Vision


def policy_engine(
    config: JobConfig, dtype: torch.dtype, device: torch.device, vision: Vision | None
) -> RolloutEngine:
    """The engine that samples from the policy, without weights. Raises ValueError as
    `build_engine`."""
    rollout, fp32 = config.rollout, config.model.fp32_head
    if fp32 and rollout.engine_type == "vllm":
        table = {**rollout.vllm, "hf_overrides": {"head_dtype": "float32"}}
        rollout = rollout.model_copy(update={"vllm": table})
    compile, max_len = config.training.compile, config.data.max_len
    options: dict[str, Any] = {"max_len": max_len, "compile": compile, "vision": vision}
    options["load_weights"] = False  # they come with the first hand-over
    engine = build_engine(rollout, config.model.pretrain, dtype, device, **options)
    if isinstance(engine, NativeEngine):
        engine.fp32_head = fp32
    return engine


def judge_engine(
    entry: Judge,
    max_len: int,
    vision: Vision | None,
    config: JobConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> RolloutEngine:
    """An engine of this rank with the weights of a judge, in prompts with answers of `max_len`.

    It does not sleep, since vLLM lets one engine of a process sleep: the policy's. Raises
    ValueError for an engine that does not start.
    """
    assert entry.pretrain is not None
    if entry.engine == "native":
        refuse_unsupported(load_config(entry.pretrain), max_len, cache=True)
    own: dict[str, Any] = {"server_urls": [], "engine_tp_size": 1, "enable_engine_sleep": False}
    own |= {"engine_type": entry.engine, "stop": [], "min_new_tokens": 0}
    rollout = config.rollout.model_copy(update=own)
    compile = config.training.compile
    options: dict[str, Any] = {"max_len": max_len, "compile": compile, "vision": vision}
    return build_engine(rollout, entry.pretrain, dtype, device, **options)


def sampling_params(config: JobConfig) -> SamplingParams:
    """How the policy's completions are sampled, but for the seeds."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.n_samples_per_prompt,
        temperature=rollout.temperature,
        first_token_temperature=rollout.first_token_temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_total_tokens=config.data.max_len,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        stop_token_ids=tuple(rollout.stop_token_ids),
        stop=tuple(rollout.stop),
        replay=rollout.truncation_replay,
    )
