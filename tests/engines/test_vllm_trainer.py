"""Whole runs with real vLLM on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_job
from tiny_job import ROOT, records, rollout

VLLM = {"engine_type": "vllm", "max_steps": 4, "save_steps": 1, "max_num_seqs": 16}


def train(save_path, ngpu=1, *words, config="train_configs/debug_model.toml", **options):
    """The default job or that of `config` by ./run_train.sh, which must succeed."""
    flags = [w for n, v in {"save_path": save_path, **options}.items() for w in (f"--{n}", str(v))]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # this environment's torchrun
    result = subprocess.run(
        ["./run_train.sh", *words, *flags],
        cwd=ROOT,
        env={**os.environ, "NGPU": str(ngpu), "CONFIG_FILE": str(config), "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 0, "\n".join([*said, result.stderr[-3000:]])


def values(save_path: Path) -> list[dict]:
    """The metrics but for times, memory and speed."""
    skip = ("time/", "memory/", "throughput/")
    return [{k: v for k, v in r.items() if not k.startswith(skip)} for r in records(save_path)]


def test_the_default_job_learns(tmp_path):
    """To the evaluation reward that the native engine reaches."""
    train(tmp_path, engine_type="vllm", seed=0)
    evaluated = [r["eval/reward/mean"] for r in records(tmp_path) if "eval/reward/mean" in r]
    assert evaluated[0] <= 0.2
    assert evaluated[-1] >= 0.95
    assert max(r["mismatch/logprob_abs_max"] for r in records(tmp_path)) < 1e-4


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three steps of the default job in one process."""
    path = tmp_path_factory.mktemp("alone")
    train(path, engine_type="vllm", max_steps=3, eval_steps=1)
    return path


@pytest.mark.parametrize(("ngpu", "tp"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_and_engines(alone, tmp_path, ngpu, tp):
    """One engine per rank, one over two ranks, two over two each: the same samples and steps."""
    train(tmp_path, ngpu, engine_type="vllm", max_steps=3, eval_steps=1, engine_tp_size=tp)
    for mine, theirs in zip(values(tmp_path), values(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # vLLM's shared memory, whose name the next job's engine would find taken.
    assert not list(Path("/dev/shm").glob("*cpushm*"))
    for step in (1, 2, 3):
        ours, others = rollout(tmp_path, step), rollout(alone, step)
        assert [row["response"] for row in ours] == [row["response"] for row in others]


def test_a_run_killed_and_resumed(tmp_path):
    """It ends as the one that was never stopped."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    words = tiny_job.argv(save_path=tmp_path / "whole", **VLLM)
    assert tiny_job.run_process(words, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    words = tiny_job.argv(save_path=tmp_path / "killed", **VLLM)
    kill = ("torchrft.trainer:Trainer.train_step", 3, 9, "before")
    assert tiny_job.run_process(words, tmp_path / "log", kill) == -9
    assert len(records(tmp_path / "killed")) == 2
    assert tiny_job.run_process([*words, "--load_checkpoint"], tmp_path / "log") == 0
    assert json.dumps(values(tmp_path / "killed")) == json.dumps(values(tmp_path / "whole"))
    for step in (1, 2, 3, 4):
        assert rollout(tmp_path / "killed", step) == rollout(tmp_path / "whole", step)


def test_a_vllm_that_does_not_start_is_one_line(tmp_path):
    words = tiny_job.argv(save_path=tmp_path, **VLLM, vllm="{ nonsense = 1 }")
    assert tiny_job.run_process(words, tmp_path / "log") == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: [rollout.vllm] holds an argument that vLLM does not know")
