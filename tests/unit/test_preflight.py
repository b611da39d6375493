"""What a dry run and the check before the start see of files and the environment."""

import json
import os
import re
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tiny_job import ASSETS, MODEL, argv, tiny_config

from torchrft import train
from torchrft.build.preflight import WRITTEN, _lacks, job_faults
from torchrft.config.fields import FIELDS
from torchrft.config.manager import check_only

PROMPT = '{"prompt": "1 2", "label": "2"}\n'


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A home without keys, and an empty folder to work in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def faults(**options):
    return job_faults(tiny_config(**options))


def test_a_job_that_can_run_has_no_fault_and_nothing_is_written(tmp_path):
    save_path = tmp_path / "here" / "deep" / "run"
    assert faults(save_path=save_path, log_dir=tmp_path / "logs", use_tensorboard="tb") == []
    assert list((tmp_path / "here").iterdir()) == []
    assert not (tmp_path / "logs").exists()


PROMPTS = {
    "none.jsonl": (None, "none.jsonl: no such file"),
    "folder.jsonl": ("", "folder.jsonl: holds no rows"),
    "blank.jsonl": ("\n \n", "blank.jsonl: holds no rows"),
    "broken.jsonl": ("{", "broken.jsonl, line 1: invalid JSON"),
    "list.json": ("[]", "list.json: holds no rows"),
    "number.jsonl": ("5\n", "number.jsonl, line 1: expected a JSON object, got 5"),
    "other.jsonl": ('{"prompts": "a"}', "no column 'prompt'; did you mean 'prompts'?"),
    "text.txt": ("a", "text.txt: expected a file ending in .jsonl, .json, .parquet"),
    "cut.parquet": ("PAR1", "cut.parquet is not a readable parquet file"),
    "none.jsonl:test": (None, "none.jsonl: no such file"),
    "./nowhere": (None, "nowhere: no such file or folder"),
    "/no/where/at/all": (None, "/no/where/at/all: no such file or folder"),
    "a/b:c/d": (None, "expected a file, folder or hub id, then at most :split"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("option", ["prompt_data", "eval_data"])
def test_prompt_files(option, name):
    content, part = PROMPTS[name]
    if content is not None:
        Path(name).write_text(content)
    (fault,) = faults(**{option: name})
    assert fault.startswith(f"{option}: ")
    assert part in fault


@pytest.mark.parametrize(
    "source", ["owner/name", "name", "owner/name:train", "owner/name/main", "folder", "folder:test"]
)
def test_hub_ids_and_folders_are_left_to_the_job(source):
    Path("folder").mkdir()
    assert faults(prompt_data=source, eval_data=source) == []


def test_parquet_files_show_columns_and_rows():
    parquet.write_table(pyarrow.table({"text": ["a"]}), "columns.parquet")
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), "rows.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a"]}), "good.parquet")
    assert faults(prompt_data="good.parquet") == []
    (fault,) = faults(prompt_data="columns.parquet")
    assert "no column 'prompt'; columns are 'text'" in fault
    assert faults(prompt_data="rows.parquet") == ["prompt_data: rows.parquet: holds no rows"]


def test_metadata_columns_are_looked_for():
    Path("a.jsonl").write_text(PROMPT)
    (fault,) = faults(prompt_data="a.jsonl", metadata_keys="['topic']")
    assert "no column 'topic'" in fault


def folder(name, *files):
    Path(name).mkdir()
    for file in files:
        Path(name, file).write_text("{}")
    return name


MODELS = [
    ("absent/of/three", "no such folder, and no hub id, which is owner/name"),
    ("./absent", "no such folder, and no hub id"),
    ("~/model", "no such folder, and no hub id"),
    ("/absent", "no such folder, and no hub id"),
    ("file", "no such folder, and no hub id"),
    ("empty", "the folder holds no config.json"),
    ("bare", "the folder holds no weights (.safetensors or .bin)"),
    ("cut", "the folder lacks b.safetensors, of 1 missing files of its index"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), MODELS)
