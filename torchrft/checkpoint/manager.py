"""Save, find, rotate and load the checkpoints of one run.

Every method is collective: all ranks call it, on a file system that all of them share.
"""

import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchrft.checkpoint import folders, manifest
from torchrft.checkpoint.dcp_files import reading
from torchrft.checkpoint.set_aside import move_to_previous
from torchrft.checkpoint.state_io import load_state, save_state
from torchrft.tools.disk import writing
from torchrft.tools.distributed import get_rank, get_world_size, is_main, on_all, on_main
from torchrft.tools.logging import logger

Export = Callable[[Path], None]


class CheckpointManager:
    """Checkpoints under `save_path/checkpoints`, Hugging Face exports under `save_path/hf`.

    At most `max_num` steps are kept, and as few as fit into `max_bytes` (checkpoints and exports
    together); the newest always stays.

    >>> CheckpointManager("/tmp/new-run", max_num=3, max_bytes=10**12).find_latest() is None
    True
    """

    def __init__(self, save_path: str | Path, max_num: int, max_bytes: int) -> None:
        if max_num < 1:
            raise ValueError(f"max_num must be at least 1, got {max_num}")
        self.save_path = Path(save_path)
        self.checkpoints = self.save_path / "checkpoints"
        self.exports = self.save_path / "hf"
        self.max_num, self.max_bytes = max_num, max_bytes

    def save(self, step: int, state: dict[str, Any], export: Export | None = None) -> Path:
        """Save `state` (see state_io) as step `step` and return its folder.

        `export(folder)` writes the Hugging Face export; it too is called on every rank. The
        checkpoint appears under its name last, so a complete checkpoint has a complete export, and
        older ones go only then. A kill at any point loses no earlier checkpoint.

        Raises:
            OSError: it cannot be written. Other ranks raise RuntimeError with the same text.
        """
        self.set_aside_after(step)
        final = self.checkpoints / f"step-{step}"
        try:
            with writing(final):
                temporary = self._write(step, state, export)
                on_main(lambda: folders.publish(temporary, final), "publish checkpoint")
                on_main(lambda: self._rotate(step), "rotate checkpoints")
        except OSError:
            if is_main():  # what does not fit on a disk makes room there
                with suppress(OSError):
                    self._clear_leftovers()
            raise
        return final

    def _write(self, step: int, state: dict[str, Any], export: Export | None) -> Path:
        """Writes step-N.tmp, and all of the export."""
        temporary = self.checkpoints / f"step-{step}.tmp"
        on_main(lambda: self._start(temporary), "start checkpoint")
        save_state(temporary, state)
        records = on_all(lambda: _fingerprint_own_files(temporary), "checksum checkpoint")
        files = {name: record for part in records for name, record in part.items()}
        on_main(lambda: manifest.write(temporary, step, get_world_size(), files), "write manifest")
        if export is not None:
            self._export(step, export)
        return temporary

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Load the checkpoint `path` (from `find_latest` or `resolve`) into `state`, in place.

        Raises:
            ValueError: the checkpoint does not fit `state`; keys, shapes and dtypes are named.
        """
        load_state(path, state)

    def find_latest(self) -> Path | None:
        """The newest complete checkpoint of this run; damaged ones are named and passed over."""
        on_main(self._restore_interrupted, "find checkpoint")
        return _newest_complete(self.checkpoints)[0]

    def resolve(self, ckpt_path: str | None = None) -> Path | None:
        """The checkpoint that `ckpt_path` means: a step-N folder, a folder of them, or a run's.

        Without `ckpt_path`, the newest complete one of this run, or None if there is none.

        Raises:
            ValueError: `ckpt_path` was given and holds no complete checkpoint; the text says why.
        """
        if ckpt_path is None:
            return self.find_latest()
        path = Path(ckpt_path)
        if not path.is_dir():
            raise ValueError(f"ckpt_path {ckpt_path} is not a folder")
        if folders.step_of(path) is not None or (path / manifest.FILE_NAME).exists():
            if (fault := verify(path)) is not None:
                raise ValueError(f"ckpt_path {ckpt_path} is not a complete checkpoint: {fault}")
            return path
        parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        newest, faults = _newest_complete(parent)
        if newest is None:
            reason = "; ".join(faults) if faults else "no step-N folder in it"
            raise ValueError(f"ckpt_path {ckpt_path} holds no complete checkpoint: {reason}")
        return newest

    def began_from(self, ckpt_path: str) -> bool:
        """Whether this run began from another run's `ckpt_path` before and has checkpoints of its
        own: started again with the same command, it is to go on where it was."""
        written = self.save_path / "config.toml"
        if Path(ckpt_path).resolve().is_relative_to(self.save_path.resolve()):
            return False

        def read() -> Any:
            with reading(written):
                text = written.read_bytes().decode() if written.exists() else ""
                return tomllib.loads(text).get("checkpoint", {}).get("ckpt_path")

        same = on_main(read, "read the run's config") == ckpt_path
        return same and self.find_latest() is not None

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints and exports of later steps to `previous-K`.

        After a run resumed from `step`, they belong to a course of training that was left; kept
        here, the next resume would pick them.
        """
        on_main(lambda: self._set_aside_after(step), "set later checkpoints aside")

    def _set_aside_after(self, step: int) -> None:
        self._restore_interrupted()
        later = []
        for parent in (self.checkpoints, self.exports):
            numbers = [number for number in folders.steps_in(parent) if number > step]
            later += [f"{parent.name}/step-{number}" for number in numbers]
            later += [f"{parent.name}/{path.name}" for path in folders.no_folders_in(parent)]
        if moved := move_to_previous(self.save_path, later):
            logger.warning("%s: later than step %d, or no folder", moved, step)

    def tidy(self, step: int) -> None:
        """`set_aside_after`, and ends what a kill has left undone: saves and rotations."""

        def tidy() -> None:
            self._set_aside_after(step)
            self._clear_leftovers()
            self._rotate(step)

        on_main(tidy, "tidy checkpoints")

    def _clear_leftovers(self) -> None:
        folders.clear_leftovers(self.checkpoints)
        folders.clear_leftovers(self.exports)

    def _restore_interrupted(self) -> None:
        folders.restore_interrupted(self.checkpoints)
        folders.restore_interrupted(self.exports)

    def _start(self, temporary: Path) -> None:
        self._clear_leftovers()
        temporary.mkdir(parents=True)

    def _export(self, step: int, export: Export) -> None:
        final = self.exports / f"step-{step}"
        temporary = folders.with_suffix(final, ".tmp")
        on_main(lambda: temporary.mkdir(parents=True), "start export")
        export(temporary)

        def publish() -> None:
            manifest.sync_tree(temporary)
            folders.publish(temporary, final)

        on_main(publish, "publish export")

    def _rotate(self, newest: int) -> None:
        # An export without a checkpoint neither counts nor goes: it may be all a user kept.
        sizes = {step: self._bytes_of(step) for step in folders.steps_in(self.checkpoints)}
        for step in list(sizes):
            fits = len(sizes) <= self.max_num and sum(sizes.values()) <= self.max_bytes
            if fits or step == newest:
                return
            # The export goes first: after a kill in between, the checkpoint makes both go later.
            for parent in (self.exports, self.checkpoints):
                if (folder := parent / f"step-{step}").exists():
                    folders.remove(folder)
            del sizes[step]

    def _bytes_of(self, step: int) -> int:
        name = f"step-{step}"
        return sum(folders.size_in_bytes(p / name) for p in (self.checkpoints, self.exports))


