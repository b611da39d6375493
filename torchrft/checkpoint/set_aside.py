"""Make room for a fresh run without losing the one that lies there."""

import re
from pathlib import Path

from torchrft.tools.distributed import on_main
from torchrft.tools.logging import logger

WRITTEN_TO_SAVE_PATH = ("config.toml", "checkpoints", "hf")
WRITTEN_TO_LOG_DIR = ("metrics.jsonl", "rollouts", "plots", "wandb", "wandb_run_id")


def set_aside(save_path: str | Path, log_dir: str | Path | None = None) -> None:
    """Move what an earlier run wrote to `previous-K` beside it, K being the next free number.

    Only the files and folders that a run writes are moved; others stay. A `log_dir` outside the
    default `save_path/logs` is treated alike. An empty or missing folder is left as it is. All
    ranks call it.
    """
    on_main(lambda: _set_aside(Path(save_path), log_dir), "set the earlier run aside")


def next_previous(folder: Path) -> Path:
    """The first free `folder/previous-K`; it is not created."""
    taken = [0]
    for path in folder.glob("previous-*"):
        if match := re.fullmatch(r"previous-(\d+)", path.name):
            taken.append(int(match[1]))
    return folder / f"previous-{max(taken) + 1}"


def _set_aside(save_path: Path, log_dir: str | Path | None) -> None:
    default_logs = save_path / "logs"
    names = [*WRITTEN_TO_SAVE_PATH, *(f"logs/{name}" for name in WRITTEN_TO_LOG_DIR)]
    _move(save_path, names)
    if log_dir is not None and Path(log_dir).resolve() != default_logs.resolve():
        _move(Path(log_dir), list(WRITTEN_TO_LOG_DIR))


def _move(folder: Path, names: list[str]) -> None:
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return
    target = next_previous(folder)
    for name in present:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
    logger.info("%s holds an earlier run; moved %s to %s", folder, ", ".join(present), target)
