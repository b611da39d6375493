"""Each rule over several fields: a config that passes, one that does not, and its message."""

from importlib import metadata

import pytest

from torchrft.config.fields import FIELDS, is_set
from torchrft.config.job import batch_arithmetic, job_of, smallest_world_size
from torchrft.config.job_config import JobConfig
from torchrft.config.manager import ConfigError, load
from torchrft.config.needs import NEEDS
from torchrft.config.rules import RANGES, Findings, check, unavailable
from torchrft.config.start import start_notes

REQUIRED = {"pretrain": "m", "train_batch_size": 64, "rollout_batch_size": 16}


def make(**fields) -> JobConfig:
    tables: dict[str, dict] = {section: {} for section in JobConfig.model_fields}
    for name, value in {**REQUIRED, **fields}.items():
        tables[FIELDS[name].section][name] = value
    return JobConfig.model_validate(tables)


def found(world_size: int = 1, **fields) -> Findings:
    return check(make(**fields), world_size)


def test_the_smallest_config_has_no_findings():
    assert found() == Findings([], [])


def test_random_weights_may_learn_fast():
    assert found(actor_learning_rate=7e-4, init="random") == Findings([], [])
    assert found(actor_learning_rate=1e-4) == Findings([], [])


ERRORS = [
    # the guide's rule 1, in both directions
    (
        {"train_batch_size": 96},
        1,
        "[training] train_batch_size = 96 must be a multiple of rollout_batch_size x "
        "n_samples_per_prompt = 16 x 4 = 64, but 96 % 64 = 32; use 64 or 128, or another "
        "rollout_batch_size or n_samples_per_prompt",
    ),
    (
        {"train_batch_size": 48},
        1,
        "[training] train_batch_size = 48 is below rollout_batch_size x n_samples_per_prompt = "
        "16 x 4 = 64, so it must divide it, but 64 % 48 = 16; use 64 or a divisor of it",
    ),
    (
        {"train_batch_size": 32, "strict_batch_rule": True},
        1,
        "[training] train_batch_size = 32 is below rollout_batch_size x n_samples_per_prompt = "
        "16 x 4 = 64: 1 of a rollout's 2 optimizer steps (max_epochs x 64 / train_batch_size = "
        "1 x 64 / 32) are off-policy; strict_batch_rule = true demands at least 64",
    ),
    # rule 2
    (
        {"micro_train_batch_size": 3},
        1,
        "[training] train_batch_size = 64 must be a multiple of micro_train_batch_size x dp = "
        "3 x 1 = 3 (dp = world_size / (tp_size x sp_size) = 1 / (1 x 1) = 1), but 64 % 3 = 1; "
        "use 63 or 66",
    ),
    (
        {"micro_train_batch_size": 128},
        1,
        "128 x 1 = 128 (dp = world_size / (tp_size x sp_size) = 1 / (1 x 1) = 1), but 64 % 128 = "
        "64; use 128",
    ),
    (
        {"train_batch_size": 72, "rollout_batch_size": 18},
        8,
        "[rollout] rollout_batch_size = 18 must be a multiple of dp = 8 (dp = world_size / "
        "(tp_size x sp_size) = 8 / (1 x 1) = 8), but 18 % 8 = 2; use 16 or 24",
    ),
    # rule 3, and the layout
    (
        {"engine_tp_size": 3},
        4,
        "[parallel] world_size = 4 must be a multiple of engine_tp_size = 3, but 4 % 3 = 1; use 3 "
        "or 6, or another engine_tp_size",
    ),
    (
        {"tp_size": 2, "sp_size": 2, "dp_replicate": 2},
        4,
        "[parallel] world_size = 4 must be a multiple of tp_size x sp_size x dp_replicate = "
        "2 x 2 x 2 = 8, but 4 % 8 = 4; use 8, or another tp_size or sp_size or dp_replicate",
    ),
    (
        {"dp_shard": 2, "tp_size": 2},
        8,
        "[parallel] dp_shard = 2 must fill the job: world_size / "
        "(tp_size x sp_size x dp_replicate) = 8 / (2 x 1 x 1) = 4; use -1 or 4",
    ),
    # lengths
    (
        {"max_len": 512, "prompt_max_len": 512},
        1,
        "[data] prompt_max_len = 512 must be below max_len = 512, or no token is left for a "
        "response; use at most 511",
    ),
    ({"max_len": 1}, 1, "[data] max_len = 1 leaves no room for a prompt and a response; use 2"),
    (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        1,
        "[rollout] min_new_tokens = 9 is above the longest response, min(max_len - 1, "
        "max_new_tokens) = 8; use at most 8",
    ),
    (
        {"overlong_buffer_len": 9, "max_new_tokens": 8},
        1,
        "[reward] overlong_buffer_len = 9 is above the longest response",
    ),
    (
        {"packing_samples": True, "max_tokens_per_microbatch": 4095},
        1,
        "[training] max_tokens_per_microbatch = 4095 is below max_len = 4096",
    ),
    # combinations
    (
        {"fsdp": True, "zero_stage": 2},
        1,
        "[parallel] zero_stage = 2 and fsdp = true exclude each other; leave one out",
    ),
    (
        {"engine_type": "vllm", "server_urls": ["http://a:1", "http://b:1", "http://a:1/"]},
        1,
        '[rollout] server_urls = ["http://a:1", "http://b:1", "http://a:1/"] names http://a:1 '
        "twice; name every server once",
    ),
    *(
        (
            {"engine_type": engine, engine: {option: 1}},
            1,
            f"[rollout] {engine} = {{\"{option}\": 1}} holds '{option}', which must not be there; "
            "torchrft sets it itself, from pretrain, trust_remote_code, bf16, engine_tp_size",
        )
        for engine, option in (
            ("vllm", "max_model_len"),
            ("vllm", "distributed_executor_backend"),
            ("vllm", "hf_overrides"),
            ("sglang", "tp_size"),
            ("vllm", "trust_remote_code"),
            ("sglang", "trust_remote_code"),
            ("sglang", "custom_weight_loader"),
        )
    ),
    *(
        (
            {"engine_type": "vllm", "server_urls": [url]},
            1,
            f'[rollout] server_urls = ["{shown}"] holds "{shown}": a URL is shown in logs and '
            "trackers, so it may hold no password or key; put a bearer token into",
        )
        for url, shown in (
            ("http://me:pass@a:1", "http://***@a:1"),
            ("https://me@a:1", "https://***@a:1"),
            ("http://a:1/v1?token=pass", "http://a:1/v1?token=***"),
            ("http://a:1/v1?n=1&api_key=pass&m=2", "http://a:1/v1?n=1&api_key=***&m=2"),
        )
    ),
    (
        {"engine_type": "vllm", "server_urls": ["me:pass@a:1"]},
        1,
        '[rollout] server_urls = ["***@a:1"] holds "***@a:1"; write each as http://host:port',
    ),
    (
        {"engine_type": "vllm", "vllm": {"hf_token": "pass"}},
        1,
        '[rollout] vllm = {"hf_token": "***"} holds a secret, hf_token, which config.toml and '
        "trackers would show; leave it out, and read it from the environment",
    ),
    (
        {"functions": [{"name": "exact_match", "options": {"my_api_key": "pass"}}]},
        1,
        "holds a secret, my_api_key, which config.toml and trackers would show",
    ),
    (
        {"images_key": "i", "min_pixels": 100, "max_pixels": 10},
        1,
        "[data] min_pixels = 100 is above max_pixels = 10; lower it or raise the other",
    ),
    (
        {"mixed_mm_data": True, "tp_size": 2},
        2,
        "[parallel] tp_size = 2 does not split models that see images; use fsdp, zero_stage = 3",
    ),
    (
        {"compile": True, "tp_size": 2},
        2,
        "[training] compile = true with tp_size = 2 needs gradient_checkpointing = true",
    ),
    (
        {"kl_controller": "adaptive", "init_kl_coef": 0.0},
        1,
        '[algorithm] kl_controller = "adaptive" cannot adapt init_kl_coef = 0.0, which stays 0',
    ),
    (
        {"high_entropy_token_ratio": 0.2, "advantage_estimator": "gmpo"},
        1,
        "[algorithm] high_entropy_token_ratio = 0.2 chooses or weighs tokens, but the gmpo policy "
        "loss is one number per sequence; use 1.0",
    ),
    (
        {"clip_range": 1.0, "advantage_estimator": "cpgd"},
        1,
        "[algorithm] clip_range = 1.0 must be below 1 for the cpgd policy loss",
    ),
    (
        {"advantage_estimator": "rloo", "n_samples_per_prompt": 1, "train_batch_size": 16},
        1,
        '[rollout] n_samples_per_prompt = 1 gives advantage_estimator = "rloo" no other sample to '
        "compare with; use 2 or more",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "world_size", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors(fields, world_size, message):
    errors = found(world_size, **fields).errors
    assert len(errors) == 1
    assert message in errors[0]


WARNINGS = [
    (
        {"train_batch_size": 32, "max_epochs": 2},
        "[training] train_batch_size = 32 is below rollout_batch_size x n_samples_per_prompt = "
        "16 x 4 = 64: 3 of a rollout's 4 optimizer steps (max_epochs x 64 / train_batch_size = "
        "2 x 64 / 32) are off-policy; on-policy from 64",
    ),
    (
        {"advantage_estimator": "gae", "actor_learning_rate": 1e-5},
        "[optimizer] actor_learning_rate = 1e-05 is above critic_learning_rate = 9e-06",
    ),
    (
        {"actor_learning_rate": 7e-4},
        "[optimizer] actor_learning_rate = 0.0007 is far above the 1e-6 to 1e-5 that pretrained "
        "models take, and may ruin this one; make sure that it is meant",
    ),
    (
        {"kl_target": 0.1, "kl_controller": "adaptive"},
        "[algorithm] kl_target = 0.1 is outside the usual range 0.001 to 0.01",
    ),
    (
        {"kl_target": 0.0001, "advantage_estimator": "cpgd"},
        "[algorithm] kl_target = 0.0001 is outside the usual range 0.001 to 0.01",
    ),
    ({"temperature": 1.3}, "[rollout] temperature = 1.3 is outside the usual range 0.6 to 1.2"),
    ({"top_p": 0.7}, "[rollout] top_p = 0.7 is outside the usual range 0.8 to 1.0"),
    ({"clip_range": 0.4}, "[algorithm] clip_range = 0.4 is outside the usual range 0.1 to 0.3"),
    (
        {"clip_range": 0.2, "advantage_estimator": "gspo"},
        "[algorithm] clip_range = 0.2 is outside the usual range 0.0001 to 0.01",
    ),
    (
        {"clip_range_higher": 0.3, "policy_loss": "gspo"},
        "[algorithm] clip_range_higher = 0.3 is outside the usual range 0.0001 to 0.01",
    ),
    (
        {"clip_range": 3e-4, "policy_loss": "gmpo"},
        "[algorithm] clip_range = 0.0003 is outside the usual range 0.1 to 1.0",
    ),
    ({"lr_warmup_ratio": 0.2}, "[optimizer] lr_warmup_ratio = 0.2 is outside the usual range 0.0"),
    ({"init_kl_coef": 0.1}, "[algorithm] init_kl_coef = 0.1 is outside the usual range 0.0001"),
    ({"engine_mem_util": 0.95}, "[rollout] engine_mem_util = 0.95 is outside the usual range 0.3"),
    (
        {"kl_estimator": "k3", "advantage_estimator": "reinforce_plus_plus"},
        '[algorithm] kl_estimator = "k3" in the reward hardly pulls to the reference, where only '
        'k1 has the right gradient; use "k1", or kl_placement = "loss"',
    ),
    ({"kl_estimator": "k2", "kl_placement": "reward"}, '[algorithm] kl_estimator = "k2" in the'),
    (
        {"max_new_tokens": 4096},
        "[rollout] max_new_tokens = 4096 has no effect: max_len = 4096 leaves at most 4095 tokens",
    ),
    (
        {"n_samples_per_prompt": 1, "train_batch_size": 16},
        '[rollout] n_samples_per_prompt = 1 gives advantage_estimator = "group_norm" no other '
        "sample to compare with, so that every advantage is 0; use 2 or more",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "message"), WARNINGS, ids=lambda v: str(v)[:40])
def test_warnings(fields, message):
    findings = found(**fields)
    assert findings.errors == []
    assert len(findings.warnings) == 1
    assert message in findings.warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "world_size"),
    [
        ({"train_batch_size": 128}, 1),  # gradients accumulate over two rollouts
        ({"micro_train_batch_size": 16}, 4),
        ({"engine_tp_size": 2}, 4),
        ({"tp_size": 2, "sp_size": 2, "dp_replicate": 2}, 8),
        ({"tp_size": 2, "dp_replicate": 2, "dp_shard": 2}, 8),
        ({"max_len": 512}, 1),  # prompt_max_len is left at 2048: prompts may take up to 511
        ({"max_len": 512, "prompt_max_len": 511}, 1),
        ({"min_new_tokens": 8, "max_new_tokens": 8}, 1),
        ({"packing_samples": True, "max_tokens_per_microbatch": 4096}, 1),
        ({"fsdp": True}, 1),
        ({"zero_stage": 3}, 1),
        ({"init_kl_coef": 0.0}, 1),
        ({"kl_controller": "adaptive", "kl_target": 0.005, "kl_horizon": 9}, 1),
        ({"advantage_estimator": "gae", "critic_learning_rate": 1e-5, "value_clip": 0.1}, 1),
        ({"advantage_estimator": "gmpo", "clip_range": 0.4}, 1),
        ({"advantage_estimator": "gspo", "clip_range": 3e-4}, 1),
        ({"advantage_estimator": "reinforce_plus_plus"}, 1),  # its KL estimator is k1
        ({"kl_placement": "reward"}, 1),
        ({"kl_estimator": "k1"}, 1),
        (
            {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "loss"}
            | {"kl_estimator": "k3"},
            1,
        ),
        ({"advantage_estimator": "cispo", "clip_range": 1.0}, 1),  # as the resolved config says
        ({"advantage_estimator": "cispo", "clip_range": 10.0, "clip_range_higher": 4.0}, 1),
        ({"clip_range_higher": 0.28}, 1),
        ({"advantage_estimator": "reinforce", "n_samples_per_prompt": 1, "gamma": 0.9}, 16),
        ({"reward_running_norm_minus_mean": False, "freezing_actor_steps": 0}, 1),  # "off" aloud
        ({"kl_target": 0.005, "advantage_estimator": "cpgd", "cpgd_weight": "none"}, 1),
    ],
)
def test_passes(fields, world_size):
    if fields.get("n_samples_per_prompt") == 1:
        fields = {**fields, "train_batch_size": 16}
    assert found(world_size, **fields) == Findings([], [])


