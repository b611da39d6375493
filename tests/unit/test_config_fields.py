"""Every field, and what proves that it has an effect; schema and docs in step with the fields."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import jsonschema
import pytest
import tiny_job
from pydantic import TypeAdapter, ValidationError

from torchrft.config import choices
from torchrft.config.fields import FIELDS, SECTIONS, branches
from torchrft.config.job_config import JobConfig
from torchrft.config.manager import ConfigError, load
from torchrft.config.reward_config import TABLES
from torchrft.config.rules import unavailable

ROOT = Path(__file__).parents[2]
schema = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "config_docs.py")))
UNIT = "tests/unit/test_"

LATER = "unavailable"
REMOTE = "tests/engines/test_remote_engine.py::test_"
REMOTE_RM = UNIT + "rewards_remote.py::test_"
RESUME = UNIT + "trainer_resume.py::test_resumed_run_is_bit_identical"
WARNED = UNIT + "config_validation.py::test_options_without_effect"

# Field -> the test that fails if the field has no effect, or LATER while its feature is missing.
FIELD_PROOF: dict[str, str] = {
    # model
    "pretrain": UNIT + "models_loader.py::test_pretrained_weights_are_loaded",
    "init": UNIT + "models_loader.py::test_random_weights_depend_on_the_seed_only",
    "ref_pretrain": UNIT + "trainer.py::test_reference_model_from_ref_pretrain",
    "critic_pretrain": UNIT + "trainer_algorithms.py::test_critic_options",
    "trust_remote_code": UNIT
    + "models_remote_code.py::test_a_job_that_trusts_the_code_trains_the_models_class",
    "fp32_head": UNIT + "models_policy.py::test_fp32_head",
    "freeze_vision": UNIT + "parallel_vision.py::test_freeze_vision_trains_the_language_model_only",
    # data
    "prompt_data": UNIT + "data_prompts.py::test_jsonl_values",
    "input_key": UNIT + "data_prompts.py::test_jsonl_values",
    "label_key": UNIT + "data_prompts.py::test_jsonl_values",
    "images_key": UNIT + "data_images.py::test_every_way_to_name_a_picture",
    "metadata_keys": UNIT + "data_prompts.py::test_jsonl_values",
    "system_prompt": UNIT + "data_prompts.py::test_chat_template_and_system_prompt",
    "apply_chat_template": UNIT + "data_prompts.py::test_chat_template_and_system_prompt",
    "chat_template_kwargs": UNIT + "data_prompts.py::test_variables_of_the_chat_template",
    "max_len": UNIT + "native_engine.py::test_length_limits",
    "prompt_max_len": UNIT + "data_prompts.py::test_over_long_prompts_are_dropped_and_counted",
    "mixed_mm_data": UNIT + "data_images.py::test_mixed_data_may_lack_the_column",
    "processor": UNIT + "data_images.py::test_processor_is_detected_or_named",
    "min_pixels": UNIT + "data_images.py::test_size_bounds",
    "max_pixels": UNIT + "data_images.py::test_size_bounds",
    # training
    "num_episodes": UNIT + "data_loader.py::test_episodes_and_steps",
    "max_steps": UNIT + "trainer.py::test_max_steps_ends_the_run",
    "max_epochs": UNIT + "learner.py::test_max_epochs",
    "train_batch_size": UNIT + "learner.py::test_optimizer_steps_per_rollout",
    "micro_train_batch_size": UNIT + "learner.py::test_micro_batches_do_not_change_the_step",
    "strict_batch_rule": UNIT + "config_validation.py::test_errors",
    "packing_samples": UNIT + "learner.py::test_packing_does_not_change_the_step",
    "max_tokens_per_microbatch": UNIT + "learn_packing.py::test_token_budget",
    "freezing_actor_steps": UNIT + "trainer_algorithms.py::test_freezing_trains_the_critic_only",
    "seed": UNIT + "data_loader.py::test_order_is_fixed_by_the_seed_for_good",
    "deterministic": UNIT + "trainer.py::test_deterministic_sets_torchs_switch",
    "bf16": UNIT + "parallel_fsdp.py::test_bf16_computes_in_bfloat16",
    "compile": UNIT + "parallel_compile.py::test_twenty_ragged_steps_compile_once",
    "gradient_checkpointing": UNIT + "parallel_memory.py::test_checkpointing_keeps_less",
    "checkpointing_mode": UNIT + "parallel_memory.py::test_checkpointing_keeps_less",
    "fused_linear_logprob": UNIT + "models_policy.py::test_fused_log_probs_are_the_same",
    "chunk_size": UNIT + "models_logprobs.py::test_chunk_size_bounds_the_logits",
    # optimizer
    "actor_learning_rate": UNIT + "optim.py::test_actor_learning_rate",
    "critic_learning_rate": UNIT + "trainer_algorithms.py::test_critic_options",
    "lr_warmup_ratio": UNIT + "optim.py::test_warmup",
    "lr_total_steps": UNIT + "trainer_numerics.py::test_lr_total_steps",
    "lr_decay": UNIT + "optim.py::test_decay",
    "lr_min_ratio": UNIT + "optim.py::test_decay",
    "max_norm": UNIT + "optim.py::test_clip_by_max_norm",
    "l2": UNIT + "optim.py::test_weight_decay_on_matrices_only",
    "adam_betas": UNIT + "optim.py::test_adam_betas",
    "adam_offload": UNIT + "optim_offload.py::test_a_run_with_offload_is_the_same",
    "use_mp_opt": UNIT + "optim_offload.py::test_master_weights_keep_what_bf16_would_lose",
    # rollout
    "engine_type": "tests/engines/test_vllm_trainer.py::test_the_default_job_learns",
    "rollout_batch_size": UNIT + "trainer.py::test_rollout_has_the_configured_size",
    "micro_rollout_batch_size": UNIT + "learner.py::test_micro_rollout_batch_size",
    "n_samples_per_prompt": UNIT + "trainer.py::test_rollout_has_the_configured_size",
    "temperature": UNIT + "native_engine.py::test_temperature",
    "top_p": UNIT + "native_engine.py::test_top_p",
    "top_k": UNIT + "native_engine.py::test_top_k",
    "truncation_replay": UNIT + "trainer_numerics.py::test_truncation_replay",
    "first_token_temperature": UNIT
    + "trainer_algorithms.py::test_fire_draws_only_the_first_token_at_its_temperature",
    "max_new_tokens": UNIT + "native_engine.py::test_length_limits",
    "min_new_tokens": UNIT + "native_engine.py::test_min_new_tokens",
    "stop": UNIT + "native_engine.py::test_stop_strings",
    "stop_token_ids": UNIT + "native_engine.py::test_stop_token_ids",
    "max_num_seqs": UNIT + "native_engine.py::test_max_num_seqs",
    "engine_tp_size": "tests/engines/test_vllm_trainer.py::test_ranks_and_engines",
    "engine_mem_util": "tests/gpu/test_engines_cuda.py::test_memory_of_the_engine",
    "enable_engine_sleep": UNIT + "trainer.py::test_engine_sleeps_while_training",
    "vllm": "tests/engines/test_vllm_engine.py::test_what_vllm_refuses_is_one_sentence",
    "sglang": UNIT + "rollout_sglang.py::test_options_reach_sglang",
    "server_urls": REMOTE + "a_job_trains_as_in_process",
    "request_timeout": REMOTE + "a_slow_server_has_a_deadline",
    "request_retries": REMOTE + "retries_have_their_back_off",
    "async_level": REMOTE + "one_step_off_policy",
    "weight_folder": REMOTE + "servers_that_do_not_fit",
    "mismatch_alarm": UNIT + "trainer.py::test_mismatch_alarm",
    "dynamic_sampling": UNIT
    + "trainer_algorithms.py::test_dynamic_sampling_drops_equal_groups_and_refills",
    "dynamic_sampling_max_rounds": UNIT
    + "trainer_algorithms.py::test_dynamic_sampling_ends_after_its_rounds",
    # algorithm
    "advantage_estimator": UNIT + "trainer_algorithms.py::test_every_preset_trains",
    "advantage_options": UNIT + "trainer_algorithms.py::test_custom_algorithms",
    "policy_loss": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "policy_loss_options": UNIT + "trainer_algorithms.py::test_custom_algorithms",
    "loss_aggregation": UNIT + "learner.py::test_options_reach_the_loss",
    "kl_estimator": UNIT + "learner.py::test_kl_coefficient",
    "init_kl_coef": UNIT + "learner.py::test_kl_coefficient",
    "kl_placement": UNIT + "trainer_algorithms.py::test_kl_in_the_reward_or_in_the_loss",
    "kl_controller": UNIT
    + "trainer_algorithms.py::test_the_adaptive_coefficient_follows_its_target_and_is_saved",
    "kl_target": UNIT
    + "trainer_algorithms.py::test_the_adaptive_coefficient_follows_its_target_and_is_saved",
    "kl_horizon": UNIT
    + "trainer_algorithms.py::test_the_adaptive_coefficient_follows_its_target_and_is_saved",
    "clip_range": UNIT + "learner.py::test_options_reach_the_loss",
    "clip_range_higher": UNIT + "learner.py::test_options_reach_the_loss",
    "dual_clip": UNIT + "trainer_algorithms.py::test_dual_clip",
    "value_clip": UNIT + "trainer_algorithms.py::test_critic_options",
    "gamma": UNIT + "trainer_algorithms.py::test_gamma_and_lambd_reach_the_estimator",
    "lambd": UNIT + "trainer_algorithms.py::test_gamma_and_lambd_reach_the_estimator",
    "entropy_coef": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "high_entropy_token_ratio": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "cpgd_weight": UNIT + "trainer_algorithms.py::test_cpgd_holds_to_the_old_policy_and_adapts",
    "cpgd_drift_coef": UNIT + "trainer_algorithms.py::test_cpgd_holds_to_the_old_policy_and_adapts",
    "overlong_filtering": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "advantages_norm": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "advantage_clip": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "rollout_correction": UNIT + "trainer_algorithms.py::test_rollout_correction_weighs_the_loss",
    "rollout_correction_cap": UNIT
    + "trainer_algorithms.py::test_rollout_correction_weighs_the_loss",
    # reward
    "functions": UNIT
    + "rewards.py::test_weighted_sum_and_unweighted_parts_in_the_order_of_completions",
    "reward_pretrain": UNIT + "rewards_models.py::test_the_job_trains_with_scalar_models",
    "models": UNIT + "rewards_models.py::test_the_job_trains_with_scalar_models",
    "reward_model_offload": UNIT + "rewards_models.py::test_the_job_offloads_between_rewards",
    "judges": UNIT + "rewards_judge.py::test_the_job_trains_with_a_judge",
    "rm_use_engine": "tests/engines/test_vllm_rewards.py::"
    + "test_the_job_trains_with_a_pooling_model",
    "remote_rm_url": REMOTE_RM + "rewards_survive_a_kill_of_the_server",
    "remote_rm_weight": UNIT + "build_rewards.py::test_every_kind_has_its_weight",
    "remote_rm_normalize": UNIT + "build_rewards.py::test_every_kind_has_its_weight",
    "remote_rm_protocol": REMOTE_RM + "the_request_has_the_documented_form",
    "remote_rm_timeout": REMOTE_RM + "a_server_that_hangs_is_left",
    "remote_rm_deadline": REMOTE_RM + "the_deadline_ends_all_retries",
    "remote_rm_retries": REMOTE_RM + "transient_failures_are_retried",
    "remote_rm_batch_size": REMOTE_RM + "results_do_not_depend_on_batches_and_threads",
    "remote_rm_concurrency": REMOTE_RM + "results_do_not_depend_on_batches_and_threads",
    "remote_rm_token_env": REMOTE_RM + "the_token_is_sent",
    "error_reward": UNIT + "rewards.py::test_an_error_becomes_error_reward_and_is_counted",
    "max_reward_failures": UNIT + "rewards_workers.py::test_a_rule_that_never_judges_ends_the_run",
    "reward_timeout": UNIT + "rewards_workers.py::test_what_fails_costs_its_sample_only",
    "reward_workers": UNIT + "rewards_workers.py::test_several_workers_work",
    "reward_memory": UNIT + "rewards_workers.py::test_what_fails_costs_its_sample_only",
    "allow_unsafe_code": UNIT + "rewards_code.py::test_no_isolation_is_refused",
    "source_key": UNIT + "trainer_rewards.py::test_a_column_chooses_the_rewards_of_a_row",
    "recipes": UNIT + "trainer_rewards.py::test_a_column_chooses_the_rewards_of_a_row",
    "gate": UNIT + "rewards.py::test_the_gate_is_all_or_nothing",
    "gate_reward": UNIT + "rewards.py::test_the_gate_is_all_or_nothing",
    "overlong_buffer_len": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "overlong_penalty_factor": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "reward_running_norm": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    "reward_running_norm_minus_mean": UNIT
    + "trainer_algorithms.py::test_a_run_with_critic_and_running_norm_resumes_bit_identically",
    "reward_clip": UNIT + "trainer_algorithms.py::test_option_reaches_the_step",
    # environment
    "name": UNIT + "environments_job.py::test_rows_are_the_conversation_token_by_token",
    "options": UNIT
    + "environments_job.py::test_an_environment_that_fails_is_counted_and_teaches_nothing",
    "max_turns": UNIT + "environments_job.py::test_fewer_turns_and_another_weight",
    "episode_schedule": UNIT + "environments_serving.py::test_the_schedule_of_a_job",
    "environment_timeout": UNIT
    + "environments_hosting.py::test_what_hangs_is_killed_and_the_others_are_made_again",
    "environment_workers": UNIT + "environments_hosting.py::test_many_episodes_share_few_processes",
    "environment_weight": UNIT + "environments_job.py::test_fewer_turns_and_another_weight",
    # parallel
    "zero_stage": UNIT + "parallel_zero.py::test_stages_shard_differently_and_train_alike",
    "fsdp": UNIT + "parallel_zero.py::test_fsdp_shards_fully",
    "fsdp_cpu_offload": UNIT + "parallel_memory.py::test_cpu_offload_keeps_shards_on_the_host",
    "sp_size": UNIT + "parallel_layouts.py::test_every_layout_takes_the_same_steps",
    "tp_size": UNIT + "parallel_layouts.py::test_every_layout_takes_the_same_steps",
    "dp_replicate": UNIT + "parallel_memory.py::test_replicas_are_sharded_within",
    "dp_shard": UNIT + "config_validation.py::test_errors",
    "deepspeed_config": UNIT + "config_deepspeed.py::test_a_json_fills_fields",
    "collective_timeout": UNIT
    + "tools_distributed.py::test_a_wait_has_a_deadline_and_names_phase_and_ranks",
    # evaluation
    "eval_data": UNIT + "trainer.py::test_evaluation",
    "eval_steps": UNIT + "trainer.py::test_evaluation",
    # logging
    "log_dir": UNIT + "trainer.py::test_log_dir",
    "plot_every": UNIT + "trainer.py::test_what_a_run_writes",
    "use_tensorboard": UNIT + "trainer.py::test_tensorboard_and_wandb_get_the_metrics",
    "use_wandb": UNIT + "trainer.py::test_tensorboard_and_wandb_get_the_metrics",
    "wandb_org": UNIT + "trainer.py::test_tensorboard_and_wandb_get_the_metrics",
    "wandb_run_name": UNIT + "trainer.py::test_tensorboard_and_wandb_get_the_metrics",
    # checkpoint
    "save_path": UNIT + "trainer.py::test_what_a_run_writes",
    "save_interval": UNIT + "trainer.py::test_save_interval_and_steps",
    "save_steps": UNIT + "trainer.py::test_save_interval_and_steps",
    "load_checkpoint": RESUME,
    "ckpt_path": UNIT + "trainer_resume.py::test_a_run_goes_on_from_another_runs_checkpoint",
    "max_ckpt_num": UNIT + "trainer.py::test_save_interval_and_steps",
    "max_ckpt_mem": UNIT
    + "checkpoint_manager.py::test_rotation_by_size_counts_exports_and_keeps_the_newest",
}

# Fields whose named test is still to be written; this set is to become empty.
PENDING: set[str] = set()

# A value that selects what is not available yet.
LATER_VALUES: dict[str, object] = {}


def later_value(name: str) -> object:
    if name in LATER_VALUES:
        return LATER_VALUES[name]
    default = FIELDS[name].info.default
    return {bool: True, type(None): "text"}.get(type(default)) or type(default)(default + 2)


def make(name: str, value: object) -> JobConfig:
    tables: dict[str, dict] = {section: {} for section in SECTIONS}
    tables["model"]["pretrain"] = "m"
    tables["training"]["train_batch_size"] = 64
    tables["rollout"].update(rollout_batch_size=16, engine_type="native")
    tables[FIELDS[name].section][name] = value
    return JobConfig.model_validate(tables)


@cache
def functions_in(file: str) -> set[str]:
    path = ROOT / file
    if not path.exists():
        return set()
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_field_has_a_proof():
    assert list(FIELD_PROOF) == list(FIELDS)


@pytest.mark.parametrize("name", FIELD_PROOF)
def test_proof(name):
    proof = FIELD_PROOF[name]
    if proof == LATER:
        if name == "first_token_temperature":
            value: object = 1.5
        else:
            value = later_value(name)
        texts = unavailable(make(name, value))
        assert [text for text in texts if text.startswith(f"[{FIELDS[name].section}] {name} = ")]
        return
    file, _, test = proof.partition("::")
    assert test in functions_in(file) or name in PENDING, f"{proof} is not there"


def test_pending_holds_fields_with_a_named_test():
    assert set(FIELDS) >= PENDING
    assert all(FIELD_PROOF[name] != LATER for name in PENDING)


def test_names_are_unique_over_sections():
    names = [name for model in SECTIONS.values() for name in model.model_fields]
    assert len(names) == len(set(names))
    assert not set(names) & (set(SECTIONS) | {"config_file", "dry_run", "help"})


def test_every_field_and_section_has_its_text():
    assert all(entry.info.description for entry in FIELDS.values())
    assert all(model.__doc__ for model in SECTIONS.values())


# The guide's parameters: type and default as it prints them.
GUIDE: dict[str, object] = {
    "reward_pretrain": None, "max_len": 4096, "prompt_max_len": 2048, "num_episodes": 1,
    "max_epochs": 1, "actor_learning_rate": 5e-7, "critic_learning_rate": 9e-6,
    "lr_warmup_ratio": 0.03, "max_norm": 1.0, "l2": 0.0, "adam_betas": (0.9, 0.95),
    "micro_train_batch_size": 1, "micro_rollout_batch_size": 2,
    "advantage_estimator": "group_norm", "n_samples_per_prompt": 4, "kl_estimator": "k3",
    "init_kl_coef": 0.001, "kl_target": 0.01, "clip_range": 0.2, "clip_range_higher": 0.3,
    "temperature": 1.0, "top_p": 0.9, "zero_stage": 2, "fsdp": False, "fsdp_cpu_offload": False,
    "bf16": True, "gradient_checkpointing": False, "sp_size": 1, "engine_type": "vllm",
    "engine_tp_size": 1, "engine_mem_util": 0.5, "enable_engine_sleep": True,
    "rm_use_engine": False, "adam_offload": False, "use_mp_opt": False, "packing_samples": False,
    "fused_linear_logprob": False, "chunk_size": 4096, "log_dir": None, "plot_every": 10,
    "use_tensorboard": None, "use_wandb": None, "wandb_org": None, "wandb_run_name": None,
    "ckpt_path": None, "load_checkpoint": False, "save_interval": 1, "max_ckpt_num": 3,
    "max_ckpt_mem": 1000, "reward_running_norm": False, "reward_running_norm_minus_mean": False,
    "advantages_norm": False, "advantage_clip": 0.0, "reward_clip": 0.0, "mixed_mm_data": False,
    "processor": None,
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDE)
def test_defaults_are_the_guides(name):
    default = FIELDS[name].info.default
    assert default == GUIDE[name]
    assert type(default) is type(GUIDE[name])


def test_the_guides_required_parameters_are_fields():
    required = {name for name, entry in FIELDS.items() if entry.info.is_required()}
    assert required == {"pretrain", "train_batch_size", "rollout_batch_size"}
    assert {"save_path", "remote_rm_url"} <= set(FIELDS)


def test_schema_file_is_in_step():
    assert schema.SCHEMA_PATH.read_text() == schema.schema_text(), (
        "run python scripts/config_docs.py"
    )


def test_docs_table_is_in_step():
    text = schema.DOCS_PATH.read_text()
    assert schema.fields_markdown() in text, "run python scripts/config_docs.py"
    assert schema.refreshed_docs(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "train_configs").glob("*.toml")), ids=str)
def test_schema_accepts_the_train_configs(path):
    jsonschema.validate(tomllib.loads(path.read_text()), json.loads(schema.schema_text()))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('functions = ["exact_match", { name = "a.py:f", weight = 2 }]', True),
        ('remote_rm_url = "http://a"', True),
        ("functions = [{ weight = 2 }]", False),
        ("reward_clipp = 1.0", False),
        ("reward_clip = -1.0", False),
    ],
)
def test_schema_judges_as_the_config_does(text, good):
    document = {
        **tomllib.loads(f"[reward]\n{text}"),
        "model": {"pretrain": "m"},
        "training": {"train_batch_size": 1},
        "rollout": {"rollout_batch_size": 1},
    }
    validator = jsonschema.Draft202012Validator(json.loads(schema.schema_text()))
    assert validator.is_valid(document) is good
    if good:
        JobConfig.model_validate(document)


def test_the_choices_are_the_registered_components():
    """The config reads them off the source, since it must not import torch."""
    from torchrft.algorithms.advantages import ESTIMATORS
    from torchrft.algorithms.losses import LOSSES
    from torchrft.algorithms.presets import PRESETS

    assert set(choices.ESTIMATORS) == {*PRESETS, *ESTIMATORS.names()}
    assert set(choices.LOSSES) == set(LOSSES.names())
    assert choices.ESTIMATORS[:5] == ("group_norm", "reinforce", "cpgd", "gspo", "gmpo")


@pytest.mark.slow
def test_a_component_added_to_the_package_is_a_choice(tmp_path, monkeypatch):
    (tmp_path / "new.py").write_text(
        '@ESTIMATORS.register("centered")\ndef centered(): ...\nLOSSES.register("flat")(print)\n'
        'PRESETS = {\n    "wide": Preset("centered"),\n    "group_norm": Preset("group_norm"),\n}\n'
    )
    package = tmp_path / "torchrft"
    shutil.copytree(Path(choices.__file__).parents[1], package)
    shutil.copy(tmp_path / "new.py", package / "algorithms" / "new.py")
    code = (
        "from torchrft.config.manager import load\n"
        "words = '--pretrain m --train_batch_size 64 --rollout_batch_size 16 --dry_run '\n"
        "for name in ('centered', 'wide'):\n"
        "    words_of = words + f'--advantage_estimator {name} --policy_loss flat'\n"
        "    a = load(words_of.split()).config.algorithm\n"
        "    print(a.advantage_estimator, a.policy_loss)\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "centered flat\nwide flat\n", done.stderr


def test_a_component_registered_in_this_process_is_a_choice(monkeypatch):
    from torchrft.algorithms.advantages import ESTIMATORS
    from torchrft.algorithms.losses import LOSSES

    monkeypatch.setattr(ESTIMATORS, "_components", {**ESTIMATORS._components, "centered": print})
    monkeypatch.setattr(LOSSES, "_components", {**LOSSES._components, "flat": print})
    words = ["--pretrain", "m", "--train_batch_size", "64", "--rollout_batch_size", "16"]
    words += ["--dry_run", "--advantage_estimator", "centered", "--policy_loss", "flat"]
    algorithm = load(words).config.algorithm
    assert (algorithm.advantage_estimator, algorithm.policy_loss) == ("centered", "flat")
    monkeypatch.undo()
    with pytest.raises(ConfigError) as raised:
        load(words)
    assert [fault.split(":")[0] for fault in raised.value.faults] == [
        "--advantage_estimator centered", "--policy_loss flat",
    ]  # fmt: skip


def test_the_docs_own_commands_draw_no_warning():
    text = (ROOT / "docs" / "configuration.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("python -m torchrft.train")]
    jobs = [line.split()[3:] for line in lines if "--help" not in line]
    for words in jobs:
        words = [word for word in words if word not in ("...", "--dry_run", ">", "resolved.toml")]
        if words:
            assert load([*words, "--dry_run"]).warnings == (), words
    assert len(jobs) >= 2


def numeric_fields():
    """Those that are one number, also of judges, models and functions."""
    for kind in (*SECTIONS.values(), *TABLES.values()):
        for name, info in kind.model_fields.items():
            adapter = TypeAdapter(Annotated[info.annotation, None, *info.metadata])
            schema = adapter.json_schema()
            if {"integer", "number"} & {part.get("type") for part in branches(schema)}:
                yield pytest.param(adapter, id=f"{kind.__name__}.{name}")


@pytest.mark.parametrize("adapter", list(numeric_fields()))
@pytest.mark.parametrize("value", [1e308, -1e308, 2**63, -(2**63), 10**400, 1e10, 2**33])
def test_no_number_is_without_bounds(adapter, value):
    """Beyond them, clocks, 32-bit integers, float32 or the memory overflow within the job."""
    with pytest.raises(ValidationError):
        adapter.validate_python(value, strict=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--reward_timeout", "1e8"), "expected number > 0 and <= 1000000.0"),
        (("--collective_timeout", "1e308"), "expected number > 0 and <= 1000000.0"),
        (("--max_len", str(2**63)), "must be within 1e9 of 0; expected integer > 0"),
        (("--rollout_batch_size", str(2**31)), "expected integer > 0 and <= 1000000"),
        (("--temperature", "1e4"), "expected number >= 1e-05 and <= 1000.0"),
        (("--actor_learning_rate", "1e9"), "expected number > 0 and <= 1"),
        (("--error_reward", "-1e300"), "must be within 1e9 of 0; expected number"),
        (("--seed", str(2**32)), "expected integer >= 0 and < 4294967296"),
    ],
)
def test_a_number_beyond_its_bounds_is_one_sentence(flags, said):
    with pytest.raises(ConfigError) as raised:
        load(tiny_job.argv(**{flags[0][2:]: flags[1]}))
    assert raised.value.faults == [f"{' '.join(flags)}: {said}"]
