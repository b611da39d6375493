"""A run that was stopped, in whatever way, and resumed is the run that was never stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_job
import torch
import torch.distributed.checkpoint as dcp
from tiny_job import ROOT, argv, prompt_file, records, run_process
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrft.checkpoint.dcp_files import LoadPlanner, Reader

STEPS = 8  # 10 prompts in rollouts of 4, 3 episodes: passes end within steps 3, 5 (exactly) and 8
KINDS = {
    # Checkpoints after steps 3 and 6 and where a pass ends: 3, 5, 8.
    "plain": {},
    # An optimizer step every 2 rollouts: samples wait at steps 1, 3, 5, 7.
    "pending": {"train_batch_size": 32},
    # A reference model, several optimizer steps on packed samples, momentum of all kinds.
    "full": {
        "init_kl_coef": 0.1,
        "train_batch_size": 8,
        "max_epochs": 2,
        "packing_samples": "true",
        "l2": 0.1,
        "plot_every": 3,
    },
}
LOGGED = "torchrft.metrics.logger:MetricLogger.log"
SAVED = "torchrft.trainer:Trainer.save"


class Job:
    """A kind of job in a folder of its own."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        folder.mkdir(exist_ok=True)
        self.words = argv(
            save_path=folder / "run",
            prompt_data=prompt_file(folder / "prompts.jsonl", 10),
            eval_data=prompt_file(folder / "eval.jsonl", 6),
            eval_steps=3,
            num_episodes=3,
            max_steps=None,
            save_steps=3,
            max_ckpt_num=2,
            **({"plot_every": 1000} | KINDS[kind]),
        )

    def start(self, *more: str, interruption=None) -> int:
        return run_process([*self.words, *more], self.log, interruption)

    def resume(self, interruption=None) -> int:
        return self.start("--load_checkpoint", interruption=interruption)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def saved(self) -> list[int]:
        found = (self.run / "checkpoints").glob("step-*")
        return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Per kind, the job that ran through."""
    jobs: dict[str, Job] = {}

    def get(kind: str) -> Job:
        if kind not in jobs:
            job = Job(kind, tmp_path_factory.mktemp(kind))
            assert job.start() == 0, job.log.read_text()
            jobs[kind] = job
        return jobs[kind]

    return get


def everything_in(checkpoint: Path) -> dict:
    """All tensors and objects of a checkpoint by their path."""
    reader = Reader(checkpoint)
    content = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    planner = LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(content, storage_reader=reader, planner=planner, no_dist=True)
    return content


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def comparable(metrics: list[dict]) -> list[dict]:
    measured = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in m.items() if not k.startswith(measured)} for m in metrics]


def assert_same_end(job: Job, reference: Job) -> None:
    """Checkpoint, export, metrics and rollouts are those of the reference, to the last bit."""
    mine, theirs = (
        everything_in(each.run / "checkpoints" / f"step-{STEPS}") for each in (job, reference)
    )
    assert mine.keys() == theirs.keys()
    assert sum(name.startswith("policy/optimizer/state") for name in theirs) > 50
    different = [name for name in theirs if not same(mine[name], theirs[name])]
    assert not different
    exports = [each.run / "hf" / f"step-{STEPS}" / "model.safetensors" for each in (job, reference)]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    assert comparable(records(job.run)) == comparable(records(reference.run))
    assert [record["step"] for record in records(job.run)] == list(range(1, STEPS + 1))
    for folder in ("rollouts", "plots"):
        names = [
            sorted(p.name for p in (each.run / "logs" / folder).iterdir())
            for each in (job, reference)
        ]
        assert names[0] == names[1]
    for path in (reference.run / "logs" / "rollouts").iterdir():
        assert (job.run / "logs" / "rollouts" / path.name).read_bytes() == path.read_bytes()
    assert job.saved == reference.saved


@pytest.mark.slow
def test_the_reference_run_is_worth_comparing_with(never_stopped):
    for kind in KINDS:
        lines = records(never_stopped(kind).run)
        assert [line["step"] for line in lines if "eval/reward/mean" in line] == [1, 4, 7, 8]
        assert all(line["reward/std"] > 0 for line in lines)
        trained = [line for line in lines if line["grad_norm"] is not None]
        assert len(trained) == (4 if kind == "pending" else 8)
        assert all(line["grad_norm"] > 0 for line in trained)
    assert never_stopped("plain").saved == [6, 8]
    waiting = everything_in(never_stopped("pending").run / "checkpoints" / "step-8")
    batches = {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "train_batch_size": 32}
    batches["data_parallel_ranks"] = 1
    assert waiting["progress"] == {
        "step": 8,
        "pending": [],
        "pending_rollouts": 0,
        "batches": batches,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step", "signum"),
    [
        ("plain", 1, signal.SIGKILL),  # before anything was saved
        ("plain", 4, signal.SIGKILL),  # inside an episode, one step after a save
        (
            "plain",
            6,
            signal.SIGKILL,
        ),  # logged, not yet saved; the last save was at an episode's end
        ("plain", 3, signal.SIGTERM),
        ("pending", 4, signal.SIGKILL),  # resumes from step 3, where samples wait
        ("pending", 4, signal.SIGTERM),  # saves at step 5, where samples wait
        ("pending", 1, signal.SIGTERM),  # saves at step 2, where none do
        ("full", 4, signal.SIGKILL),
        ("full", 6, signal.SIGTERM),
    ],
    ids=str,
)
def test_resumed_run_is_bit_identical(never_stopped, tmp_path, kind, step, signum):
    job = Job(kind, tmp_path)
    code = job.start(interruption=(LOGGED, step, signum, "after"))
    if signum == signal.SIGKILL:
        assert code == -signal.SIGKILL
        assert records(job.run)[-1]["step"] == step
    else:  # the signal came in after a step, so the next one is finished and saved
        assert code == 128 + signal.SIGTERM
        assert job.saved[-1] == step + 1 == records(job.run)[-1]["step"]
        assert f"rank 0: received {signum.name}" in job.log.read_text()
    assert job.resume() == 0, job.log.read_text()
    if signum == signal.SIGKILL:
        assert_same_end(job, never_stopped(kind))
    else:
        assert_same_end_but_for_rotation(job, never_stopped(kind))


def assert_same_end_but_for_rotation(job: Job, reference: Job) -> None:
    """As assert_same_end, whichever older checkpoints are there.

    A save that SIGTERM caused may have pushed another one out, and a kill after the last save may
    have come before the rotation, which the next save makes up for.
    """
    assert job.saved[-1] == STEPS
    for step in set(reference.saved) - set(job.saved):
        shutil.copytree(
            reference.run / "checkpoints" / f"step-{step}",
            job.run / "checkpoints" / f"step-{step}",
        )
    for step in set(job.saved) - set(reference.saved):
        shutil.rmtree(job.run / "checkpoints" / f"step-{step}")
    assert_same_end(job, reference)


def test_a_run_stopped_again_and_again(never_stopped, tmp_path):
    job = Job("pending", tmp_path)
    assert job.start(interruption=(LOGGED, 2, signal.SIGKILL, "after")) == -9
    assert job.saved == []
    assert job.resume((LOGGED, 4, signal.SIGKILL, "before")) == -9  # step 4, not even logged
    assert job.saved == [3]
    assert job.resume((LOGGED, 1, signal.SIGTERM, "after")) == 143
    assert job.saved == [3, 5]
    assert job.resume((SAVED, 1, signal.SIGKILL, "after")) == -9
    assert job.saved == [5, 6]
    assert job.resume() == 0, job.log.read_text()
    assert_same_end(job, never_stopped("pending"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count", "when"),
    [
        # The second save, that of step 5.
        ("torchrft.checkpoint.manager:save_state", 2, "after"),
        ("torchrft.trainer:export_hf", 2, "before"),
        ("torchrft.checkpoint.manager:folders.publish", 3, "after"),  # the export is in place
        ("torchrft.checkpoint.manager:folders.publish", 4, "after"),  # and the checkpoint
        # The first rotation, at step 6, removes a checkpoint and its export.
        ("torchrft.checkpoint.manager:folders.remove", 1, "after"),  # one of the two is gone
        ("torchrft.checkpoint.folders:shutil.rmtree", 1, "before"),  # renamed, not yet removed
        # While writing what was rolled out.
        ("torchrft.metrics.rollout_dump:write_json_lines", 4, "before"),
    ],
    ids=str,
)
def test_kill_during_a_save(never_stopped, tmp_path, where, count, when):
    job = Job("plain", tmp_path)
    assert job.start(interruption=(where, count, signal.SIGKILL, when)) == -9
    assert job.resume() == 0, job.log.read_text()
    assert_same_end(job, never_stopped("plain"))
    leftovers = [p for p in job.run.rglob("*") if p.name.endswith((".tmp", ".old"))]
    assert not leftovers
    assert sorted(p.name for p in (job.run / "hf").iterdir()) == ["step-6", "step-8"]


@pytest.mark.slow
def test_kill_during_the_first_save(never_stopped, tmp_path):
    for index, where in enumerate(
        (
            "torchrft.checkpoint.manager:save_state",
            "torchrft.trainer:export_hf",
            "torchrft.checkpoint.manager:folders.publish",
        )
    ):
        job = Job("plain", tmp_path / str(index))
        assert job.start(interruption=(where, 1, signal.SIGKILL, "after")) == -9
        assert job.resume() == 0, job.log.read_text()
        assert "is half-written; passed over" in job.log.read_text()
        assert_same_end(job, never_stopped("plain"))


def test_kill_during_the_last_rotation(never_stopped, tmp_path):
    job = Job("plain", tmp_path)
    removals = ("torchrft.checkpoint.manager:folders.remove", 3, signal.SIGKILL, "after")
    assert job.start(interruption=removals) == -9
    assert job.resume() == 0, job.log.read_text()
    assert_same_end_but_for_rotation(job, never_stopped("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["manifest", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(never_stopped, tmp_path, damage):
    job = Job("plain", tmp_path)
    assert job.start(interruption=(LOGGED, 6, signal.SIGKILL, "after")) == -9
    assert job.saved == [3, 5]
    newest = job.run / "checkpoints" / "step-5"
    data = newest / "__0_0.distcp"
    if damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    assert job.resume() == 0, job.log.read_text()
    said = job.log.read_text()
    assert "step-5 is not complete" in said
    assert "step-3, after step 3" in said
    assert_same_end(job, never_stopped("plain"))


def test_resume_when_nothing_was_saved_yet(never_stopped, tmp_path):
    job = Job("plain", tmp_path)
    assert job.resume() == 0, job.log.read_text()
    assert "no checkpoint under" in job.log.read_text()
    assert_same_end(job, never_stopped("plain"))
    assert not (job.run / "previous-1").exists()


def test_resume_of_a_finished_run_changes_nothing(never_stopped, tmp_path):
    job = Job("plain", tmp_path)
    shutil.copytree(never_stopped("plain").run, job.run)
    kept = ("checkpoints", "hf", "logs/metrics.jsonl", "logs/rollouts")

    def content():
        files = [p for name in kept for p in [job.run / name, *(job.run / name).rglob("*")]]
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files if p.is_file()}

    before = content()
    assert job.resume() == 0, job.log.read_text()
    after = content()
    assert {p: data for p, (data, _) in after.items()} == {p: d for p, (d, _) in before.items()}
    for path, (_, changed_at) in after.items():
        if path.name != "metrics.jsonl":  # rewritten with the same lines
            assert changed_at == before[path][1], path


@pytest.mark.slow
def test_a_run_goes_on_from_another_runs_checkpoint(never_stopped, tmp_path):
    job = Job("pending", tmp_path)
    source = never_stopped("pending").run / "checkpoints" / "step-6"
    assert job.start("--load_checkpoint", "--ckpt_path", str(source)) == 0, job.log.read_text()
    assert [record["step"] for record in records(job.run)] == [7, 8]
    mine = everything_in(job.run / "checkpoints" / "step-8")
    theirs = everything_in(never_stopped("pending").run / "checkpoints" / "step-8")
    assert same(mine, theirs)
    # The same command once more, as of a job that was preempted, goes on with its own.
    assert job.start("--load_checkpoint", "--ckpt_path", str(source)) == 0, job.log.read_text()
    assert "began from ckpt_path before and goes on" in job.log.read_text()
    assert [record["step"] for record in records(job.run)] == [7, 8]
    assert not (job.run / "previous-1").exists()
    # From yet another one: the two courses are not mixed.
    other = never_stopped("plain").run / "checkpoints"
    other = max(other.iterdir(), key=lambda path: path.stat().st_mtime)
    fresh = Job("plain", tmp_path / "fresh")
    assert fresh.start() == 0
    assert fresh.start("--load_checkpoint", "--ckpt_path", str(other)) == 0, fresh.log.read_text()
    assert (fresh.run / "previous-1" / "checkpoints").is_dir()
    # An earlier one of the run itself: what came later is set aside, not mixed with.
    older = Job("pending", tmp_path / "older")
    shutil.copytree(never_stopped("pending").run, older.run)
    words = ["--load_checkpoint", "--ckpt_path", str(older.run / "checkpoints" / "step-6")]
    assert older.start(*words) == 0, older.log.read_text()
    assert_same_end(older, never_stopped("pending"))
    aside = older.run / "previous-1" / "checkpoints"
    assert [path.name for path in aside.iterdir()] == ["step-8"]


def test_waiting_samples_are_refused_by_other_batch_sizes(tmp_path):
    assert len(tiny_job.run(tmp_path, max_steps=1, train_batch_size=32).progress.pending) == 16
    with (
        pytest.raises(
            ValueError,
            match=r"= 32 and holds samples that wait .*; this run has 64: resume with 32",
        ),
        tiny_job.trainer(tmp_path, train_batch_size=64, load_checkpoint=True),
    ):
        pass


def test_another_rollout_size_is_refused(tmp_path):
    """Steps are counted in rollouts: the end would come early, or late."""
    tiny_job.run(tmp_path, max_steps=1)
    with (
        pytest.raises(ValueError, match="with rollout_batch_size = 4; this run has 8: resume"),
        tiny_job.trainer(tmp_path, rollout_batch_size=8, load_checkpoint=True),
    ):
        pass


def test_a_coefficient_to_start_from_that_changed_is_started_from(tmp_path):
    common = {"kl_controller": "adaptive", "init_kl_coef": 0.5, "kl_horizon": 100}
    first = tiny_job.run(tmp_path, max_steps=1, **common)
    assert first.learner.kl_coef != 0.5
    with tiny_job.trainer(tmp_path, load_checkpoint=True, **common) as job:
        assert job.learner.kl_coef == first.learner.kl_coef
    with tiny_job.trainer(
        tmp_path, load_checkpoint=True, **{**common, "init_kl_coef": 0.25}
    ) as job:
        assert job.learner.kl_coef == 0.25


def test_options_changed_on_resume_hold(tmp_path):
    """Learning rate, schedule, betas and weight decay are those of the run that resumes."""
    common = {"max_steps": 4, "lr_warmup_ratio": 0.0, "lr_decay": "constant"}
    tiny_job.run(tmp_path / "run", **{**common, "max_steps": 2})
    changed = {"actor_learning_rate": 5e-4, "adam_betas": "0.8,0.9", "l2": 0.25}
    job = tiny_job.run(tmp_path / "run", **common, **changed, load_checkpoint=True)
    assert [line["lr"] for line in records(tmp_path / "run")] == [1e-3, 1e-3, 5e-4, 5e-4]
    for group in job.learner.policy.optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        assert group["initial_lr"] == 5e-4
    assert job.learner.policy.optimizer.param_groups[0]["weight_decay"] == 0.25
    step = next(iter(job.learner.policy.optimizer.state.values()))["step"]
    assert step == 4  # the moments went on


def test_a_checkpoint_of_another_data_order_is_refused(never_stopped, tmp_path):
    job = Job("plain", tmp_path)
    shutil.copytree(never_stopped("plain").run, job.run)
    before = sorted(p for p in job.run.rglob("*"))
    assert job.start("--load_checkpoint", "--seed", "7") == 2
    assert "seed = 42, this run 7" in job.log.read_text()
    assert sorted(p for p in job.run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_real_command_stopped_from_outside(never_stopped, tmp_path, signum):
    """Wherever the signal lands, the result is the same; nothing here depends on when that is."""
    job = Job("plain", tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torchrft.train", *job.words]
    with job.log.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        metrics = job.run / "logs" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signum)
        code = process.wait(60)
    if signum == signal.SIGTERM:
        assert code in (128 + signum, 0)  # 0: it had just finished
        assert job.saved[-1] == records(job.run)[-1]["step"]
    else:
        assert code in (-signum, 0)
    assert job.resume() == 0, job.log.read_text()
    assert_same_end_but_for_rotation(job, never_stopped("plain"))


def test_lr_total_steps_on_resume_are_those_of_the_job_that_resumes(tmp_path):
    """A step is at the same place, of another schedule."""
    common = {"lr_warmup_ratio": 0.0, "lr_decay": "linear", "lr_min_ratio": 0.0}
    words = [argv(save_path=tmp_path / "run", max_steps=n, **common) for n in (2, 4)]
    assert run_process([*words[0], "--lr_total_steps", "4"], tmp_path / "log") == 0
    again = [*words[1], "--load_checkpoint", "--lr_total_steps", "8"]
    assert run_process(again, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    rates = [line["lr"] for line in records(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, 7.5e-4, 7.5e-4, 6.25e-4], rel=1e-12)


HOLDER = """
import sys, time
from pathlib import Path
from torchrft.tools.lock import hold
hold(Path(sys.argv[1]), "x")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("option", ["save_path", "log_dir"])
def test_a_second_job_in_one_folder_is_refused(never_stopped, tmp_path, monkeypatch, option):
    """It ends before it touches a file; once the first is gone, in whatever way, it runs."""
    monkeypatch.setattr("torchrft.tools.lock.SECONDS_TO_END", 0.0)
    save_path, log_dir = tmp_path / "run", tmp_path / "logs"
    shutil.copytree(never_stopped("plain").run, save_path)
    words = [sys.executable, "-c", HOLDER, str(save_path if option == "save_path" else log_dir)]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        before = sorted(save_path.rglob("*"))
        with (
            pytest.raises(ValueError, match=rf"{option} \S+ is in use by process {first.pid} on "),
            tiny_job.trainer(save_path, log_dir=log_dir),
        ):
            pass
        assert sorted(save_path.rglob("*")) == before
    finally:
        first.kill()
        first.communicate()
    with tiny_job.trainer(save_path, log_dir=log_dir), tiny_job.trainer(save_path):
        pass  # one process may hold a folder twice
    again = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)  # it was let go of
    assert again.stdout.readline() == b"held\n"
    again.kill()
    again.communicate()


def test_a_job_waits_for_one_that_was_just_killed(tmp_path):
    from torchrft.tools.lock import hold

    words = [sys.executable, "-c", HOLDER.replace("60", "0.5"), str(tmp_path)]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    hold(tmp_path, "save_path")
    assert first.wait(60) == 0


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    from torchrft.tools.lock import hold

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr("torchrft.tools.lock.logger.propagate", True)
    hold(tmp_path, "save_path")
    assert "has no locks (No locks available): see to it that no other job has" in caplog.text