@pytest.mark.parametrize(
    "option", ["pretrain", "ref_pretrain", "critic_pretrain", "models", "judge"]
)
def test_model_folders(option, name, part):
    Path("file").write_text("")
    folder("empty", "model.safetensors", "tokenizer.json")
    folder("bare", "config.json", "tokenizer.json")
    folder("cut", "config.json", "tokenizer.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    Path("cut", "model.safetensors.index.json").write_text(json.dumps(index))
    options = {
        "pretrain": {"pretrain": name, "init": "pretrained"},
        "ref_pretrain": {"ref_pretrain": name, "init_kl_coef": 0.1},
        "critic_pretrain": {"critic_pretrain": name, "advantage_estimator": "gae"},
        "models": {"reward_pretrain": name},
        "judge": {"judges": f'[{{ pretrain = "{name}", template = "{{{{ response }}}}" }}]'},
    }[option]
    found = faults(**options)
    assert len(found) == 1, found
    assert part in found[0]
    assert f'"{name}"' in found[0]


def test_tokenizers_and_processors():
    folder("bare", "config.json", "model.safetensors")
    assert faults(pretrain="bare") == ['[model] pretrain = "bare": the folder holds no tokenizer']
    (fault,) = faults(models='[{ pretrain = "bare" }]')
    assert "holds no tokenizer" in fault
    assert faults(models=f'[{{ pretrain = "bare", tokenizer = "{MODEL}" }}]') == []
    (fault,) = faults(mixed_mm_data=True, processor="./none", engine_type="native")
    assert fault.startswith('[data] processor = "./none": no such folder')


def test_random_weights_need_no_file_and_hub_ids_are_left():
    assert faults(pretrain=MODEL, init="random") == []
    assert faults(pretrain="Qwen/Qwen2.5-0.5B", init="pretrained", reward_pretrain="gpt2") == []


def test_folders_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    servers = {"engine_type": "vllm", "server_urls": "http://localhost:1"}
    for name in WRITTEN:
        options = servers if name == "weight_folder" else {}
        for place in (
            tmp_path / "file",
            tmp_path / "file" / "deep" / "run",
            Path("/proc/none/run"),
        ):
            (fault,) = faults(**{"save_path": tmp_path / "run", **options, name: place})
            assert f'{name} = "{place}": ' in fault
            assert "cannot be written to" in fault


def test_user_files_of_the_algorithm():
    Path("own.py").write_text("def other(): ...\n")
    for name in ("advantage_estimator", "policy_loss"):
        (fault,) = faults(**{name: "none.py:mine"})
        assert fault == f'[algorithm] {name} = "none.py:mine": there is no file none.py'
        (fault,) = faults(**{name: "own.py:mine"})
        assert fault.endswith("own.py has no function 'mine'")
        assert faults(**{name: "own.py:other"}) == []


def test_a_checkpoint_to_resume_from(tmp_path):
    resume = {"save_path": tmp_path / "run", "load_checkpoint": True, "ckpt_path": tmp_path / "old"}
    (fault,) = faults(**resume)
    assert fault.endswith("no complete checkpoint is there")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert faults(**resume) == []  # this run has begun, and may go on by itself
    (tmp_path / "run" / "checkpoints").rmdir()
    step = tmp_path / "old" / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    assert len(faults(**resume)) == 1
    (step / "manifest.json").write_text("{}")
    for place in ("old", "old/checkpoints", "old/checkpoints/step-3"):
        assert faults(**resume | {"ckpt_path": tmp_path / place}) == []


@pytest.mark.parametrize(
    ("variables", "files"),
    [
        ({"WANDB_API_KEY": "x"}, {}),
        ({"WANDB_MODE": "offline"}, {}),
        ({"WANDB_MODE": "disabled"}, {}),
        ({}, {".netrc": "machine api.wandb.ai login user password x"}),
        ({}, {".config/wandb/settings": "[default]\nmode = offline\n"}),
        (
            {"WANDB_BASE_URL": "https://wandb.example.org"},
            {".netrc": "machine wandb.example.org login user password x"},
        ),
    ],
)
def test_wandb_has_a_key_or_needs_none(monkeypatch, tmp_path, variables, files):
    monkeypatch.setattr("torchrft.build.preflight.find_spec", lambda name: name)
    (fault,) = faults(use_wandb="project")
    assert fault.startswith('[logging] use_wandb = "project" needs a key of Weights & Biases: run')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert faults(use_wandb="project") == []


def test_wandb_is_installed(monkeypatch):
    monkeypatch.setattr("torchrft.build.preflight.find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (fault,) = faults(use_wandb="project")
    assert "needs the package wandb: pip install" in fault


def test_libraries_of_environments_are_installed(monkeypatch):
    monkeypatch.setattr("torchrft.build.preflight.find_spec", lambda name: None)
    (fault,) = faults(name="reasoning_gym:leg_counting", functions=None)
    package = "the package reasoning-gym: pip install reasoning-gym"
    assert fault == f'[environment] name = "reasoning_gym:leg_counting" needs {package}'
    (fault,) = faults(name="openenv:http://localhost:1", functions=None)
    assert fault.endswith("needs the package websockets: pip install websockets")
    assert faults(name="my_env.py:Mine", functions=None) == []


def test_columns_that_environments_need(monkeypatch):
    monkeypatch.setattr("torchrft.build.preflight.find_spec", lambda name: name)
    (fault,) = faults(name="skyrl_gym:aime", functions=None)
    needs = 'needs the columns reward_model; name them by [data] metadata_keys = ["reward_model"]'
    assert fault == f'[environment] name = "skyrl_gym:aime" {needs}'
    Path("a.jsonl").write_text('{"prompt": "1", "reward_model": {"ground_truth": "1"}}\n')
    named = {"prompt_data": "a.jsonl", "metadata_keys": "['reward_model']"}
    assert faults(name="skyrl_gym:aime", functions=None, **named) == []


def test_tokens_of_servers(monkeypatch):
    monkeypatch.setenv("FULL", "secret")
    remote = {"remote_rm_url": "http://localhost:1"}
    assert faults(**remote, remote_rm_token_env="FULL") == []
    (fault,) = faults(**remote, remote_rm_token_env="EMPTY")
    assert fault == '[reward] remote_rm_token_env = "EMPTY": the variable is not set'


def test_every_field_that_names_a_place_is_looked_at(tmp_path):
    """A new field of this kind must be looked at too."""
    places = {
        name for name, field in FIELDS.items()
        if re.search(r"\b[Ff]older|\bfile\b|hub id", field.info.description or "")
    }  # fmt: skip
    with_tests = {"pretrain", "ref_pretrain", "critic_pretrain", "prompt_data", "processor"}
    with_tests |= {"eval_data", "reward_pretrain", "ckpt_path", *WRITTEN}
    assert places <= with_tests | {"init"}, places - with_tests


def test_all_faults_come_together_in_a_dry_run_too(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train"])
    (tmp_path / "file").write_text("")
    options = {"prompt_data": "a.jsonl", "eval_data": "b.jsonl", "pretrain": "/absent"}
    words = argv(**options, save_path=tmp_path / "file" / "run", functions="none.py:f")
    for extra in ([], ["--dry_run"]):
        with pytest.raises(SystemExit) as ended:
            train.main(words + extra)
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert (ended.value.code, out, len(lines)) == (2, "", 5)
        assert all(line.startswith("error: ") for line in lines)
        assert check_only(words + extra, job_faults) == 2
        capsys.readouterr()


@pytest.mark.parametrize("path", sorted((ASSETS.parents[1] / "train_configs").glob("*.toml")))
def test_the_jobs_that_come_with_torchrft_dry_run(path, monkeypatch, capsys):
    monkeypatch.chdir(ASSETS.parents[1])
    assert check_only(["--config_file", str(path), "--dry_run"], job_faults) == 10, capsys


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ('{"weight_map": {"w": "../x.safetensors"}}', "the folder lacks ../x.safetensors"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "the folder lacks /etc/passwd"),
        ('{"weight_map": []}', "index.json is damaged (AttributeError"),
        ("[]", "index.json is damaged (TypeError"),
        ("[" * 100_000, "index.json is damaged (ValueError: nested too deeply"),
    ],
    ids=["up", "absolute", "list", "no table", "deep"],
)
def test_an_index_of_weights_is_not_trusted(tmp_path, index, fault):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "a.safetensors"):
        (folder / name).write_text("{}")
    (tmp_path / "x.safetensors").write_text("")
    (folder / "model.safetensors.index.json").write_text(index)
    assert fault in str(_lacks(folder, str(folder), "mw"))
