"""The default job, whole, through ./run_train.sh, with each other kind of source for its rule.

Its functions of users are rows of test_runs.py.
"""

import json
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import tiny_classifiers
from reward_servers import Program
from safetensors.torch import load_file
from test_runs import environment, launch
from tiny_job import ROOT, records, rollout

FLAGS = ["--seed", "0", "--eval_steps", "1000", "--plot_every", "1000", "--functions", "[]"]


def rewards(folder: Path, *words: str) -> list[float]:
    """The mean reward of each of 12 steps."""
    done = launch([*FLAGS, "--max_steps", "12", "--save_path", str(folder), *words], environment(1))
    assert done.returncode == 0, done.stderr
    return [line["reward/mean"] for line in records(folder)]


@pytest.mark.slow
def test_it_learns_what_a_scalar_model_likes(tmp_path):
    """With random weights it likes some responses more than others, and cannot be guessed."""
    model = tiny_classifiers.save(tmp_path / "scalar")
    values = rewards(tmp_path / "run", "--reward_pretrain", model)
    assert values[-1] > values[0] + 0.3  # of -0.83
    rows = rollout(tmp_path / "run", 12)
    assert [row["reward"] for row in rows] == [row["reward_parts"]["scalar"] for row in rows]


@pytest.mark.slow
def test_it_learns_what_a_judge_in_the_native_engine_likes(tmp_path):
    tiny.model("qwen2", seed=7).save_pretrained(tmp_path / "judge")
    tiny_classifiers.tokenizer(tmp_path / "judge")
    (tmp_path / "own.py").write_text(
        "def letters(answer):\n    return sum(map(ord, answer)) / max(len(answer), 1) / 100\n"
    )
    judge = {
        "pretrain": f"{tmp_path}/judge",
        "template": "{{ response }}?",
        "parser": f"{tmp_path}/own.py:letters",
        "max_new_tokens": 2,
    }
    entry = ", ".join(f"{name} = {json.dumps(value)}" for name, value in judge.items())
    values = rewards(tmp_path / "run", "--judges", f"[{{ {entry} }}]")
    assert values[-1] > values[0] + 0.06  # of 0.70
    assert "reward/judge/unparsable" in records(tmp_path / "run")[-1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_dies_in_mid_run_changes_nothing(tmp_path):
    """The weights are those of the run with the rule in the trainer itself."""
    words = [*FLAGS[:-2], "--max_steps", "6"]
    done = launch([*words, "--save_path", str(tmp_path / "rule")], environment(1))
    assert done.returncode == 0, done.stderr
    config = tmp_path / "server.toml"
    config.write_text('[reward]\nfunctions = ["exact_match"]\n')
    server = Program(tmp_path / "server.log", "--config", str(config))
    server.wait()
    words += ["--functions", "[]", "--remote_rm_url", server.url, "--save_path"]
    log = (tmp_path / "log").open("w")
    job = subprocess.Popen(
        [str(ROOT / "run_train.sh"), *words, str(tmp_path / "remote")],
        env=environment(1), stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        metrics = tmp_path / "remote" / "logs" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n")):
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        server.kill()
        while "is asked again in" not in (tmp_path / "log").read_text():
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        server.start()
        assert job.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        job.kill()
        server.kill()
        log.close()
    expected = load_file(tmp_path / "rule" / "hf" / "step-6" / "model.safetensors")
    found = load_file(tmp_path / "remote" / "hf" / "step-6" / "model.safetensors")
    assert all(found[name].equal(weight) for name, weight in expected.items())
    for one, other in zip(records(tmp_path / "rule"), records(tmp_path / "remote"), strict=True):
        assert (one["reward/mean"], one["policy/loss"]) == (
            other["reward/mean"],
            other["policy/loss"],
        )
