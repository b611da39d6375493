"""Which fields have an effect only while another one is set: a table."""

from collections.abc import Callable
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

from torchrft.config.fields import FIELDS, is_set, value_of
from torchrft.config.job import job_of
from torchrft.config.job_config import JobConfig

Condition = Callable[[SimpleNamespace], object]
"""Whether something holds for a job, as `job_of` shows it."""


class Need(NamedTuple):
    """A field that, when set, has an effect only while `met` holds."""

    field: str
    met: Condition
    needs: str
    is_error: bool = True


CRITIC_FIELDS = ("critic_pretrain", "freezing_actor_steps", "value_clip")


def is_chosen(config: JobConfig, name: str) -> bool:
    """Whether a field is set to something; `compile = false` says "off" and selects nothing."""
    value = value_of(config, name)
    is_off = value in (None, False, 0) and value == FIELDS[name].info.default
    return is_set(config, name) and not is_off


def unmet(config: JobConfig, **switches: Any) -> set[str]:
    """Fields whose needs a config does not meet, were it not for the values of `switches`."""
    job = job_of(config, **switches)
    return {need.field for need in NEEDS if not need.met(job)}


def silent_fields(config: JobConfig) -> set[str]:
    """Unset fields whose default has no effect here, and would be refused or warned of if written.

    The resolved TOML leaves them out, so that it can be loaded again.
    """
    silent = unmet(config)
    if ".py:" in config.algorithm.advantage_estimator:  # which may not take them
        silent |= {"gamma", "lambd", *CRITIC_FIELDS}
    if config.parallel.fsdp:
        silent.add("zero_stage")
    if config.data.prompt_max_len >= config.data.max_len:
        silent.add("prompt_max_len")
    return {name for name in silent if not is_set(config, name)}


# Fields that the guide's own examples set idly, or that a sweep over another field would strand.
_WARNED = {
    *("kl_estimator", "kl_placement", "kl_target", "clip_range", "clip_range_higher"),
    *("critic_learning_rate", "max_tokens_per_microbatch", "chunk_size", "checkpointing_mode"),
    "engine_mem_util",
}


def _need(needs: str, met: Condition, *fields: str) -> list[Need]:
    return [Need(name, met, needs, name not in _WARNED) for name in fields]


def _on(switch: str, *fields: str) -> list[Need]:
    """`fields` need `switch` to be true, above 0, or set at all."""
    default = FIELDS[switch].info.default
    how = {bool: " = true", int: " > 0", float: " > 0"}.get(type(default), "")
    return _need(switch + how, attrgetter(switch), *fields)


def _estimator(names: tuple[str, ...], *fields: str, user: bool = True) -> list[Need]:
    """`fields` need one of these estimators, or that of a `user`: loading shows what it takes."""

    def met(job: SimpleNamespace) -> bool:
        return job.advantage_estimator in names or (user and ".py:" in job.advantage_estimator)

    choices = " or ".join(f'"{name}"' for name in names)
    return _need(f"advantage_estimator = {choices}", met, *fields)


def _engine(*types: str, served: bool | None = None) -> Condition:
    """One of these engines: `served` by servers, in the trainer's own process, or either."""
    return lambda job: job.engine_type in types and served in (None, bool(job.server_urls))


_EITHER = 'engine_type = "vllm" or "sglang"'
_EMBEDDED = f"{_EITHER} and no server_urls"
_WHOLE = f"{_EMBEDDED}; the native engine runs whole on every rank, servers have their own"
_ALIKE = 'engine_type = "native"; the others sample all tokens alike'
_TELLS = 'engine_type = "native", which alone tells what it samples among, and top_p < 1 or top_k'
_HEADS = 'bf16 = true, and engine_type = "native", or "vllm" without server_urls'
_SERVED = 'server_urls and engine_type = "vllm"'
_CLIPS = "a policy_loss that clips"
_ADAPTS = 'kl_controller = "adaptive" or the cpgd policy loss'
_JUDGED = "functions, judges or remote_rm_url"
_IMAGES = "images_key or mixed_mm_data"
_OUTSIDE = "reward_pretrain or models outside of the inference engine"
_BESIDE = "models or reward_pretrain beside the judges"
_REMOTE = "weight normalize protocol timeout deadline retries batch_size concurrency token_env"

