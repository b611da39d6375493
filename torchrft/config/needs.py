"""Which fields have an effect only while another one is set: a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torchrft.config.fields import FIELDS, is_set, value_of
from torchrft.config.job_config import JobConfig


class Need(NamedTuple):
    """A field that, when set, has an effect only while `met` holds."""

    field: str
    met: Callable[[JobConfig], bool]
    needs: str
    is_error: bool = True


def policy_loss(config: JobConfig) -> str:
    """The policy loss in use: the field, or the preset's."""
    algorithm = config.algorithm
    own = ("cpgd", "gspo", "gmpo", "cispo")  # presets named like their loss; the others clip
    estimator = algorithm.advantage_estimator
    return algorithm.policy_loss or (estimator if estimator in own else "ppo_clip")


def is_chosen(config: JobConfig, name: str) -> bool:
    """Whether a field is set to something; `compile = false` says "off" and selects nothing."""
    value = value_of(config, name)
    is_off = value in (None, False, 0) and value == FIELDS[name].info.default
    return is_set(config, name) and not is_off


def silent_fields(config: JobConfig) -> set[str]:
    """Unset fields whose default has no effect here, and would be refused or warned of if written.

    The resolved TOML leaves them out, so that it can be loaded again.
    """
    silent = {need.field for need in NEEDS if not need.met(config)}
    if ".py:" in config.algorithm.advantage_estimator:  # which may not take them
        silent |= {"gamma", "lambd", *CRITIC_FIELDS}
    if config.parallel.fsdp:
        silent.add("zero_stage")
    if config.data.prompt_max_len >= config.data.max_len:
        silent.add("prompt_max_len")
    return {name for name in silent if not is_set(config, name)}


def kl_adapts(config: JobConfig) -> bool:
    algorithm = config.algorithm
    return algorithm.kl_controller == "adaptive" or policy_loss(config) == "cpgd"


def _own_or(config: JobConfig, *estimators: str) -> bool:
    """One of these estimators, or a user's own: loading that shows what it takes."""
    name = config.algorithm.advantage_estimator
    return name in estimators or ".py:" in name


def _has_critic(config: JobConfig) -> bool:
    return _own_or(config, "gae")


def _has_kl(config: JobConfig) -> bool:
    return config.algorithm.init_kl_coef > 0


def _own_engine(config: JobConfig) -> bool:
    """Whether an engine other than the native one runs in the trainer's own process."""
    return config.rollout.engine_type != "native" and not config.rollout.server_urls


def _has_vllm_servers(config: JobConfig) -> bool:
    return bool(config.rollout.server_urls) and config.rollout.engine_type == "vllm"


def _has_images(config: JobConfig) -> bool:
    return config.data.images_key is not None or config.data.mixed_mm_data


def _clips(config: JobConfig) -> bool:
    return policy_loss(config) != "reinforce"


CRITIC_FIELDS = ("critic_pretrain", "freezing_actor_steps", "value_clip")

_CRITIC = 'advantage_estimator = "gae"'
_ADAPTIVE = 'kl_controller = "adaptive" or the cpgd policy loss'
_RETURNS = 'advantage_estimator = "reinforce", "reinforce_plus_plus" or "gae"'
_OWN_ENGINE = 'engine_type = "vllm" or "sglang" and no server_urls'
_IMAGES = "images_key or mixed_mm_data"
_WEIGHTED = 'advantage_estimator = "cpgd"'

