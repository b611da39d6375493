"""One record a step, to metrics.jsonl and, if asked for, to TensorBoard and Weights & Biases."""

import math
import re
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from torchrft.config.job_config import Logging
from torchrft.metrics.files import METRICS_FILE, json_line, read_metrics, write_json_lines
from torchrft.tools.disk import writing
from torchrft.tools.distributed import is_main
from torchrft.tools.logging import logger

# The second group marks a file whose writing was cut short (see files.write_atomically).
STEP_FILE = re.compile(r".*step-([0-9]+)\.\w+(\.tmp)?")
RUN_ID_FILE = "wandb_run_id"


class MetricLogger(AbstractContextManager["MetricLogger"]):
    """Writes metrics from rank 0; on other ranks it does nothing.

    With `resume_step`, what an interrupted run wrote about later steps is removed first, so that
    the files end up as if it had not been interrupted. `run_config` is shown by W&B.

    >>> import tempfile
    >>> from torchrft.metrics.files import read_metrics
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricLogger(Logging(), folder, {}) as log:
    ...         log.log(1, {"reward/mean": 0.5})
    ...     read_metrics(folder)
    [{'step': 1, 'reward/mean': 0.5}]

    Raises:
        ValueError: `use_wandb` without the package, or a fresh run where metrics.jsonl exists.
    """

    def __init__(
        self,
        config: Logging,
        log_dir: str | Path,
        run_config: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> None:
        self._path: Path | None = None
        self._tensorboard = self._wandb = cast(Any, None)
        self._opened = ExitStack()
        if not is_main():
            return
        if config.use_wandb is not None and find_spec("wandb") is None:
            raise ValueError("use_wandb needs the package wandb: pip install 'torchrft[wandb]'")
        path = Path(log_dir) / METRICS_FILE
        if resume_step is not None:
            drop_after(path.parent, resume_step)
        elif path.exists():
            raise ValueError(f"{path} holds an earlier run; resume it or set it aside first")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._path = path
        if config.use_tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom needed

            purge_step = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(config.use_tensorboard, purge_step=purge_step)
            self._opened.callback(self._tensorboard.close)
        if config.use_wandb is not None:
            self._wandb = _open_wandb(config, path.parent, run_config, resume_step)
            self._opened.callback(self._wandb.finish)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the record of `step`. Values that are not finite are written as null."""
        if (path := self._path) is None:
            return
        if not path.exists():
            logger.warning("%s was deleted: it has no steps before %d now", path, step)
            path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for each row, so that neither a kill nor whoever moves the file loses one.
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json_line({"step": step, **metrics}))
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Flush and close everything; calling it again does nothing."""
        self._opened.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def drop_after(log_dir: Path, step: int) -> None:
    """Remove lines of metrics.jsonl, rollouts and plots that belong to steps after `step`."""
    if (log_dir / METRICS_FILE).exists():
        kept = [record for record in read_metrics(log_dir) if record["step"] <= step]
        write_json_lines(log_dir / METRICS_FILE, kept)
    for folder in ("rollouts", "plots"):
        for path in (log_dir / folder).glob("*step-*"):
            match = STEP_FILE.fullmatch(path.name)
            if match and (int(match[1]) > step or match[2]) and path.is_file():
                path.unlink()
    for path in (*log_dir.glob(".*.tmp"), *log_dir.glob("plots/.*.tmp")):
        if path.is_file():
            path.unlink()  # a kill came while it was written


def _open_wandb(
    config: Logging, log_dir: Path, run_config: Mapping[str, Any], resume_step: int | None
) -> Any:
    import wandb

    id_file = log_dir / RUN_ID_FILE
    if resume_step is None or not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12] + "\n")
    run: dict[str, Any] = {"id": id_file.read_text().strip(), "resume": "allow"}
    run |= {"project": config.use_wandb, "entity": config.wandb_org, "name": config.wandb_run_name}
    return wandb.init(config=dict(run_config), dir=str(log_dir), **run)
