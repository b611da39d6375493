import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from torchrft.checkpoint import CheckpointManager, set_aside
from torchrft.checkpoint import folders as folders_module

BIG = 10**12
TESTS = Path(__file__).resolve().parents[1]


def state(step: int) -> dict:
    return {"model": {"w": torch.full((1000,), float(step))}, "step": step}


def export(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 10_000)


def loaded_step(manager: CheckpointManager, path: Path) -> int:
    target = state(-1)
    manager.load(path, target)
    assert target["model"]["w"].unique().tolist() == [float(target["step"])]
    return target["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def manager(tmp_path) -> CheckpointManager:
    return CheckpointManager(tmp_path, max_num=3, max_bytes=BIG)


def test_save_writes_checkpoint_manifest_and_export(manager, tmp_path):
    path = manager.save(2, state(2), export)
    assert path == tmp_path / "checkpoints" / "step-2"
    assert names(tmp_path / "checkpoints") == ["step-2"]
    assert names(tmp_path / "hf") == ["step-2"]
    assert names(tmp_path / "hf" / "step-2") == ["model.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (2, 1)
    assert sorted([*manifest["files"], "manifest.json"]) == names(path)
    record = manifest["files"]["__0_0.distcp"]
    assert record["bytes"] == (path / "__0_0.distcp").stat().st_size
    assert manager.find_latest() == path


def test_rotation_by_count_keeps_the_newest(manager, tmp_path):
    for step in (2, 10, 9, 11, 12):  # 9 comes after 10: the later course counts
        manager.save(step, state(step), export)
    assert names(tmp_path / "checkpoints") == ["step-11", "step-12", "step-9"]
    assert names(tmp_path / "hf") == ["step-11", "step-12", "step-9"]
    assert names(tmp_path / "previous-1" / "checkpoints") == ["step-10"]
    assert names(tmp_path / "previous-1" / "hf") == ["step-10"]


def test_rotation_by_size_counts_exports_and_keeps_the_newest(tmp_path):
    first = CheckpointManager(tmp_path, max_num=10, max_bytes=BIG)
    first.save(1, state(1), export)
    one = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert one > 14_000
    limited = CheckpointManager(tmp_path, max_num=10, max_bytes=int(2.5 * one))
    for step in (2, 3, 4):
        limited.save(step, state(step), export)
    assert names(tmp_path / "checkpoints") == ["step-3", "step-4"]
    assert names(tmp_path / "hf") == ["step-3", "step-4"]
    tiny = CheckpointManager(tmp_path, max_num=10, max_bytes=1)
    tiny.save(5, state(5), export)
    assert names(tmp_path / "checkpoints") == ["step-5"]
    assert loaded_step(tiny, tmp_path / "checkpoints" / "step-5") == 5


def test_an_old_checkpoint_goes_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, max_num=1, max_bytes=BIG)
    manager.save(1, state(1))
    seen = []
    remove = folders_module.remove

    def watch(folder):
        seen.append((folder.name, manager.find_latest().name))
        remove(folder)

    monkeypatch.setattr(folders_module, "remove", watch)
    manager.save(2, state(2))
    assert seen == [("step-1", "step-2")]


def flip_byte(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(raw)


DAMAGE = {
    "truncated file": (
        lambda p: (p / "__0_0.distcp").write_bytes((p / "__0_0.distcp").read_bytes()[:-1]),
        "bytes instead of",
    ),
    "flipped byte": (lambda p: flip_byte(p / "__0_0.distcp", 2000), "wrong checksum"),
    "flipped byte in metadata": (lambda p: flip_byte(p / ".metadata", 30), "wrong checksum"),
    "deleted file": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "deleted manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "cannot be read"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "damaged"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_checkpoints_are_named_and_passed_over(manager, tmp_path, caplog, damage):
    manager.save(1, state(1))
    path = manager.save(2, state(2))
    action, text = DAMAGE[damage]
    action(path)
    with caplog.at_level(logging.WARNING, "torchrft"):
        latest = manager.find_latest()
    assert latest is not None
    assert latest.name == "step-1"
    warning = "\n".join(record.getMessage() for record in caplog.records)
    assert str(path) in warning
    assert text in warning
    assert loaded_step(manager, latest) == 1
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        manager.resolve(str(path))


@pytest.mark.slow
def test_every_flipped_bit_of_a_manifest_is_noticed_or_harmless(manager):
    path = manager.save(1, state(1))
    original = (path / "manifest.json").read_bytes()
    content = json.loads(original)
    noticed = 0
    for position in range(len(original)):
        flip_byte(path / "manifest.json", position)
        if manager.find_latest() is None:
            noticed += 1
        else:
            assert json.loads((path / "manifest.json").read_bytes()) == content
        (path / "manifest.json").write_bytes(original)
    assert noticed > 0.8 * len(original)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(manager, caplog):
    path = manager.save(1, state(1))
    path.rename(path.with_name("step-7"))
    assert manager.find_latest() is None
    assert "is that of step 1" in caplog.text


def test_resolve(manager, tmp_path):
    assert manager.resolve(None) is None
    first = manager.save(1, state(1))
    second = manager.save(2, state(2))
    for given, expected in (
        (None, second),
        (str(first), first),
        (str(first) + "/", first),
        (str(tmp_path / "checkpoints"), second),
        (str(tmp_path), second),
    ):
        assert manager.resolve(given) == expected
    elsewhere = CheckpointManager(tmp_path / "other", max_num=1, max_bytes=BIG)
    assert elsewhere.resolve(str(tmp_path)) == second


def test_resolve_explains_what_is_wrong(manager, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        manager.resolve(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint: no step-N folder in it"):
        manager.resolve(str(tmp_path / "empty"))
    path = manager.save(1, state(1))
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        manager.resolve(str(tmp_path))
    path.rename(path.with_name("step-1.tmp"))
    with pytest.raises(ValueError, match=r"step-1\.tmp is half-written"):
        manager.resolve(str(tmp_path))


def test_saving_a_step_again_replaces_it(manager, tmp_path):
    manager.save(1, state(1), export)
    manager.save(1, {"model": {"w": torch.full((1000,), 5.0)}, "step": 5}, export)
    assert names(tmp_path / "checkpoints") == ["step-1"]
    assert names(tmp_path / "hf") == ["step-1"]
    assert loaded_step(manager, manager.find_latest()) == 5


def test_set_aside_after_moves_the_course_that_was_left(manager, tmp_path, caplog):
    for step in (1, 2, 3):
        manager.save(step, state(step), export)
    with caplog.at_level(logging.WARNING, "torchrft"):
        manager.set_aside_after(1)
    assert manager.find_latest().name == "step-1"
    assert names(tmp_path / "previous-1" / "checkpoints") == ["step-2", "step-3"]
    assert "step-3" in caplog.text
    manager.set_aside_after(1)
    assert not (tmp_path / "previous-2").exists()


KILL = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torchrft.checkpoint import manager as module, CheckpointManager, folders
    from test_checkpoint_manager import state, export

    folder, phase, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    def after(owner, name):
        real = getattr(owner, name)
        setattr(owner, name, lambda *args: (real(*args), die()))

    if phase == "during DCP":
        count = 0
        class Deadly(dict):
            def items(self):
                die()
    if phase == "after DCP":
        after(module, "save_state")
    if phase == "after checksums":
        module.manifest.write = die
    if phase == "after manifest":
        after(module.manifest, "write")
    if phase == "during export":
        export = die
    if phase == "before publishing export":
        module.manifest.sync_tree = die
    if phase == "before publishing":
        real = folders.publish
        module.folders.publish = lambda t, f: (
            die() if f.parent.name == "checkpoints" else real(t, f)
        )
    if phase == "between renames":
        real = Path.rename
        def rename(self, target):
            if self.name.endswith(".tmp") and self.parent.name == "checkpoints":
                die()
            return real(self, target)
        Path.rename = rename
    if phase == "before rotation":
        module.CheckpointManager._rotate = die
    if phase == "during rotation":
        folders.shutil.rmtree = lambda path: (next(Path(path).iterdir()).unlink(), die())

    value = {**state(step), "extra": [Deadly()] if phase == "during DCP" else 0}
    CheckpointManager(folder, 2, 10**12).save(step, value, export)
    print("survived")
"""


def save_and_die(folder: Path, phase: str, step: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL), str(folder), phase, str(step)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS / 'unit'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


BEFORE_IT_IS_COMPLETE = (
    "during DCP",
    "after DCP",
    "after checksums",
    "after manifest",
    "during export",
    "before publishing export",
    "before publishing",
)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [*BEFORE_IT_IS_COMPLETE, "before rotation", "during rotation"])
def test_kill_while_saving_a_new_step(tmp_path, caplog, phase):
    manager = CheckpointManager(tmp_path, max_num=2, max_bytes=BIG)
    for step in (1, 2):
        manager.save(step, state(step), export)
    save_and_die(tmp_path, phase, 3)
    expected = 2 if phase in BEFORE_IT_IS_COMPLETE else 3
    with caplog.at_level(logging.WARNING, "torchrft"):
        latest = manager.find_latest()
    assert latest is not None
    assert latest.name == f"step-{expected}"
    if expected == 2:
        assert "step-3.tmp is half-written; passed over" in caplog.text
    target = {**state(-1), "extra": None} if expected == 3 else state(-1)
    manager.load(latest, target)
    assert target["step"] == expected
    assert (tmp_path / "hf" / f"step-{expected}" / "model.safetensors").exists()
    # The next save clears up and goes on.
    manager.save(4, state(4), export)
    assert names(tmp_path / "checkpoints") == [f"step-{expected}", "step-4"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert loaded_step(manager, manager.find_latest()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["after DCP", "before publishing", "between renames"])
def test_kill_while_saving_a_step_again(tmp_path, phase):
    manager = CheckpointManager(tmp_path, max_num=1, max_bytes=BIG)
    manager.save(3, state(3), export)
    save_and_die(tmp_path, phase, 3)
    latest = manager.find_latest()
    assert latest is not None
    assert loaded_step(manager, latest) == 3
    assert (tmp_path / "hf" / "step-3" / "model.safetensors").exists()
    manager.save(3, state(3), export)
    assert names(tmp_path / "checkpoints") == ["step-3"]
    assert names(tmp_path / "hf") == ["step-3"]


def test_an_export_without_checkpoint_stays_and_does_not_count(tmp_path):
    manager = CheckpointManager(tmp_path, max_num=2, max_bytes=BIG)
    manager.save(1, state(1), export)
    shutil.rmtree(tmp_path / "checkpoints" / "step-1")
    for step in (2, 3, 4):
        manager.save(step, state(step), export)
    assert names(tmp_path / "checkpoints") == ["step-3", "step-4"]
    assert names(tmp_path / "hf") == ["step-1", "step-3", "step-4"]


def test_leftovers_are_removed_with_a_log_line(manager, tmp_path, caplog):
    for parent in ("checkpoints", "hf"):
        (tmp_path / parent / "step-9.tmp").mkdir(parents=True)
        (tmp_path / parent / "step-9.tmp" / "part").write_text("x")
    (tmp_path / "checkpoints" / "step-mine.tmp").mkdir()  # not ours
    with caplog.at_level(logging.WARNING, "torchrft"):
        manager.save(1, state(1))
    assert names(tmp_path / "checkpoints") == ["step-1", "step-mine.tmp"]
    assert names(tmp_path / "hf") == []
    assert caplog.text.count("step-9.tmp, which a save left without coming to its end") == 2


def test_max_num_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_num must be at least 1, got 0"):
        CheckpointManager(tmp_path, max_num=0, max_bytes=1)


def make_run(save_path: Path, log_dir: Path) -> None:
    for folder in ("checkpoints/step-1", "hf/step-1"):
        (save_path / folder).mkdir(parents=True)
    (save_path / "config.toml").write_text("old")
    for folder in ("rollouts", "plots"):
        (log_dir / folder).mkdir(parents=True)
    (log_dir / "metrics.jsonl").write_text("old")


def test_set_aside_leaves_nothing_half_written_behind(tmp_path):
    for name in ("checkpoints/step-1.tmp", "hf/step-1.tmp", "hf/step-2.old", "hf/step-3"):
        (tmp_path / name).mkdir(parents=True)
    set_aside(tmp_path)
    assert names(tmp_path / "previous-1") == ["checkpoints", "hf"]
    assert names(tmp_path / "previous-1" / "checkpoints") == []
    assert names(tmp_path / "previous-1" / "hf") == ["step-2", "step-3"]


def test_set_aside_keeps_the_earlier_run_and_what_is_not_its(tmp_path, caplog):
    make_run(tmp_path, tmp_path / "logs")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "logs" / "console.txt").write_text("mine")
    with caplog.at_level(logging.INFO, "torchrft"):
        set_aside(tmp_path, tmp_path / "logs")
    assert names(tmp_path) == ["logs", "notes.txt", "previous-1"]
    assert names(tmp_path / "logs") == ["console.txt"]
    assert names(tmp_path / "previous-1") == ["checkpoints", "config.toml", "hf", "logs"]
    assert names(tmp_path / "previous-1" / "logs") == ["metrics.jsonl", "plots", "rollouts"]
    assert len(caplog.records) == 1
    make_run(tmp_path, tmp_path / "logs")
    shutil.rmtree(tmp_path / "hf")
    set_aside(tmp_path)
    assert names(tmp_path / "previous-2") == ["checkpoints", "config.toml", "logs"]


def test_set_aside_of_a_log_dir_elsewhere(tmp_path):
    make_run(tmp_path / "run", tmp_path / "elsewhere")
    set_aside(tmp_path / "run", tmp_path / "elsewhere")
    assert names(tmp_path / "run") == ["previous-1"]
    assert names(tmp_path / "elsewhere") == ["previous-1"]
    assert names(tmp_path / "elsewhere" / "previous-1") == ["metrics.jsonl", "plots", "rollouts"]


def test_set_aside_of_nothing(tmp_path, caplog):
    set_aside(tmp_path / "missing", tmp_path / "logs")
    (tmp_path / "other.txt").write_text("x")
    set_aside(tmp_path)
    assert names(tmp_path) == ["other.txt"]
    assert not caplog.records


def test_names_that_only_look_like_a_step_are_no_checkpoints(manager, tmp_path):
    path = manager.save(4, state(4), export)
    for name in ("step-04", "step-٤", "step-004", "step-4 ", "step-+4", "step-4.0"):
        shutil.copytree(path, path.with_name(name))
    assert manager.find_latest() == path
    manager.save(5, state(5), export)
    assert loaded_step(manager, path) == 4
    for step in (6, 7, 8, 9):
        manager.save(step, state(step), export)
    assert {"step-04", "step-٤", "step-004"} < set(names(tmp_path / "checkpoints"))
    assert folders_module.steps_in(tmp_path / "checkpoints").keys() == {7, 8, 9}


@pytest.mark.parametrize("kind", ["file", "dead link", "link to a file"])
@pytest.mark.parametrize("suffix", ["", ".tmp", ".old"])
def test_what_is_no_folder_is_not_in_a_checkpoints_way(manager, tmp_path, kind, suffix):
    manager.save(3, state(3), export)
    (tmp_path / "other").write_text("kept")
    for parent in ("checkpoints", "hf"):
        place = tmp_path / parent / f"step-4{suffix}"
        if kind == "file":
            place.write_text("kept")
        else:
            place.symlink_to(tmp_path / ("other" if kind == "link to a file" else "nowhere"))
    assert manager.find_latest().name == "step-3"
    path = manager.save(4, state(4), export)
    assert manager.find_latest() == path
    assert loaded_step(manager, path) == 4
    assert names(tmp_path / "hf") == names(tmp_path / "checkpoints") == ["step-3", "step-4"]
    assert (tmp_path / "other").read_text() == "kept"
    if not suffix:  # it may be a user's
        moved = tmp_path / "previous-1" / "checkpoints" / "step-4"
        assert os.path.lexists(moved)


def test_a_link_to_a_checkpoint_elsewhere_is_rotated_away_alone(manager, tmp_path):
    path = manager.save(1, state(1))
    path.rename(tmp_path / "step-1")
    path.symlink_to(tmp_path / "step-1")
    assert manager.find_latest() == path
    for step in (2, 3, 4):
        manager.save(step, state(step))
    assert names(tmp_path / "checkpoints") == ["step-2", "step-3", "step-4"]
    assert (tmp_path / "step-1" / "manifest.json").exists()


def test_what_a_killed_rotation_left_goes_on_resume(manager, tmp_path):
    for step in (1, 2, 3):
        manager.save(step, state(step), export)
    few = CheckpointManager(tmp_path, max_num=2, max_bytes=BIG)
    (tmp_path / "hf" / "step-1").rename(tmp_path / "hf" / "step-1.tmp")  # killed here
    few.tidy(3)
    assert names(tmp_path / "hf") == names(tmp_path / "checkpoints") == ["step-2", "step-3"]