def verify(folder: Path) -> str | None:
    """What makes `folder` unusable as a checkpoint, or None. The ranks share the reading."""

    def check() -> str | None:
        try:
            content = manifest.read(folder)
        except ValueError as error:
            return str(error)
        if folder.name != f"step-{content['step']}":
            return f"{manifest.FILE_NAME} is that of step {content['step']}"
        names = sorted(content["files"])[get_rank() :: get_world_size()]
        return manifest.find_fault(folder, {name: content["files"][name] for name in names})

    return next(filter(None, on_all(check, "verify checkpoint")), None)


def _newest_complete(parent: Path) -> tuple[Path | None, list[str]]:
    """The newest complete step-N folder of `parent`, and what is wrong with those passed over."""
    candidates, half_written = on_main(
        lambda: (folders.steps_in(parent), folders.suffixed_in(parent, ".tmp")), "list checkpoints"
    )
    faults = [f"{path} is half-written" for path in half_written]
    newest = None
    for folder in reversed(candidates.values()):
        if (fault := verify(folder)) is None:
            newest = folder
            break
        faults.append(f"{folder} is not complete: {fault}")
    for text in faults:
        logger.warning("%s; passed over", text)
    return newest, faults


def _fingerprint_own_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Checksums of the files that this rank wrote: DCP names them by rank; the rest is rank 0's."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    rank = get_rank()
    own = [name for name in names if name.startswith(f"__{rank}_")]
    rest = [name for name in names if not name.startswith("__")]
    return manifest.fingerprint(folder, own if rank else own + rest)