_native = _engine("native")
_embedded = _engine("vllm", "sglang", served=False)
_heads = _engine("native", "vllm", served=False)

NEEDS: tuple[Need, ...] = (
    *_on("init_kl_coef", "ref_pretrain", "kl_estimator", "kl_placement"),
    *_need(_ADAPTS, lambda job: job.kl_adapts, "kl_target", "kl_horizon"),
    *_need(_CLIPS, lambda job: job.loss != "reinforce", "clip_range", "clip_range_higher"),
    *_need('policy_loss = "ppo_clip"', lambda job: job.loss == "ppo_clip", "dual_clip"),
    *_need("the cpgd policy loss", lambda job: job.loss == "cpgd", "cpgd_drift_coef"),
    *_estimator(("cpgd",), "cpgd_weight", user=False),
    *_estimator(("gae",), *CRITIC_FIELDS, "critic_learning_rate", "lambd"),
    *_estimator(("reinforce", "reinforce_plus_plus", "gae"), "gamma"),
    *_need("a rollout_correction", lambda job: job.corrects, "rollout_correction_cap"),
    *_on("dynamic_sampling", "dynamic_sampling_max_rounds"),
    *_on("name", "options", "max_turns", "environment_timeout", "environment_workers"),
    *_on("name", "environment_weight", "episode_schedule"),
    *_on("overlong_buffer_len", "overlong_penalty_factor"),
    *_on("reward_running_norm", "reward_running_norm_minus_mean"),
    *_on("functions", "reward_timeout", "reward_workers", "reward_memory"),
    *_need(_JUDGED, lambda job: job.judged, "error_reward", "max_reward_failures"),
    *_need('functions with "code"', lambda job: job.runs_programs, "allow_unsafe_code"),
    *_need(_OUTSIDE, lambda job: job.models_here, "reward_model_offload"),
    *_need(_BESIDE, lambda job: job.scalar_models, "rm_use_engine"),
    *_on("remote_rm_url", *(f"remote_rm_{name}" for name in _REMOTE.split())),
    *_on("recipes", "source_key"),
    *_on("source_key", "recipes"),
    *_on("gate", "gate_reward"),
    *_need(_IMAGES, lambda job: job.sees_images, "processor", "min_pixels", "max_pixels"),
    *_on("apply_chat_template", "system_prompt", "chat_template_kwargs"),
    *_on("packing_samples", "max_tokens_per_microbatch"),
    *_on("fused_linear_logprob", "chunk_size"),
    *_on("gradient_checkpointing", "checkpointing_mode"),
    *_need("an lr_decay that decays", lambda job: job.lr_decay != "constant", "lr_min_ratio"),
    *_need(_EMBEDDED, _embedded, "engine_mem_util"),
    *_need(_WHOLE, _embedded, "engine_tp_size"),
    *_need('engine_type = "sglang" and no server_urls', _engine("sglang", served=False), "sglang"),
    *_need('engine_type = "vllm" and no server_urls', _engine("vllm", served=False), "vllm"),
    *_need(_EITHER, _engine("vllm", "sglang"), "server_urls"),
    *_on("server_urls", "async_level", "request_timeout"),
    *_need(_SERVED, _engine("vllm", served=True), "request_retries", "weight_folder"),
    *_need(_ALIKE, _native, "first_token_temperature"),
    *_need(_TELLS, lambda job: _native(job) and job.truncates, "truncation_replay"),
    *_need(_HEADS, lambda job: job.bf16 and _heads(job), "fp32_head"),
    *_on("bf16", "use_mp_opt"),
    *_on("eval_data", "eval_steps"),
    *_on("load_checkpoint", "ckpt_path"),
    *_on("use_wandb", "wandb_org", "wandb_run_name"),
)
