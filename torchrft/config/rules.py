"""Rules that join several fields: one record each. They judge, they never rewrite a value.

A rule's text writes out the fields and numbers it depends on. The manager relies on that: a text
that mentions a field whose own value is faulty is held back until that one is mended.
"""

import math
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

from torchrft.config.availability import engine_missing
from torchrft.config.fields import FIELDS, is_set, label, show
from torchrft.config.job import equation, job_of
from torchrft.config.job_config import JobConfig, Section
from torchrft.config.needs import NEEDS, Condition, Need, is_chosen
from torchrft.tools.credentials import check_url
from torchrft.tools.text import is_secret


class Rule(NamedTuple):
    """A field or section, what breaks the rule, and what a message says after the field's value.

    `broken` gives a true value, or one for each fault. The text may hold {it}, that value, and the
    name of any value of `job_of` in braces.
    """

    subject: str
    broken: Condition
    text: str = "{it}"


class Findings(NamedTuple):
    """What `check` found: errors stop the job, warnings are printed."""

    errors: list[str]
    warnings: list[str]


def check(config: JobConfig, world_size: int) -> Findings:
    """Judge a config for a job of `world_size` ranks."""
    job = job_of(config, world_size)
    return Findings(_faults(ERRORS, job), _faults(WARNINGS, job))


def unavailable(config: JobConfig) -> list[str]:
    """What the config selects and this version cannot run, and what a real run needs beside it."""
    return _faults(ABSENT, job_of(config))


def _faults(rules: Iterable[Rule], job: SimpleNamespace) -> list[str]:
    shown = {name: show(value) for name, value in vars(job).items() if name in FIELDS}
    faults = []
    for subject, broken, text in rules:
        at = label(job.config, subject) if subject in FIELDS else f"[{subject}]"
        result = broken(job)
        for it in result if isinstance(result, list) else [result] if result else []:
            faults.append(f"{at} {text.format_map(vars(job) | shown | {'it': it})}")
    return faults


def _multiple(subject: str, *factors: str, when: Condition = lambda job: True) -> Rule:
    """The rule that the value `subject` must be a multiple of the product of `factors`."""

    def broken(job: SimpleNamespace) -> str:
        value, divisor = getattr(job, subject), math.prod(getattr(job, name) for name in factors)
        if not when(job) or not (remainder := value % divisor):
            return ""
        least = value - remainder
        at = "" if subject in FIELDS else f"{subject} = {value} "
        product = equation(job, *factors) + (f" ({job.dp_equation})" if "dp" in factors else "")
        use = f"{least} or {least + divisor}" if least else str(divisor)
        fault = f"{at}must be a multiple of {product}, but {value} % {divisor} = {remainder}"
        return f"{fault}; use {use}, or another {' or '.join(factors)}"

    return Rule(subject if subject in FIELDS else "parallel", broken)


def _url_faults(urls: list[str]) -> list[str]:
    faults = []
    for url in urls:
        try:
            check_url(url, "")
        except ValueError as error:
            faults.append(str(error).strip())
    return faults


def _secrets(name: str, value: Any) -> list[str]:
    """The names of entries of `value`, a field's, that hold a secret."""
    if isinstance(value, list):
        return [found for entry in value for found in _secrets(name, entry)]
    if isinstance(value, Section | dict):
        return [found for key, entry in dict(value).items() for found in _secrets(key, entry)]
    return [name] if name not in _PROSE.split() and is_secret(name, value) else []


def _without_secret(name: str) -> Rule:
    """The rule that a field holds no secret."""
    return Rule(name, lambda job: _secrets(name, getattr(job, name))[:1], _SECRET)


def _unusual(name: str) -> Rule:
    """The rule that a value that was set lies in the usual range of its field."""

    def broken(job: SimpleNamespace) -> str:
        value, (low, high) = getattr(job, name), RANGES[name]
        if name in CLIPS and job.loss in CLIP_USUAL:
            low, high = CLIP_USUAL[job.loss]
        applies = is_set(job.config, name) or (name == "kl_target" and job.kl_adapts)
        # An init_kl_coef of 0 is common practice: there is no KL term at all.
        return f"{low} to {high}" if applies and value and not low <= value <= high else ""

    return Rule(name, broken, "is outside the usual range {it}; make sure that it is meant")


