import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_ranks

from torchrft.config.job_config import Logging
from torchrft.metrics import logger as logger_module
from torchrft.metrics import read_metrics
from torchrft.metrics.files import json_line, write_atomically
from torchrft.metrics.logger import MetricLogger
from torchrft.metrics.rollout_dump import dump


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_one_json_object_a_line_with_only_finite_numbers(tmp_path):
    with MetricLogger(Logging(), tmp_path, {}) as log:
        log.log(1, {"reward/mean": 0.1 + 0.2, "episode": 2})
        assert len(lines(tmp_path)) == 1  # flushed at once
        log.log(2, {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1e-300})
        log.log(3, {"tensor": torch.tensor(1.5), "numpy": np.float64(0.25)})
    assert lines(tmp_path) == [
        '{"step": 1, "reward/mean": 0.30000000000000004, "episode": 2}',
        '{"step": 2, "a": null, "b": null, "c": null, "d": 1e-300}',
        '{"step": 3, "tensor": 1.5, "numpy": 0.25}',
    ]
    assert read_metrics(tmp_path)[0]["reward/mean"] == 0.1 + 0.2


def test_a_fresh_run_does_not_append_to_another(tmp_path):
    MetricLogger(Logging(), tmp_path, {}).close()
    with pytest.raises(ValueError, match="holds an earlier run; resume it or set it aside"):
        MetricLogger(Logging(), tmp_path, {})


def row(step: int) -> dict:
    return {
        "prompt": "1 2=",
        "response": f"{step}",
        "reward": 1.0,
        "reward_parts": {"exact_match": 1.0},
        "length": 2,
        "finish_reason": "stop",
    }


def write_steps(folder: Path, steps: range, resume_step: int | None) -> None:
    with MetricLogger(Logging(), folder, {}, resume_step) as log:
        for step in steps:
            log.log(step, {"reward/mean": step / 10})
            dump(folder, step, [row(step)])
            write_atomically(folder / "plots" / f"lengths-step-{step}.png", b"png")


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_steps(whole, range(1, 13), None)
    write_steps(broken, range(1, 11), None)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rewa')  # cut by kill -9
    (broken / "rollouts" / ".step-11.jsonl.tmp").write_text("{")
    write_steps(broken, range(9, 13), 8)
    assert contents(broken) == contents(whole)
    assert len(contents(whole)) == 1 + 12 + 12


def test_resume_at_the_cut_line_keeps_the_rest(tmp_path):
    write_steps(tmp_path, range(1, 4), None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, range(4, 5), 3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_other_files_survive_a_resume(tmp_path):
    write_steps(tmp_path, range(1, 4), None)
    for name in ("plots/reward.png", "rollouts/notes-step-x.txt"):
        (tmp_path / name).write_text("mine")
    write_steps(tmp_path, range(0), 1)
    assert sorted(contents(tmp_path)) == [
        "metrics.jsonl",
        "plots/lengths-step-1.png",
        "plots/reward.png",
        "rollouts/notes-step-x.txt",
        "rollouts/step-1.jsonl",
    ]


def test_a_damaged_line_inside_the_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl, line 2 is no record of a step: nonsense; remove"
    ):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "missing") == []


def test_lines_survive_kill_9(tmp_path):
    code = """
        import os, signal, sys
        from torchrft.config.job_config import Logging
        from torchrft.metrics.logger import MetricLogger
        log = MetricLogger(Logging(), sys.argv[1], {})
        for step in (1, 2, 3):
            log.log(step, {"x": step})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    assert read_metrics(tmp_path) == [{"step": n, "x": n} for n in (1, 2, 3)]


def test_json_line_handles_any_value():
    record = {
        "text": "a\u2028b\n",
        "nested": {1: [float("nan"), {"x": (1, True, None)}]},
        "path": Path("x"),
    }
    line = json_line(record)
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "text": "a\u2028b\n",
        "nested": {"1": [None, {"x": [1, True, None]}]},
        "path": "x",
    }


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Logging(use_tensorboard=str(tmp_path / "tb"))
    with MetricLogger(config, tmp_path / "logs", {}) as log:
        for step in (1, 2, 3):
            log.log(step, {"reward/mean": float(step), "bad": float("nan")})
    with MetricLogger(config, tmp_path / "logs", {}, resume_step=1) as log:
        for step in (2, 3, 4):
            log.log(step, {"reward/mean": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    points = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert points == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path):
    code = """
        import sys
        from torchrft.config.job_config import Logging
        from torchrft.metrics.logger import MetricLogger
        resume = int(sys.argv[2]) if sys.argv[2] else None
        config = Logging(use_wandb="torchrft-test", wandb_run_name="unit")
        with MetricLogger(config, sys.argv[1], {"training": {"seed": 1}}, resume) as log:
            log.log((resume or 0) + 1, {"reward/mean": 0.5})
    """
    ids = []
    for resume in ("", "1"):
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), resume],
            check=True,
            timeout=120,
            capture_output=True,
            env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        )
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1]
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))
    assert runs
    assert all(list(run.glob("run-*.wandb")) for run in runs)


def test_missing_wandb_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(logger_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'torchrft\[wandb\]'"):
        MetricLogger(Logging(use_wandb="project"), tmp_path / "logs", {})
    assert not (tmp_path / "logs").exists()


def _log_on_rank(rank: int, folder: str) -> None:
    with MetricLogger(Logging(), folder, {}) as log:
        log.log(1, {"rank": rank})


def test_only_rank_0_writes(tmp_path):
    run_ranks(_log_on_rank, 2, str(tmp_path))
    assert read_metrics(tmp_path) == [{"step": 1, "rank": 0}]


@pytest.mark.parametrize(
    "row",
    ["[1]", "7", "null", '"step"', "{}", '{"reward/mean": 1.0}', '{"step": "2"}', '{"step": true}',
     '{"step": 1.5}', '{"step": 2, "reward/mean": "high"}', '{"step": 2, "a": {"b": 1}}'],
)  # fmt: skip
def test_a_foreign_row_is_named(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": null}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"jsonl, line 2 is no record of a step: .*remove"):
        MetricLogger(Logging(), tmp_path, {}, resume_step=1)


def test_a_resume_leaves_foreign_files_and_removes_half_written_ones(tmp_path):
    (tmp_path / "rollouts" / "step-9.jsonl").mkdir(parents=True)
    (tmp_path / "rollouts" / "step-٩.jsonl").write_text("mine")
    (tmp_path / "plots").mkdir()
    for name in ("plots/.reward.png.tmp", ".metrics.jsonl.tmp"):
        (tmp_path / name).write_text("half")
    MetricLogger(Logging(), tmp_path, {}, resume_step=1).close()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    kept = {"metrics.jsonl", "plots", "rollouts", "rollouts/step-9.jsonl", "rollouts/step-٩.jsonl"}
    assert left == kept


@pytest.mark.parametrize(
    "line",
    [
        *("[" * 100_000, '{"a":' * 50_000, "[]", "7", "", '{"step": "1"}', '{"step": true}'),
        *('{"reward/mean": 1}', '{"step": 1, "a": []}', "1" * 9999, "\0"),
        '{"step": 1, "a": 1' + "0" * 400 + "}",
    ],
    ids=range(12),
)
def test_a_forged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no record of a step: .*; rem"):
        read_metrics(tmp_path)
