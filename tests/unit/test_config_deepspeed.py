"""--deepspeed_config: a DeepSpeed JSON fills fields, and may not contradict them."""

import json
import tomllib
from functools import partial
from pathlib import Path

import pytest

from torchrft.config import manager
from torchrft.config.fields import FIELDS, value_of
from torchrft.config.manager import ConfigError, to_toml
from torchrft.deepspeed import keys as deepspeed_keys
from torchrft.deepspeed.keys import KEYS, TRAINER
from torchrft.sources import SOURCES

load = partial(manager.load, sources=SOURCES)

BASE = ["--pretrain", "m", "--rollout_batch_size", "16", "--engine_type", "native", "--dry_run"]


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def loads(tmp_path):
    """load(), with a JSON of this content and some flags."""

    def run(content, *flags, ranks=2, batch="64"):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(content))
        given = ["--train_batch_size", batch] if batch else []
        return load([*BASE, *given, "--deepspeed_config", str(path), *flags], ranks)

    return run


EVERYTHING = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": False},
    "steps_per_print": 10,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {
            "warmup_type": "linear",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "cos_min_ratio": 0.25,
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "zero_hpz_partition_size": 2,
        "overlap_comm": True,
    },
    "activation_checkpointing": {"partition_activations": True},
}


def test_a_json_fills_fields(loads, tmp_path):
    loaded = loads(EVERYTHING, ranks=4, batch=None)
    expected = {
        "train_batch_size": 32,
        "micro_train_batch_size": 4,
        "max_norm": 0.5,
        "bf16": False,
        "actor_learning_rate": 1e-4,
        "adam_betas": (0.8, 0.9),
        "l2": 0.1,
        "lr_decay": "cosine",
        "lr_min_ratio": 0.25,
        "zero_stage": 3,
        "adam_offload": True,
        "fsdp_cpu_offload": False,
        "dp_shard": 2,
        "dp_replicate": 2,
        "gradient_checkpointing": True,
    }
    assert {name: value_of(loaded.config, name) for name in expected} == expected
    written = tomllib.loads(to_toml(loaded.config))
    assert written["optimizer"]["l2"] == 0.1
    assert written["parallel"]["zero_stage"] == 3
    again = tmp_path / "config.toml"
    again.write_text(to_toml(loaded.config))
    assert load(["--config_file", str(again), "--dry_run"], 4).config == loaded.config
    notes = [line for line in loaded.warnings if "zero_optimization.overlap_comm" in line]
    assert len(notes) == 1


def test_auto_and_null_leave_the_fields_alone(loads):
    content = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": None,
    }
    config = loads(content, "--max_norm", "0.25").config
    assert config.optimizer.max_norm == 0.25
    assert not {"actor_learning_rate", "bf16"} & (
        config.optimizer.model_fields_set | config.training.model_fields_set
    )


def test_values_that_agree_are_accepted(loads):
    flags = ["--max_norm", "0.5", "--adam_betas", "0.8", "0.9", "--zero_stage", "3"]
    assert loads(EVERYTHING, *flags, ranks=4, batch="32").config.optimizer.max_norm == 0.5


def test_offloaded_parameters_take_the_optimizer_along(loads):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    config = loads({"zero_optimization": zero}).config
    assert (config.parallel.fsdp_cpu_offload, config.optimizer.adam_offload) == (True, False)


def scheduler(kind, **params):
    return {"scheduler": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 32}, "--train_batch_size 64 and {}: train_batch_size = 32 differ"),
        ({"gradient_clipping": 0}, "{}: gradient_clipping = 0: expected number > 0"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1 must be a number of 0 or more"),
        ({"gradient_accumulation_steps": 3}, "= 3 must be train_batch_size / (micro_train_batch_"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True is not supported: there is no loss"),
        ({"zero_optimization": {"stage": 0}}, "stage = 0 is not supported by the trainer: use 1"),
        ({"train_batchsize": 8}, 'DeepSpeed has no key "train_batchsize"'),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op = "sum" is not supported by the'),
        (scheduler("OneCycle"), "scheduler.type = 'OneCycle' must be 'WarmupLR', 'WarmupDecayLR'"),
        (scheduler("WarmupLR"), 'its default is "log", so write "linear"'),
        (
            scheduler("WarmupLR", warmup_type="linear", warmup_num_steps=5),
            'warmup_num_steps = 5 is not supported by the trainer: write "auto" and set lr_warmup',
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
            | scheduler("WarmupLR", warmup_type="linear", warmup_max_lr=0.2),
            "optimizer.params.lr = 0.1 and {}: scheduler.params.warmup_max_lr = 0.2 differ",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(loads, tmp_path, content, message):
    with pytest.raises(ConfigError) as caught:
        loads(content)
    assert len(caught.value.faults) == 1
    assert message.format(tmp_path / "ds.json") in caught.value.faults[0]


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError) as caught:
        load([*BASE, "--deepspeed_config", "none.json"], 1)
    assert caught.value.faults == [
        "--deepspeed_config none.json: DeepSpeed config none.json is not a file"
    ]


def test_a_key_that_is_there_twice(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true, "enabled": false}, "train_batch_size": 64}')
    with pytest.raises(ConfigError) as caught:
        load([*BASE, "--deepspeed_config", str(path)], 1)
    assert 'no valid JSON: the key "enabled" is there more than once' in caught.value.faults[0]


def test_every_mapped_key_has_its_place():
    mapped = {name for name, key in KEYS.items() if key.disposition == "mapped"}
    assert mapped == {name for table in TRAINER.values() for name in table}
    assert set(TRAINER["fields"].values()) <= set(FIELDS)


def test_every_key_is_listed_once():
    table = tomllib.loads(Path(deepspeed_keys.__file__).with_suffix(".toml").read_text())
    assert len(KEYS) == sum(len(entry["names"]) for entry in table["key"])


def test_without_its_reader_a_json_is_no_silent_option():
    with pytest.raises(
        ConfigError, match=r"deepspeed_config needs a reader; pass torchrft\.sources"
    ):
        manager.load([*BASE, "--deepspeed_config", "x.json"], 1)