def _effect(need: Need) -> Rule:
    """The rule that a field that was set has an effect."""
    text = f"has no effect without {need.needs}; set that, or leave {need.field} out"
    return Rule(
        need.field, lambda job: is_chosen(job.config, need.field) and not need.met(job), text
    )


def _engine_fault(job: SimpleNamespace) -> str:
    """What is wrong with the engine's package; servers have it, wherever they run."""
    fault = None if job.server_urls else engine_missing(job.engine_type)
    default = "" if is_set(job.config, "engine_type") else "(the default) "
    return f"{default}{fault}" if fault else ""


CLIPS = ("clip_range", "clip_range_higher")
# The guide's "Range" of each field: outside it a set value is unusual, not wrong.
RANGES: dict[str, tuple[float, float]] = {
    "lr_warmup_ratio": (0.0, 0.1),
    "init_kl_coef": (0.0001, 0.01),
    "kl_target": (0.001, 0.01),
    "clip_range": (0.1, 0.3),
    "clip_range_higher": (0.0, math.inf),
    "temperature": (0.6, 1.2),
    "top_p": (0.8, 1.0),
    "engine_mem_util": (0.3, 0.9),
}
# gspo clips the ratios of sequences, gmpo log-ratios; cispo's paper has no lower bound.
CLIP_USUAL = {"gspo": (1e-4, 0.01), "gmpo": (0.1, 1.0), "cispo": (0.1, math.inf)}

# Options that torchrft gives an engine itself, and relies on.
_VLLM = {
    *("model", "dtype", "tensor_parallel_size", "max_model_len", "logprobs_mode", "load_format"),
    *("max_num_seqs", "gpu_memory_utilization", "enable_sleep_mode", "skip_tokenizer_init"),
    *("distributed_executor_backend", "trust_remote_code"),
    "hf_overrides",  # by it fp32_head is set
}
_SGLANG = {
    *("model_path", "dtype", "tp_size", "context_length", "load_format", "max_running_requests"),
    *("mem_fraction_static", "enable_memory_saver", "custom_weight_loader", "skip_tokenizer_init"),
    "trust_remote_code",
}
_LAYOUT = ("world_size / (tp_size x sp_size x dp_replicate) = "
           "{world_size} / ({tp_size} x {sp_size} x {dp_replicate}) = {shards}")  # fmt: skip
_LONGEST = ("is above the longest response, min(max_len - 1, max_new_tokens) = {longest}; use at "
            "most {longest}")  # fmt: skip
_OFF_POLICY = ("is below {batch}: {it} of a rollout's {optimizer_steps} optimizer steps "
               "(max_epochs x {samples} / train_batch_size = {max_epochs} x {samples} / "
               "{train_batch_size}) are off-policy; ")  # fmt: skip
_ALONE = "gives advantage_estimator = {advantage_estimator} no other sample to compare with"
_BY_TOKEN = "chooses or weighs tokens, but the gmpo policy loss is one number per sequence; use "
# Texts for models, which may speak of secrets, and URLs, which have a rule of their own.
_PROSE = "system_prompt template chat_template stop parser server_urls server_url remote_rm_url"
_SECRET = ("holds a secret, {it}, which config.toml and trackers would show; leave it out, and "
           "read it from the environment")  # fmt: skip
_GIVEN_ANYWAY = ("holds '{it}', which must not be there; torchrft sets it itself, from pretrain, "
                 "trust_remote_code, bf16, engine_tp_size, max_len, max_num_seqs, engine_mem_util, "
                 "stop or fp32_head")  # fmt: skip

