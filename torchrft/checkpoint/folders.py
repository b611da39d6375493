"""Names and renames of step folders: what makes saving, replacing and removing safe to interrupt.

`step-N.tmp` is being written or removed and may hold anything. `step-N.old` is a complete folder
that is being replaced. Only `step-N` counts as a checkpoint.
"""

import os
import re
import shutil
from pathlib import Path

from torchrft.checkpoint.manifest import sync
from torchrft.tools.logging import logger

STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")  # as int() would also read step-04 and step-٤


def step_of(folder: Path) -> int | None:
    """N of a folder named step-N, else None."""
    match = STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def steps_in(parent: Path) -> dict[int, Path]:
    """The step-N folders of `parent`, by N, in rising order; empty if there is no such folder."""
    if not parent.is_dir():
        return {}
    found = ((step_of(path), path) for path in parent.iterdir() if path.is_dir())
    return dict(sorted((step, path) for step, path in found if step is not None))


def no_folders_in(parent: Path) -> list[Path]:
    """Files and dead links of `parent` that are called step-N: the next save would meet them."""
    found = parent.glob("step-*") if parent.is_dir() else ()
    return [path for path in found if step_of(path) is not None and not path.is_dir()]


def with_suffix(folder: Path, suffix: str) -> Path:
    """`step-3` -> `step-3.tmp` (Path.with_suffix would replace a suffix)."""
    return folder.with_name(folder.name + suffix)


def suffixed_in(parent: Path, suffix: str) -> list[Path]:
    """What is called step-N`suffix` in `parent`."""
    found = parent.glob(f"step-*{suffix}")
    return sorted(p for p in found if STEP_NAME.fullmatch(p.name.removesuffix(suffix)))


def publish(temporary: Path, final: Path) -> None:
    """Rename the finished `temporary` to `final`, replacing it if it exists.

    A kill at any point leaves the old or the new folder complete, under `final` or `final`.old,
    where `restore_interrupted` finds it.
    """
    old = with_suffix(final, ".old")
    if os.path.lexists(final):
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    delete(old)


def delete(path: Path) -> None:
    """Delete what is at `path`, if anything: a folder, a file or a link, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a step folder so that a kill never leaves half of it under its own name."""
    doomed = with_suffix(folder, ".tmp")
    delete(doomed)
    folder.rename(doomed)
    delete(doomed)


def restore_interrupted(parent: Path) -> None:
    """Finish what a killed `publish` left: bring back step-N.old if there is no step-N."""
    for old in suffixed_in(parent, ".old"):
        final = old.with_name(old.name.removesuffix(".old"))
        if final.is_dir() or not old.is_dir():
            delete(old)
        else:
            old.rename(final)
            logger.warning("a save was interrupted while replacing %s; the old one stays", final)


def clear_leftovers(parent: Path) -> None:
    """Delete step-N.tmp folders of saves that came to no end."""
    for leftover in suffixed_in(parent, ".tmp"):
        logger.warning("removing %s, which a save left without coming to its end", leftover)
        delete(leftover)


def size_in_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
