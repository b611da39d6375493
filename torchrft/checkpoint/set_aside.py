"""Make room for a fresh run without losing the one that lies there."""

import re
from pathlib import Path

from torchrft.checkpoint import folders
from torchrft.tools.distributed import on_main
from torchrft.tools.logging import logger

WRITTEN_TO_SAVE_PATH = ("config.toml", "checkpoints", "hf", "crashes")
WRITTEN_TO_LOG_DIR = ("metrics.jsonl", "rollouts", "plots", "wandb", "wandb_run_id")


def set_aside(save_path: str | Path, log_dir: str | Path | None = None) -> None:
    """Move what an earlier run wrote to `previous-K` beside it, K being the next free number.

    Only the files and folders that a run writes are moved; others stay. A `log_dir` outside the
    default `save_path/logs` is treated alike. An empty or missing folder is left as it is. All
    ranks call it.
    """
    on_main(lambda: _set_aside(Path(save_path), log_dir), "set the earlier run aside")


def _set_aside(save_path: Path, log_dir: str | Path | None) -> None:
    for parent in (save_path / "checkpoints", save_path / "hf"):
        folders.restore_interrupted(parent)
        folders.clear_leftovers(parent)  # a half-written checkpoint is of no use to anybody
    _move(save_path, [*WRITTEN_TO_SAVE_PATH, *(f"logs/{name}" for name in WRITTEN_TO_LOG_DIR)])
    if log_dir is not None and Path(log_dir).resolve() != (save_path / "logs").resolve():
        _move(Path(log_dir), list(WRITTEN_TO_LOG_DIR))


def _move(folder: Path, names: list[str]) -> None:
    moved = move_to_previous(folder, [name for name in names if (folder / name).exists()])
    if moved:
        logger.info("%s holds an earlier run; %s", folder, moved)


def move_to_previous(folder: Path, names: list[str]) -> str:
    """Moves `names` of `folder` to the first free `previous-K` in it.

    Returns a sentence about it, empty without names.
    """
    found = (re.fullmatch(r"previous-(\d+)", path.name) for path in folder.glob("previous-*"))
    taken = max((int(match[1]) for match in found if match), default=0)
    target = folder / f"previous-{taken + 1}"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
    return f"moved {', '.join(names)} to {target}" if names else ""