ERRORS: tuple[Rule, ...] = (
    # Sizes that must come out even.
    _multiple("world_size", "tp_size", "sp_size", "dp_replicate"),
    Rule("dp_shard", lambda job: job.dp_shard > 0 and job.shards not in (0, job.dp_shard),
         f"must fill the job: {_LAYOUT}; use -1 or {{shards}}"),
    _multiple("world_size", "engine_tp_size"),
    _multiple("train_batch_size", "rollout_batch_size", "n_samples_per_prompt",
              when=lambda job: job.train_batch_size > job.samples),
    Rule("train_batch_size", lambda job: job.samples > job.train_batch_size and job.remainder,
         "is below {batch}, so it must divide it, but {samples} % {train_batch_size} = {it}; use "
         "{samples} or a divisor of it"),
    Rule("train_batch_size", lambda job: job.strict_batch_rule and job.off_policy_steps,
         _OFF_POLICY + "strict_batch_rule = true demands at least {samples}"),
    _multiple("train_batch_size", "micro_train_batch_size", "dp", when=lambda job: job.dp),
    _multiple("rollout_batch_size", "dp", when=lambda job: job.dp),
    # Lengths and sizes that must fit.
    Rule("max_len", lambda job: job.max_len < 2,
         "leaves no room for a prompt and a response; use 2 or more"),
    Rule("prompt_max_len", lambda job: (is_set(job.config, "prompt_max_len")
                                        and job.prompt_max_len >= job.max_len and job.max_len - 1),
         "must be below max_len = {max_len}, or no token is left for a response; use at most {it}"),
    Rule("min_new_tokens", lambda job: job.min_new_tokens > job.longest, _LONGEST),
    Rule("overlong_buffer_len", lambda job: job.overlong_buffer_len > job.longest, _LONGEST),
    Rule("max_tokens_per_microbatch",
         lambda job: (job.max_tokens_per_microbatch or job.max_len) < job.max_len,
         "is below max_len = {max_len}, so that long samples fit nowhere; use at least {max_len}"),
    Rule("min_pixels", lambda job: (job.min_pixels or 0) > (job.max_pixels or math.inf),
         "is above max_pixels = {max_pixels}; lower it or raise the other"),
    # Options that exclude each other, or need each other.
    Rule("zero_stage", lambda job: job.fsdp and is_set(job.config, "zero_stage"),
         "and fsdp = true exclude each other; leave one out"),
    Rule("adam_offload", lambda job: job.adam_offload and job.fsdp_cpu_offload,
         "moves what fsdp_cpu_offload = true keeps in host memory anyway; leave one out"),
    Rule("enable_engine_sleep", lambda job: (job.async_level and job.enable_engine_sleep
                                             and is_set(job.config, "enable_engine_sleep")),
         "and async_level = 1 exclude each other: the servers generate while the trainer computes; "
         "leave one out"),
    Rule("tp_size", lambda job: job.tp_size > 1 and job.sees_images,
         "does not split models that see images; use fsdp, zero_stage = 3 or sp_size instead"),
    Rule("compile", lambda job: job.compile and job.tp_size > 1 and not job.gradient_checkpointing,
         "with tp_size = {tp_size} needs gradient_checkpointing = true; set that, or leave compile "
         "out"),
    Rule("kl_controller", lambda job: job.kl_controller == "adaptive" and not job.init_kl_coef,
         'cannot adapt init_kl_coef = 0.0, which stays 0; start above 0 or use "fixed"'),
    Rule("clip_range", lambda job: job.loss == "cpgd" and job.clip_range >= 1,
         "must be below 1 for the cpgd policy loss, which clips at log(1 - clip_range); use 0.2"),
    Rule("rollout_correction", lambda job: (job.loss == "gmpo"
                                            and job.rollout_correction.startswith("token_")),
         _BY_TOKEN + "seq_tis or seq_mask"),
    Rule("high_entropy_token_ratio",
         lambda job: job.loss == "gmpo" and job.high_entropy_token_ratio < 1, _BY_TOKEN + "1.0"),
    Rule("dynamic_sampling", lambda job: job.dynamic_sampling and job.n_samples_per_prompt == 1,
         "drops groups of equal rewards, which every group of [rollout] n_samples_per_prompt = 1 "
         "is; use 2 or more samples"),
    Rule("n_samples_per_prompt",
         lambda job: job.n_samples_per_prompt == 1 and job.advantage_estimator == "rloo",
         _ALONE + "; use 2 or more"),
    Rule("name", lambda job: (job.name and job.engine_type == "sglang"
                              and job.engine_tp_size > 1),
         "is an environment, whose episodes need engine_tp_size = 1 with SGLang, not "
         "{engine_tp_size}: its ranks ask together; set that, or engine_type = \"vllm\""),
    Rule("episode_schedule", lambda job: job.episode_schedule == "free" and job.deterministic,
         "lets what is computed together depend on time, which deterministic = true excludes; use "
         '"rounds", or leave one out'),
    Rule("name", lambda job: job.name and job.sees_images,
         "is an environment, whose episodes have no images yet; leave images_key and mixed_mm_data "
         "out"),
    # Rewards, servers and tables.
    Rule("reward", lambda job: [fault.removeprefix("[reward] ")
                                for fault in job.config.reward.faults(job.pretrain)]),
    Rule("server_urls", lambda job: _url_faults(job.server_urls)),
    Rule("remote_rm_url", lambda job: _url_faults(job.remote_rm_url)),
    Rule("reward", lambda job: [f"judge {judge.name!r}: server_url {fault}" for judge in job.judges
                                for fault in _url_faults(judge.server_url)]),
    Rule("server_urls", lambda job: [url for url, times in Counter(
        url.rstrip("/").lower() for url in job.server_urls).items() if times > 1],
        "names {it} twice; name every server once"),
    Rule("vllm", lambda job: sorted(_VLLM & job.vllm.keys()), _GIVEN_ANYWAY),
    Rule("sglang", lambda job: sorted(_SGLANG & job.sglang.keys()), _GIVEN_ANYWAY),
    *map(_without_secret, FIELDS),
    *(_effect(need) for need in NEEDS if need.is_error),
)  # fmt: skip

