import contextlib
import io
import json
import re
import time
from pathlib import Path

import pytest
import tiny_job
import torch
from rich.console import Console as RichConsole

from torchrft.metrics import console as console_module
from torchrft.metrics.console import Console, step_line, summary_lines
from torchrft.metrics.plots import plot_curves, plot_lengths
from torchrft.metrics.rollout_dump import dump
from torchrft.metrics.timing import PhaseTimer, peak_memory_gib
from torchrft.tools import progress

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
METRICS = {
    "reward/mean": 0.53125,
    "eval/reward/mean": 0.61,
    "policy/loss": -0.01234,
    "policy/kl": 0.000123,
    "grad_norm": 0.5,
    "response_length/mean": 23.14,
    "throughput/tokens_per_second": 12345.6,
    "time/step": 1.234,
    "lr": 1e-4,
}


def test_phase_timer_measures_and_starts_again():
    timer = PhaseTimer(CPU)
    with timer.phase("step"):
        for _ in range(2):
            with timer.phase("rollout"):
                time.sleep(0.02)
        with contextlib.suppress(RuntimeError), timer.phase("reward"):
            time.sleep(0.01)
            raise RuntimeError
    times = timer.pop()
    assert set(times) == {"time/step", "time/rollout", "time/reward"}
    assert 0.04 <= times["time/rollout"] < 0.5
    assert 0.01 <= times["time/reward"] < 0.5
    assert times["time/step"] >= times["time/rollout"] + times["time/reward"]
    assert timer.pop() == {}