# For each field that needs another one: a value, what meets the need.
FUNCTION = {"functions": ["exact_match"]}
SERVER = {"remote_rm_url": ["http://a:1"]}
JUDGE = {"pretrain": "p", "template": "{{ response }}"}
NEED_CASES = {
    "processor": ("p", {"mixed_mm_data": True}, {}),
    "min_pixels": (100, {"images_key": "image"}, {}),
    "max_pixels": (100, {"images_key": "image"}, {}),
    "ref_pretrain": ("r", {"init_kl_coef": 0.001}, {"init_kl_coef": 0.0}),
    "kl_estimator": ("k1", {"init_kl_coef": 0.001}, {"init_kl_coef": 0.0}),
    "kl_placement": ("loss", {"init_kl_coef": 0.001}, {"init_kl_coef": 0.0}),
    "kl_target": (0.01, {"kl_controller": "adaptive"}, {}),
    "kl_horizon": (100, {"kl_controller": "adaptive"}, {}),
    "clip_range": (0.2, {"policy_loss": "cispo"}, {"policy_loss": "reinforce"}),
    "clip_range_higher": (0.2, {"policy_loss": "cispo"}, {"policy_loss": "reinforce"}),
    "dual_clip": (3.0, {}, {"policy_loss": "reinforce"}),
    "critic_pretrain": ("c", {"advantage_estimator": "gae"}, {}),
    "critic_learning_rate": (1e-6, {"advantage_estimator": "gae"}, {}),
    "freezing_actor_steps": (1, {"advantage_estimator": "gae"}, {}),
    "value_clip": (0.2, {"advantage_estimator": "gae"}, {}),
    "lambd": (0.95, {"advantage_estimator": "gae"}, {}),
    "gamma": (1.0, {"advantage_estimator": "reinforce"}, {}),
    "cpgd_weight": ("std", {"advantage_estimator": "cpgd"}, {}),
    "cpgd_drift_coef": (0.1, {"policy_loss": "cpgd"}, {}),
    "rollout_correction_cap": (2.0, {"rollout_correction": "token_tis"}, {}),
    "options": ({"highest": 9}, {"name": "my_env.py:Guess"}, {}),
    "max_turns": (3, {"name": "my_env.py:Guess"}, {}),
    "episode_schedule": ("free", {"name": "my_env.py:Guess"}, {}),
    "environment_timeout": (5.0, {"name": "my_env.py:Guess"}, {}),
    "environment_workers": (2, {"name": "my_env.py:Guess"}, {}),
    "environment_weight": (0.5, {"name": "my_env.py:Guess"}, {}),
    "dynamic_sampling_max_rounds": (4, {"dynamic_sampling": True}, {}),
    "overlong_penalty_factor": (1.0, {"overlong_buffer_len": 8}, {}),
    "reward_running_norm_minus_mean": (True, {"reward_running_norm": True}, {}),
    "system_prompt": ("s", {"apply_chat_template": True}, {}),
    "chat_template_kwargs": ({"x": False}, {"apply_chat_template": True}, {}),
    "max_tokens_per_microbatch": (8192, {"packing_samples": True}, {}),
    "chunk_size": (4096, {"fused_linear_logprob": True}, {}),
    "checkpointing_mode": (
        "selective",
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
    ),
    "lr_min_ratio": (0.1, {"lr_decay": "linear"}, {"lr_decay": "constant"}),
    "engine_mem_util": (0.5, {"engine_type": "vllm"}, {"engine_type": "native"}),
    "engine_tp_size": (1, {"engine_type": "vllm"}, {"engine_type": "native"}),
    "vllm": ({"seed": 1}, {"engine_type": "vllm"}, {"engine_type": "sglang"}),
    "sglang": ({"tp": 1}, {"engine_type": "sglang"}, {"engine_type": "vllm"}),
    "first_token_temperature": (2.0, {"engine_type": "native"}, {"engine_type": "vllm"}),
    "server_urls": (["http://a:1"], {"engine_type": "vllm"}, {"engine_type": "native"}),
    "request_timeout": (9.0, {"engine_type": "vllm", "server_urls": ["http://a:1"]}, {}),
    "request_retries": (2, {"engine_type": "vllm", "server_urls": ["http://a:1"]}, {}),
    "async_level": (
        1,
        {"engine_type": "vllm", "server_urls": ["http://a:1"], "rollout_correction": "token_tis"},
        {"rollout_correction": "token_tis"},
    ),
    "weight_folder": ("w", {"engine_type": "vllm", "server_urls": ["http://a:1"]}, {}),
    "truncation_replay": (
        True,
        {"engine_type": "native", "top_k": 20},
        {"engine_type": "vllm", "top_p": 1.0},
    ),
    "fp32_head": (True, {"bf16": True, "engine_type": "native"}, {"bf16": False}),
    "use_mp_opt": (True, {"bf16": True}, {"bf16": False}),
    "reward_timeout": (5.0, FUNCTION, {}),
    "reward_workers": (5, FUNCTION, {}),
    "reward_memory": (5.0, FUNCTION, {}),
    "allow_unsafe_code": (True, {"functions": ["code"]}, FUNCTION),
    "error_reward": (-1.0, FUNCTION, {"reward_pretrain": "r"}),
    "max_reward_failures": (0.1, FUNCTION, {"reward_pretrain": "r"}),
    "reward_model_offload": (True, {"reward_pretrain": "r"}, FUNCTION),
    "rm_use_engine": (True, {"reward_pretrain": "r"}, {"judges": [JUDGE]}),
    "remote_rm_weight": (2.0, SERVER, FUNCTION),
    "remote_rm_normalize": (True, SERVER, FUNCTION),
    "remote_rm_protocol": ("predecessor", SERVER, FUNCTION),
    "remote_rm_timeout": (5.0, SERVER, FUNCTION),
    "remote_rm_deadline": (5.0, SERVER, FUNCTION),
    "remote_rm_retries": (5, SERVER, FUNCTION),
    "remote_rm_batch_size": (5, SERVER, FUNCTION),
    "remote_rm_concurrency": (5, SERVER, FUNCTION),
    "remote_rm_token_env": ("TOKEN", SERVER, FUNCTION),
    "source_key": ("kind", {**FUNCTION, "recipes": {"a": ["exact_match"]}}, FUNCTION),
    "recipes": ({"a": ["exact_match"]}, {**FUNCTION, "source_key": "kind"}, FUNCTION),
    "gate_reward": (1.0, {**FUNCTION, "gate": ["exact_match"]}, FUNCTION),
    "eval_steps": (5, {"eval_data": "e"}, {}),
    "ckpt_path": ("c", {"load_checkpoint": True}, {}),
    "wandb_org": ("o", {"use_wandb": "p"}, {}),
    "wandb_run_name": ("r", {"use_wandb": "p"}, {}),
}