WARNINGS: tuple[Rule, ...] = (
    Rule("train_batch_size", lambda job: not job.strict_batch_rule and job.off_policy_steps,
         _OFF_POLICY + "on-policy from {samples}"),
    Rule("max_new_tokens", lambda job: (job.max_new_tokens or 0) >= job.max_len,
         "has no effect: max_len = {max_len} leaves at most {longest} tokens; lower it or leave it "
         "out"),
    Rule("async_level", lambda job: job.async_level and not job.corrects,
         "trains on samples that are one policy version late; a rollout_correction, e.g. "
         '"token_tis", weighs them'),
    Rule("kl_estimator",
         lambda job: job.init_kl_coef and job.kl_in_reward and job.kl_estimator != "k1",
         "in the reward hardly pulls to the reference, where only k1 has the right gradient; use "
         '"k1", or kl_placement = "loss"'),
    Rule("actor_learning_rate",
         lambda job: job.actor_learning_rate > 1e-4 and job.init == "pretrained",
         "is far above the 1e-6 to 1e-5 that pretrained models take, and may ruin this one; make "
         "sure that it is meant"),
    Rule("actor_learning_rate",
         lambda job: (job.advantage_estimator == "gae"
                      and job.critic_learning_rate < job.actor_learning_rate),
         "is above critic_learning_rate = {critic_learning_rate}; the critic usually learns "
         "faster: lower the first or raise the second"),
    Rule("n_samples_per_prompt", lambda job: job.n_samples_per_prompt == 1 and
         job.advantage_estimator not in ("reinforce", "reinforce_plus_plus", "gae", "rloo"),
         _ALONE + ", so that every advantage is 0; use 2 or more"),
    *(_effect(need) for need in NEEDS if not need.is_error),
    *map(_unusual, RANGES),
)  # fmt: skip

ABSENT: tuple[Rule, ...] = (
    Rule("engine_type", _engine_fault),
    Rule("images_key", lambda job: (job.sees_images
                                    and (job.server_urls or job.engine_type == "sglang")),
         "(or mixed_mm_data): images are not read by engine_type = {engine_type} with server_urls "
         '= {server_urls}; use engine_type = "native", or "vllm" without server_urls'),
    Rule("reward", lambda job: [rule.name for rule in job.functions
                                if rule.name in ("math", "gsm8k") and not find_spec("math_verify")],
         "functions: '{it}' needs math-verify: pip install 'torchrft[math]'"),
    Rule("prompt_data", lambda job: job.prompt_data is None,
         "is missing; a run needs training prompts: --prompt_data FILE.jsonl"),
    Rule("functions", lambda job: not (job.config.reward.names(job.pretrain) or job.name),
         "is missing; a run needs a reward: --functions exact_match, reward_pretrain or "
         "remote_rm_url"),
)  # fmt: skip
"""What stops a real run only; a dry run notes it."""
