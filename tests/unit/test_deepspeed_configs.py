"""Configs of public form have the values that DeepSpeed makes of them, or are refused."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from torchrft.deepspeed.config import read

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _benchmark():
    spec = importlib.util.spec_from_file_location("configs", BENCHMARKS / "deepspeed_configs.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


BENCHMARK = _benchmark()
RECORD = json.loads(BENCHMARK.RECORDED.read_text())
CONFIGS = BENCHMARK.configs()
ACCEPTED = {"equal", "equal, some keys meaningless"}


def test_the_record_is_of_these_configs():
    assert len(CONFIGS) >= 200
    assert set(CONFIGS) == set(RECORD["values"]) == set(RECORD["verdicts"])
    off = {name for name, said in RECORD["verdicts"].items() if said.startswith("accepted, ")}
    assert all(name.endswith((" off", " null")) for name in off - {"mics", "mics -1"})
    counts = [RECORD["verdicts"][name] in ACCEPTED for name in CONFIGS]
    assert sum(counts) >= 126


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_deepspeeds(name):
    mine = BENCHMARK.by_torchrft(BENCHMARK.filled(CONFIGS[name]))
    assert BENCHMARK.verdict(mine, RECORD["values"][name]) == RECORD["verdicts"][name] != "OTHER"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"bf16": {"enabled": "true"}}, {"bf16.enabled": True}),
        ({"bfloat16": {"enabled": "False"}}, {"bfloat16.enabled": False}),
        ({"fp16": {"enabled": "false"}}, {"fp16.enabled": False}),
    ],
)
def test_switches_in_quotes(section, expected):
    settings = read({"train_batch_size": 4, **section}, 1)
    assert {name: settings.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"fp16": {"enabled": "True"}}, "no loss scaling"),
        ({"compile": {"disable": False, "backend": "inductor"}}, "compile.disable = False"),
        ({"zero_optimization": {"stage": "true"}}, "must be 0, 1, 2 or 3"),
        ({"gradient_clipping": "true"}, "must be a number"),
    ],
)
def test_refusals(section, words):
    with pytest.raises(ValueError, match=words):
        read({"train_batch_size": 4, **section}, 1)


def test_keys_that_nobody_reads_are_named():
    ignored = {"cuda_visible_devices": 0, "comms_config": {"verbose": False}}
    ignored |= {"monitor_config": {"enabled": True}, "compile": {"disable": True}}
    notes = read({"train_batch_size": 4, **ignored}, 1).judged.notes
    assert [note.split()[2] for note in notes] == list(ignored)[:3]