def test_peak_memory_is_the_resident_size_in_gib():
    before = peak_memory_gib(CPU)
    assert 0.05 < before < 64
    block = torch.ones(2**28 // 4)  # 0.25 GiB, touched
    assert peak_memory_gib(CPU) >= 0.25
    del block


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_is_reset_by_each_call():
    device = torch.device("cuda")
    block = torch.empty(2**28, device=device, dtype=torch.uint8)
    del block
    assert peak_memory_gib(device) >= 0.25
    assert peak_memory_gib(device) < 0.25


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter([100.0, 160.0, 162.0, 167.0])  # the first step compiles
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    with Console(total_steps=12, start_step=4) as console:
        console.step(5, METRICS)
        console.step(6, {"reward/mean": 0.5})
        console.step(7, {"reward/mean": 0.5})
    assert capsys.readouterr().out == (
        "step  5/12 | reward 0.531 | eval 0.610 | loss -0.0123 | kl 0.00012 | grad_norm 0.500"
        " | length 23.1 | tok/s 12,346 | seconds 1.23 | left ?\n"
        "step  6/12 | reward 0.500 | left 00:12\n"
        "step  7/12 | reward 0.500 | left 00:18\n"
    )


def test_a_bar_with_time_left_on_a_terminal(monkeypatch):
    output = io.StringIO()
    rich = RichConsole(file=output, force_terminal=True, width=100)
    monkeypatch.setattr(console_module, "on_terminal", lambda: True)
    monkeypatch.setattr(console_module, "terminal", lambda: rich)
    with Console(total_steps=4) as console:
        console.step(1, {"reward/mean": 0.5})
        console.step(2, {"reward/mean": 0.75, "time/step": 2.0})
    text = output.getvalue()
    assert "step 1/4 | reward 0.500" in text
    assert "step 2/4 | reward 0.750 | seconds 2.00" in text
    assert "2/4" in text
    assert "00:00 left" in text


def test_a_run_of_one_step_has_no_time_left(capsys):
    with Console(total_steps=1) as console:
        console.step(1, {})
    assert capsys.readouterr().out == "step 1/1 | left 00:00\n"


def documented() -> list[str]:
    """Patterns of the keys in docs/metrics.md; <…> there stands for any name."""
    text = (ROOT / "docs" / "metrics.md").read_text().partition("## Keys of metrics.jsonl")[2]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    keys = [key for row in rows for key in re.findall("`([^`]+)`", row)]
    return [re.sub("<[a-z]+>", ".+", re.escape(key)) for key in keys]


RUNS = {
    "saves and evaluates": {
        "eval_data": str(tiny_job.ASSETS / "max_digit" / "eval.jsonl"),
        **{"eval_steps": 1, "save_steps": 1, "init_kl_coef": 0.1},
    },
    "a critic": {
        **{"advantage_estimator": "gae", "reward_running_norm": True, "reward_clip": 0.5},
        **{"advantage_clip": 0.1, "overlong_buffer_len": 2, "rollout_correction": "token_tis"},
    },
    "cpgd": {"advantage_estimator": "cpgd", "dynamic_sampling": True, "max_epochs": 2},
    "a step that collects": {"train_batch_size": 32, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_key_that_a_run_writes_is_documented(tmp_path, name):
    tiny_job.run(tmp_path, **RUNS[name])
    keys = {key for record in tiny_job.records(tmp_path) for key in record}
    assert len(keys) > 25
    unknown = [key for key in keys if not any(re.fullmatch(p, key) for p in documented())]
    assert unknown == []


def test_a_long_phase_tells_how_far_it_is_ever_more_seldom(monkeypatch, caplog):
    caplog.set_level("INFO", logger="torchrft")
    monkeypatch.setattr(progress, "SECONDS_UNTIL_FIRST", 0.1)
    timer = PhaseTimer(CPU)
    with timer.phase("step"), timer.phase("rollout"):
        for _ in progress.each(range(8), 8, "samples"):
            time.sleep(0.1)
    told = list(caplog.messages)
    assert 1 <= len(told) <= 4  # after 0.1, 0.2, 0.4 seconds, and of the inner phase alone
    for line in told:
        assert re.fullmatch(r"rollout: \d seconds so far, [0-7] of 8 samples", line)
    time.sleep(0.5)
    assert caplog.messages == told
    with timer.phase("update"):
        time.sleep(0.15)
    assert caplog.messages[-1] == "update: 0 seconds so far"


def test_a_short_phase_says_nothing(caplog):
    caplog.set_level("INFO", logger="torchrft")
    with PhaseTimer(CPU).phase("rollout"):
        progress.at(1, 2, "samples")
    assert caplog.messages == []


def test_a_librarys_bar_is_counted_and_not_shown(capfd):
    bar = progress.Counted(total=4, desc="Processed prompts", dynamic_ncols=True, postfix="x")
    bar.update(3)
    assert progress._counts["requests"] == (3, 4)
    assert bar.format_dict["elapsed"] >= 0
    bar.close()
    assert capfd.readouterr() == ("", "")


def test_step_line_leaves_out_what_is_missing():
    assert step_line(3, 3, {"policy/kl": 0.0}) == "step 3/3 | kl 0.00000"


def test_summary_spans_a_resume():
    records = [
        {"step": 0, "eval/reward/mean": 0.02},
        {"step": 1, "reward/mean": 0.1},
        {"step": 20, "reward/mean": 0.9, "eval/reward/mean": 0.95},
    ]
    assert summary_lines({"log": "/x/logs", "export": "/x/hf/step-20"}, records, 3671.2) == [
        "",
        "finished at step 20 after 1:01:11",
        "evaluation reward 0.020 (step 0) -> 0.950 (step 20)",
        "log     /x/logs",
        "export  /x/hf/step-20",
    ]
    assert summary_lines({}, [], 59.6) == ["", "finished at step 0 after 01:00"]


def test_summary_is_printed_once_the_bar_is_gone(capsys):
    with Console(total_steps=1) as console:
        console.summary({"metrics": "m.jsonl"}, [{"step": 1}])
    assert capsys.readouterr().out == "\nfinished at step 1 after 00:00\nmetrics  m.jsonl\n"


def test_dump_writes_every_field(tmp_path):
    row = {
        "prompt": "größte Zahl?\n",
        "response": "9\ud800",  # a lone surrogate must not lose the file
        "reward": float("nan"),
        "reward_parts": {"exact_match": 1.0},
        "length": 2,
        "finish_reason": "length",
        "label": ["9", {"x": 1}],
        "group": 3,
        "policy_version": 7,
    }
    path = dump(tmp_path, 5, [row, row])
    assert path == tmp_path / "rollouts" / "step-5.jsonl"
    lines = path.read_text().split("\n")
    assert len(lines) == 3
    assert json.loads(lines[0]) == {**row, "reward": None}
    assert [p.name for p in path.parent.iterdir()] == ["step-5.jsonl"]


def png_size(path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def test_length_plot_is_a_png_and_repeats_exactly(tmp_path):
    lengths = [1, 5, 5, 17, 40]
    path = plot_lengths(tmp_path, 10, lengths, max_len=64)
    assert path == tmp_path / "plots" / "lengths-step-10.png"
    assert png_size(path) == (768, 480)
    first = path.read_bytes()
    assert plot_lengths(tmp_path, 10, lengths, max_len=64).read_bytes() == first
    assert plot_lengths(tmp_path, 10, [3], max_len=64).read_bytes() != first
    assert png_size(plot_lengths(tmp_path, 11, [70], max_len=64)) == (768, 480)


def test_reward_plot_from_metrics(tmp_path):
    assert plot_curves(tmp_path) is None
    records = [
        {"step": 0, "eval/reward/mean": 0.0},
        {"step": 1, "reward/mean": 0.1},
        {"step": 2, "reward/mean": None},
        {"step": 3, "reward/mean": 0.4, "eval/reward/mean": 0.5},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "plots" / "reward.png"
    assert png_size(path) == (768, 480)
