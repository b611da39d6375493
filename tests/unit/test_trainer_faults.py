"""Whatever ends a run, the state after its last finished step is saved."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_job
import torch
from helpers import run_ranks
from tiny_job import records

from torchrft import train
from torchrft.checkpoint import CheckpointManager, hf_export
from torchrft.metrics import logger as logger_module
from torchrft.tools import distributed
from torchrft.tools.distributed import Agreement, RankError, World
from torchrft.tools.signals import Abandoned, SecondKeyboardInterrupt
from torchrft.trainer import Trainer

STEPS = 5
OPTIONS = {"max_steps": STEPS, "eval_data": tiny_job.FLAGS["prompt_data"], "eval_steps": 2}
OPTIONS["train_batch_size"] = 32  # samples wait at odd steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_job.run(folder, **OPTIONS)
    return folder


def raises(owner, name, count, error):
    """The `count`-th call of a method raises, or does what `error` does."""
    method, calls = getattr(owner, name), []

    def changed(*args, **options):
        calls.append(1)
        if len(calls) == count:
            if callable(error):
                return error()
            raise error
        return method(*args, **options)

    setattr(owner, name, changed)


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def assert_goes_on_as(folder, whole):
    tiny_job.run(folder, **OPTIONS, load_checkpoint="true")
    ends = [path / "hf" / f"step-{STEPS}" / "model.safetensors" for path in (folder, whole)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    measured = ("time/", "throughput/", "memory/")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(measured)} for row in records(path)]
        for path in (folder, whole)
    ]
    assert rows[0] == rows[1]


FAULTS = {
    # Calls are counted over evaluation (steps 1, 3 and the end) and rollouts (each step).
    "a reward": (lambda job: (job.collector.scorer, "score"), 6, 3),
    "an evaluation": (lambda job: (job.collector, "evaluate"), 2, 2),
    "the last evaluation": (lambda job: (job.collector, "evaluate"), 3, 5),
    "a rollout": (lambda job: (job.engine, "generate"), 6, 3),
    "log-probs": (lambda job: (job.learner, "compute_logprobs"), 2, 3),
    # Of 8 micro-batches a step: gradients of some are there, weights and schedule as they were.
    "a loss": (lambda job: (job.learner, "_policy_loss"), 11, 3),
    "a backward pass": (lambda job: (job.learner.policy, "backward"), 11, 3),
    "the log": (lambda job: (job.reporter.logger, "log"), 4, 4),
    "the weights' way to the engine": (lambda job: (job.engine, "update_weights"), 4, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_loses_no_finished_step(whole, tmp_path, name):
    owner, count, step = FAULTS[name]
    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(*owner(job), count, RuntimeError("it broke"))
        with pytest.raises(RuntimeError, match="it broke"):
            job.train()
    assert saved(tmp_path) == [f"step-{step}"]
    assert_goes_on_as(tmp_path, whole)


def test_a_fault_in_an_optimizer_saves_nothing_and_says_so(tmp_path, caplog, monkeypatch):
    """The weights are half changed then."""
    monkeypatch.setattr("torchrft.trainer.logger.propagate", True)
    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(job.learner.policy.optimizer, "step", 1, RuntimeError("it broke"))
        with pytest.raises(RuntimeError, match="it broke"):
            job.train()
    assert saved(tmp_path) == []
    assert "after step 0 is lost: the fault came in the middle of an update" in caplog.text


def test_a_second_ctrl_c_saves_nothing(tmp_path):
    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(job.collector.scorer, "score", 4, SecondKeyboardInterrupt())
        with pytest.raises(SecondKeyboardInterrupt):
            job.train()
    assert saved(tmp_path) == []


def test_a_save_that_fails_is_not_tried_twice(tmp_path):
    with tiny_job.trainer(tmp_path, **OPTIONS, save_steps=2) as job:
        calls = []

        def full(*_):
            calls.append(1)
            raise OSError(28, "No space left on device")

        job.checkpoints.save = full
        with pytest.raises(OSError, match="No space left"):
            job.train()
    assert calls == [1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_a_reward_hangs(whole, tmp_path, monkeypatch, signum):
    monkeypatch.setattr("torchrft.tools.signals.SECONDS_TO_FINISH", 0.1)

    def hang():
        os.kill(os.getpid(), signum)
        time.sleep(600)

    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(job.collector.scorer, "score", 6, hang)
        assert job.train() == signum
    assert saved(tmp_path) == ["step-3"]
    assert_goes_on_as(tmp_path, whole)


@pytest.mark.slow
def test_a_function_that_goes_on_after_a_signal_is_asked_again(whole, tmp_path, monkeypatch):
    """A function may catch everything, once for each sample."""
    monkeypatch.setattr("torchrft.tools.signals.SECONDS_TO_FINISH", 0.1)
    swallowed = []

    def hang_twice():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):
            try:
                time.sleep(600)
            except BaseException as error:
                swallowed.append(type(error))
        time.sleep(600)

    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(job.collector.scorer, "score", 6, hang_twice)
        assert job.train() == signal.SIGTERM
    assert swallowed == [Abandoned, Abandoned]
    assert saved(tmp_path) == ["step-3"]


GOES_ON_FOR_EVER = """
import os, signal, sys, time
import tiny_job
from torchrft.tools import signals