def test_every_need_has_a_case():
    assert {need.field for need in NEEDS} == set(NEED_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.field)
def test_options_without_effect(need):
    value, met, unmet = NEED_CASES[need.field]
    if need.field == "critic_learning_rate":
        met = {**met, "actor_learning_rate": 1e-7}
    mine = f"[{FIELDS[need.field].section}] {need.field} = "
    passing = found(**{need.field: value, **met})
    assert passing == Findings([], [])
    findings = found(**{need.field: value, **unmet})
    texts = findings.errors if need.is_error else findings.warnings
    (text,) = [text for text in texts if text.startswith(mine)]
    assert f"has no effect without {need.needs}; set that, or leave {need.field} out" in text
    # Unset, its default is no fault.
    assert not [t for t in [*found(**unmet).errors, *found(**unmet).warnings] if t.startswith(mine)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"functions": ["a.py:f", "a.py:f"]}, '[reward] has two sources named "a.py:f"'),
        ({"functions": ["remote"], **SERVER}, '[reward] has two sources named "remote"'),
        ({"reward_pretrain": ["x/r", "y/r"]}, '[reward] has two sources named "r"'),
        (
            {**FUNCTION, "gate": ["format"]},
            '[reward] gate names "format", which is no reward of this job; there are exact_match',
        ),
        (
            {**SERVER, "source_key": "k", "recipes": {"a": ["remote", "b"]}},
            '[reward] recipes.a names "b", which is no reward of this job; there are remote',
        ),
    ],
)
def test_names_of_rewards(options, text):
    (error,) = found(**options).errors
    assert error.startswith(text)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            {"judges": [{**JUDGE, "model": "m", "timeout": 5.0, "aggregate": "mean"}]},
            [
                "judge 'judge': model has no effect with engine = \"native\" and votes = 1",
                "judge 'judge': timeout has no effect with",
                "judge 'judge': aggregate has no effect with",
            ],
        ),
        (
            {"judges": [{**JUDGE, "engine": "remote", "server_url": "http://a:1", "model": "m"}]},
            ["judge 'judge': pretrain has no effect with engine = \"remote\""],
        ),
        (
            {"judges": [{"template": "t", "engine": "remote", "model": "m"}]},
            ["judge 'judge': engine = \"remote\" needs server_url and model"],
        ),
        (
            {"judges": [{"template": "t", "engine": "vllm", "votes": 3}]},
            [
                "judge 'judge': engine = \"vllm\" needs pretrain",
                "judge 'judge': votes = 3 at temperature = 0 would all be equal",
            ],
        ),
        (
            {"judges": [{"template": "t", "engine": "remote", "server_url": "b:1", "model": "m"}]},
            ["[reward] judge 'judge': server_url holds \"b:1\"; write each as http://host:port"],
        ),
        ({"remote_rm_url": ["a:1"]}, ['holds "a:1"; write each as http://host:port']),
        (
            {"server_urls": ["ftp://a"], "engine_type": "vllm"},
            ['holds "ftp://a"; write each as http://host:port'],
        ),
        (
            {"functions": [{"name": "length", "weight": 0.0}], "reward_pretrain": []},
            ["every weight is 0, so that every reward is"],
        ),
        (
            {
                "functions": ["length", {"name": "exact_match", "weight": 0.0}],
                "source_key": "k",
                "recipes": {"a": ["exact_match"], "b": ["length"]},
            },
            ["every weight of recipes.a is 0, so that every reward is"],
        ),
        (
            {"judges": [{**JUDGE, "max_new_tokens": 5000}]},
            ["judge 'judge': max_new_tokens must be below max_len = 4096"],
        ),
        (
            {**SERVER, **FUNCTION, "source_key": "k", "recipes": {"a": [], "b": ["remote"]}},
            [
                "every weight of recipes.a is 0",
                'no recipe names "exact_match", which then never counts',
            ],
        ),
        (
            {"functions": [{"name": "f.py:g", "alias": "overlong"}], "overlong_buffer_len": 2},
            ['"overlong" is the overlong penalty'],
        ),
    ],
)
def test_rewards_that_cannot_be_meant(options, texts):
    errors = found(**options).errors
    assert len(errors) == len(texts)
    for error, text in zip(errors, texts, strict=True):
        assert text in error