# Only a warning where the guide's own examples set a field idly, or sweeps switch the need off.
NEEDS: tuple[Need, ...] = (
    Need("ref_pretrain", _has_kl, "init_kl_coef > 0"),
    Need("kl_estimator", _has_kl, "init_kl_coef > 0", False),
    Need("kl_placement", _has_kl, "init_kl_coef > 0", False),
    Need("kl_target", kl_adapts, _ADAPTIVE, False),
    Need("kl_horizon", kl_adapts, _ADAPTIVE),
    Need("clip_range", _clips, "a policy_loss that clips", False),
    Need("clip_range_higher", _clips, "a policy_loss that clips", False),
    Need("dual_clip", lambda c: policy_loss(c) == "ppo_clip", 'policy_loss = "ppo_clip"'),
    Need("critic_pretrain", _has_critic, _CRITIC),
    Need("critic_learning_rate", _has_critic, _CRITIC, False),
    Need("freezing_actor_steps", _has_critic, _CRITIC),
    Need("value_clip", _has_critic, _CRITIC),
    Need("lambd", _has_critic, _CRITIC),
    Need(
        "gamma",
        lambda c: _own_or(c, "reinforce", "reinforce_plus_plus", "gae"),
        _RETURNS,
    ),
    Need("cpgd_weight", lambda c: c.algorithm.advantage_estimator == "cpgd", _WEIGHTED),
    Need("cpgd_drift_coef", lambda c: policy_loss(c) == "cpgd", "the cpgd policy loss"),
    Need(
        "rollout_correction_cap",
        lambda c: c.algorithm.rollout_correction != "none",
        "a rollout_correction",
    ),
    Need(
        "dynamic_sampling_max_rounds",
        lambda c: c.rollout.dynamic_sampling,
        "dynamic_sampling = true",
    ),
    Need(
        "overlong_penalty_factor",
        lambda c: c.reward.overlong_buffer_len > 0,
        "overlong_buffer_len > 0",
    ),
    Need(
        "reward_running_norm_minus_mean",
        lambda c: c.reward.reward_running_norm,
        "reward_running_norm = true",
    ),
    Need("processor", _has_images, _IMAGES),
    Need("min_pixels", _has_images, _IMAGES),
    Need("max_pixels", _has_images, _IMAGES),
    Need("system_prompt", lambda c: c.data.apply_chat_template, "apply_chat_template = true"),
    Need(
        "max_tokens_per_microbatch",
        lambda c: c.training.packing_samples,
        "packing_samples = true",
        False,
    ),
    Need(
        "chunk_size",
        lambda c: c.training.fused_linear_logprob,
        "fused_linear_logprob = true",
        False,
    ),
    Need(
        "checkpointing_mode",
        lambda c: c.training.gradient_checkpointing,
        "gradient_checkpointing = true",
        False,
    ),
    Need("lr_min_ratio", lambda c: c.optimizer.lr_decay != "constant", "an lr_decay that decays"),
    Need("engine_mem_util", _own_engine, _OWN_ENGINE, False),
    Need(
        "engine_tp_size",
        _own_engine,
        f"{_OWN_ENGINE}; the native engine runs whole on every rank, servers have their own",
    ),
    Need(
        "sglang",
        lambda c: _own_engine(c) and c.rollout.engine_type == "sglang",
        'engine_type = "sglang" and no server_urls',
    ),
    Need(
        "vllm",
        lambda c: _own_engine(c) and c.rollout.engine_type == "vllm",
        'engine_type = "vllm" and no server_urls',
    ),
    Need(
        "server_urls",
        lambda c: c.rollout.engine_type != "native",
        'engine_type = "vllm" or "sglang"',
    ),
    Need("async_level", lambda c: bool(c.rollout.server_urls), "server_urls"),
    Need("request_timeout", lambda c: bool(c.rollout.server_urls), "server_urls"),
    Need("request_retries", _has_vllm_servers, 'server_urls and engine_type = "vllm"'),
    Need("weight_folder", _has_vllm_servers, 'server_urls and engine_type = "vllm"'),
    Need(
        "first_token_temperature",
        lambda c: c.rollout.engine_type == "native",
        'engine_type = "native"; the others sample all tokens alike',
    ),
    Need("use_mp_opt", lambda c: c.training.bf16, "bf16 = true"),
    Need("eval_steps", lambda c: c.evaluation.eval_data is not None, "eval_data"),
    Need("ckpt_path", lambda c: c.checkpoint.load_checkpoint, "load_checkpoint = true"),
    Need("wandb_org", lambda c: c.logging.use_wandb is not None, "use_wandb"),
    Need("wandb_run_name", lambda c: c.logging.use_wandb is not None, "use_wandb"),
)