def hang(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

signals.SECONDS_TO_FINISH, signals.TIMES_TO_ASK = 0.1, 2
with tiny_job.trainer(sys.argv[1], max_steps=5) as job:
    score, calls = job.collector.scorer.score, []

    def scored(*arguments):
        calls.append(1)
        return hang() if len(calls) == 4 else score(*arguments)

    job.collector.scorer.score = scored
    job.train()
"""


@pytest.mark.slow
def test_a_function_that_never_lets_go_ends_with_all_steps_saved(tmp_path):
    code = [sys.executable, "-c", GOES_ON_FOR_EVER, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(code, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert saved(tmp_path) == ["step-3"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_a_step_that_ends_finish(tmp_path, signum):
    with tiny_job.trainer(tmp_path, **OPTIONS) as job:
        raises(job.learner, "update", 1, lambda: os.kill(os.getpid(), signum) or {})
        assert job.train() == signum
    assert saved(tmp_path) == ["step-2"]


def test_nohup_goes_on_ignoring_hangups(tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with tiny_job.trainer(tmp_path, max_steps=1) as job:
            raises(job.learner, "update", 1, lambda: os.kill(os.getpid(), signal.SIGHUP) or {})
            assert job.train() is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def _one_rank_fails(rank, folder, name):
    config = tiny_job.tiny_config(2, save_path=folder, max_steps=4, train_batch_size=16)
    job = Trainer(config, World(rank, 2, rank, torch.device("cpu")))
    if rank == 1:
        raises(*FAULTS[name][0](job), 3, ValueError("it broke"))
    with pytest.raises(ValueError if rank == 1 else RankError, match="it broke"):
        job.train()
    return job.state.step


@pytest.mark.parametrize("name", ["a reward", "a rollout"])
def test_a_fault_of_one_rank_is_saved_by_all(tmp_path, name):
    assert run_ranks(_one_rank_fails, 2, str(tmp_path), name) == [2, 2]
    assert saved(tmp_path) == ["step-2"]


def _agree(rank):
    agreement = Agreement()
    started = time.monotonic()
    late = agreement.on(1, 0.2) if rank == 0 else False  # rank 1 waits elsewhere
    seconds = time.monotonic() - started
    distributed.barrier()
    other = Agreement()
    return late, seconds < 30, other.on(3, 20.0), Agreement().on(rank, 20.0)


def test_ranks_that_do_not_come_are_not_waited_for():
    assert run_ranks(_agree, 2) == [(False, True, True, False)] * 2


# ------------------------------------------------------------ disks


@pytest.fixture
def small_files():
    """No file grows beyond 200 kB: what torch, safetensors and Python write fails halfway."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=200_000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def ended(words, capsys):
    """The exit code of a job in this process, and its last line."""
    code = train.main(words)
    torch.use_deterministic_algorithms(False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return code, lines[0]


@pytest.mark.parametrize("file", ["the checkpoint", "the export"])
def test_a_full_disk_is_one_sentence_and_loses_no_checkpoint(
    tmp_path, capsys, monkeypatch, small_files, file
):
    save = CheckpointManager.save

    def fills(self, step, *rest):
        if step == 2 and file == "the checkpoint":
            small_files()
        return save(self, step, *rest)

    write = hf_export._write_weights

    def fills_export(*rest):
        if file == "the export" and "step-2" in str(rest[-1]):
            small_files()
        return write(*rest)

    monkeypatch.setattr(CheckpointManager, "save", fills)
    monkeypatch.setattr(hf_export, "_write_weights", fills_export)
    words = tiny_job.argv(save_path=tmp_path, max_steps=3, save_steps=1)
    code, line = ended(words, capsys)
    assert code == 1
    assert f"error: {tmp_path}/checkpoints/step-2" in line or f"{tmp_path}/hf/step-2" in line
    assert "File too large; raise the limit of a file's size (ulimit -f)" in line
    names = {
        path.name for folder in ("checkpoints", "hf") for path in (tmp_path / folder).iterdir()
    }
    assert names == {"step-1"}  # nothing half-written takes room
    assert not (tmp_path / "crashes").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts/step-2.jsonl"])
def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch, number, name):
    """The steps before it are saved; the row that was not written is written on resume."""
    line, write = logger_module.json_line, Path.write_bytes

    def full(thing, *content):
        which = thing.get("step") if isinstance(thing, dict) else thing.name
        if which in (2, ".step-2.jsonl.tmp"):
            raise OSError(number, os.strerror(number))
        return line(thing) if isinstance(thing, dict) else write(thing, *content)

    if name == "metrics.jsonl":
        monkeypatch.setattr(logger_module, "json_line", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    code, text = ended(tiny_job.argv(save_path=tmp_path, max_steps=3), capsys)
    monkeypatch.undo()
    assert code == 1
    sentence = rf"error: {tmp_path}/logs/{name}: {os.strerror(number)}; .*name another folder"
    assert re.fullmatch(sentence, text)
    assert saved(tmp_path) == ["step-2" if name == "metrics.jsonl" else "step-1"]
    tiny_job.run(tmp_path, max_steps=3, load_checkpoint="true")
    assert [row["step"] for row in records(tmp_path)] == [1, 2, 3]


def test_a_deleted_log_is_told_of_and_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("torchrft.metrics.logger.logger.propagate", True)
    with tiny_job.trainer(tmp_path, max_steps=3) as job:
        finish = job._finish_step

        def deletes(metrics):
            finish(metrics)
            if job.progress.step == 1:
                shutil.rmtree(tmp_path / "logs")

        job._finish_step = deletes
        assert job.train() is None
    assert [row["step"] for row in records(tmp_path)] == [2, 3]
    assert "metrics.jsonl was deleted: it has no steps before 2 now" in caplog.text


@pytest.mark.parametrize("option", ["save_path", "log_dir"])
def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, capsys, option):
    (tmp_path / "logs").write_text("mine")
    flags = {"save_path": tmp_path} if option == "save_path" else {"log_dir": tmp_path / "logs"}
    words = tiny_job.argv(**{"save_path": tmp_path / "run", **flags})
    try:
        code, line = ended(words, capsys)
    except SystemExit as done:  # seen before anything else is
        code, line = done.code, capsys.readouterr().err
    assert code in (1, 2)
    assert f"{tmp_path}/logs" in line
    assert "another folder" in line
    assert (tmp_path / "logs").read_text() == "mine"


def test_a_full_disk_under_the_output_keeps_the_exit_code(tmp_path):
    """/dev/full fails every write that is flushed."""
    code = "from torchrft import train; train._end_of_rank('x', 2); train._end([7])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full)
    assert done.returncode == 7