def test_a_gate_may_reward_where_every_weight_is_0():
    functions = [{"name": "format", "weight": 0.0}]
    assert found(functions=functions, gate=["format"], gate_reward=-1.0) == Findings([], [])
    assert found(functions=functions, overlong_buffer_len=2) == Findings([], [])


def test_ranges_judge_only_what_was_set():
    defaults = make()
    assert not any(is_set(defaults, name) for name in RANGES)
    for name, (low, high) in RANGES.items():
        assert low <= FIELDS[name].info.default <= high


def test_batch_arithmetic():
    config = make(train_batch_size=128, rollout_batch_size=64, n_samples_per_prompt=8)
    lines = batch_arithmetic(config, 8)
    assert lines == [
        "samples per rollout = rollout_batch_size x n_samples_per_prompt = 64 x 8 = 512",
        "samples per rank and rollout = 512 / dp = 512 / 8 = 64",
        "optimizer steps per rollout = max_epochs x 512 / train_batch_size = 1 x 512 / 128 = 4",
        "micro-batches per optimizer step and rank = train_batch_size / (micro_train_batch_size x "
        "dp) = 128 / (1 x 8) = 16",
    ]
    accumulated = batch_arithmetic(make(train_batch_size=256, packing_samples=True), 2)
    assert accumulated[2:] == [
        "rollouts per optimizer step = train_batch_size / 64 = 256 / 64 = 4, with max_epochs = 1",
        "tokens per packed micro-batch <= 4096, 128 samples per rank",
    ]


def test_world_sizes():
    config = make(tp_size=2, sp_size=2, dp_replicate=3, engine_tp_size=8)
    assert smallest_world_size(config) == 24
    assert job_of(config, 24).dp == 6
    assert smallest_world_size(make(dp_shard=4)) == 4


def ready(**fields) -> JobConfig:
    """A config that names prompts and a reward."""
    return make(prompt_data="p.jsonl", functions=["exact_match"], **fields)


def test_unavailable_names_the_remedy(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    assert unavailable(ready(engine_type="native")) == []
    assert unavailable(ready(engine_type="vllm", server_urls=["http://a:1"])) == []
    assert unavailable(ready(engine_type="sglang")) == [
        '[rollout] engine_type = "sglang" needs sglang 0.5 to below 0.6, but 9.9 is installed: pip '
        "install sglang, on a machine with a GPU (docs/rollout_engines.md), or use engine_type = "
        '"native"',
    ]


def test_images_come_from_the_native_engine_or_from_vllm_in_the_trainers_process(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.30")
    assert unavailable(ready(engine_type="native", images_key="i")) == []
    assert unavailable(ready(engine_type="vllm", images_key="i")) == []
    (text,) = unavailable(ready(engine_type="vllm", images_key="i", server_urls=["http://a:1"]))
    assert text.startswith('[data] images_key = "i" (or mixed_mm_data): images are not read')
    assert 'server_urls = ["http://a:1"]; use engine_type = "native", or "vllm" without' in text
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.1")
    (text,) = unavailable(ready(engine_type="sglang", mixed_mm_data=True))
    assert 'images are not read by engine_type = "sglang" with server_urls = []; use' in text


def test_missing_is_met_by_any_reward_source():
    native = {"engine_type": "native"}
    assert len(unavailable(make(**native))) == 2
    for source in (
        {"functions": ["exact_match"]},
        {"reward_pretrain": "r"},
        {"remote_rm_url": "http://r"},
        {"rm_use_engine": True},
    ):
        assert unavailable(make(prompt_data="p.jsonl", **native, **source)) == []


def test_warnings_do_not_stop_a_real_run(monkeypatch):
    for name in ("WORLD_SIZE", "NGPU"):
        monkeypatch.delenv(name, raising=False)
    argv = ["--engine_type", "native", "--prompt_data", "p", "--functions", "f", "--pretrain", "m"]
    argv += ["--train_batch_size", "32", "--rollout_batch_size", "16"]
    loaded = load(argv)
    assert len(loaded.warnings) == 1
    assert loaded.notes == ()
    assert loaded.world_size == 1
    with pytest.raises(ConfigError, match="strict_batch_rule = true demands at least 64"):
        load([*argv, "--strict_batch_rule"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine_type": "native", "top_p": 1.0, "truncation_replay": True}, "has no effect"),
        ({"engine_type": "sglang", "top_p": 0.9, "truncation_replay": True}, "has no effect"),
        ({"engine_type": "vllm", "top_k": 5, "truncation_replay": True}, "has no effect"),
        ({"engine_type": "sglang", "fp32_head": True}, "has no effect"),
        ({"engine_type": "vllm", "server_urls": ["http://a:1"], "fp32_head": True}, "has no eff"),
        ({"engine_type": "vllm", "fp32_head": True, "bf16": False}, "has no effect"),
        ({"engine_type": "vllm", "fp32_head": True}, ""),
        ({"engine_type": "native", "top_p": 0.9, "truncation_replay": True}, ""),
    ],
)
def test_which_engines_replay_truncation_and_have_an_fp32_head(options, message):
    errors = found(**options).errors
    assert len(errors) == bool(message)
    assert not message or message in errors[0]


SCHEDULES = [  # options, prompts, part of the note
    ({"max_steps": 20}, 6400, "max_steps = 20 makes 20 of the 400 optimizer steps"),
    ({"max_steps": 20}, 6400, "ends at 100% of its peak, above lr_min_ratio = 0.1; lr_total"),
    ({"max_steps": 150}, 6400, "which ends at 75% of its peak, above lr_min_ratio = 0.1; lr_tot"),
    ({"max_steps": 10}, 6400, "which ends at 83% of its peak, in its warm-up of 12; lr_total"),
    ({"max_steps": 10}, 6400, "; lr_total_steps = 10 fits it"),
    ({"max_steps": 10, "train_batch_size": 128}, 6400, "makes 5 of the 200 optimizer steps"),
    ({"max_steps": 10, "max_epochs": 2}, 6400, "makes 20 of the 800 optimizer steps"),
    ({"max_steps": 380}, 6400, None),
    ({"max_steps": 500}, 6400, None),
    ({}, 6400, None),
    ({"max_steps": 20, "lr_decay": "constant"}, 6400, None),
    ({"max_steps": 20, "lr_total_steps": 20}, 6400, None),
    ({"max_steps": 20, "lr_total_steps": 30}, 6400, None),
    ({"max_steps": 20, "lr_total_steps": 1000}, 6400, "makes 20 of the 1000 optimizer steps"),
    ({"max_steps": 20, "lr_total_steps": 1000}, None, None),
    ({"max_steps": 20}, None, None),
    ({"max_steps": 9, "freezing_actor_steps": 5}, 6400, "max_steps = 9 makes 4 of the 400"),
    ({"lr_total_steps": 20000}, 6400, "num_episodes = 1 makes 400 of the 20000 optimizer steps"),
    ({"max_steps": 1, "lr_warmup_ratio": 1.0, "lr_total_steps": 1}, 6400, None),
]


@pytest.mark.parametrize(("options", "prompts", "part"), SCHEDULES)
def test_a_run_that_leaves_its_schedule_unused_is_told(options, prompts, part):
    """16 prompts x 4 samples a rollout, one optimizer step each."""
    config = make(top_p=1.0, **options)
    notes = start_notes(config, prompts, False)
    assert len(notes) == (part is not None)
    assert part is None or part in notes[0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "[rollout] top_p = 0.9 truncates what is sampled, but training takes log-probs over"),
        ({"top_p": 1.0, "top_k": 5}, "[rollout] top_k = 5 truncates what is sampled"),
        ({"top_p": 1.0}, None),
        ({"top_p": 0.9, "engine_type": "native", "truncation_replay": True}, None),
    ],
)
def test_truncated_sampling_is_told(options, part):
    notes = start_notes(make(**options), None, False)
    assert len(notes) == (part is not None)
    assert part is None or (part in notes[0] and "truncation_replay = true" in notes[0])
