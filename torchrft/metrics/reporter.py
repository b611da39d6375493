"""Everything that a run tells: samples, metrics, curves, alarms and the console's lines."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torchrft.config.job_config import Logging
from torchrft.metrics.console import Console
from torchrft.metrics.files import METRICS_FILE, read_metrics
from torchrft.metrics.logger import MetricLogger
from torchrft.metrics.plots import plot_curves, plot_lengths
from torchrft.metrics.rollout_dump import dump
from torchrft.metrics.rollout_stats import dump_rows, warn_of_mismatch
from torchrft.metrics.stuck import StuckAlarm
from torchrft.tools.distributed import is_main, on_main
from torchrft.tools.logging import logger
from torchrft.types import Sample


class Reporter(AbstractContextManager["Reporter"]):
    """Tells of the steps after `start_step` (0 in a fresh run) up to `last_step`, from rank 0.

    `settings` is the config, for W&B. `max_len` bounds the plot of lengths, `mismatch_alarm` is
    the mean difference of log-probs above which engine and trainer are said to differ.
    """

    def __init__(
        self,
        options: Logging,
        log_dir: Path,
        settings: Mapping[str, Any],
        start_step: int,
        last_step: int,
        max_len: int,
        mismatch_alarm: float,
    ) -> None:
        self.log_dir, self.plot_every = log_dir, options.plot_every
        self.max_len, self.mismatch_alarm = max_len, mismatch_alarm
        self.logger = MetricLogger(options, log_dir, settings, resume_step=start_step or None)
        records = read_metrics(log_dir) if start_step else []
        self.is_logged: bool = on_main(
            lambda: bool(records) and records[-1]["step"] == start_step, "read metrics"
        )
        self.stuck = StuckAlarm(records)
        self.console = Console(last_step, start_step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes all ranks' samples to rollouts/step-N.jsonl, and plots their lengths."""
        if is_main():
            dump(self.log_dir, step, dump_rows(samples))
            if step % self.plot_every == 0:
                lengths = [len(sample.completion.token_ids) for sample in samples]
                plot_lengths(self.log_dir, step, lengths, self.max_len)

    def write_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a finished step; `print_step` follows when that is remembered."""
        if is_main():
            warn_of_mismatch(step, metrics, self.mismatch_alarm)
            if warning := self.stuck.hear(metrics):
                logger.warning("step %d: %s", step, warning)
        self.logger.log(step, metrics)

    def print_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the line of a finished step."""
        self.console.step(step, metrics)

    def print_summary(self, step: int, paths: Mapping[str, Path]) -> None:
        """Prints how the run went and which of `paths` it wrote."""
        if not is_main():
            return
        paths = {**paths, "metrics": self.log_dir / METRICS_FILE}
        paths |= {name: self.log_dir / name for name in ("rollouts", "plots")}
        try:
            plot_curves(self.log_dir)
            records = read_metrics(self.log_dir)
        except (OSError, ValueError) as error:  # all is saved by now
            logger.warning("the summary lacks metrics: %s", error)
            records = [{"step": step}]
        self.console.summary({name: path for name, path in paths.items() if path.exists()}, records)

    def __enter__(self) -> "Reporter":
        self.console.__enter__()
        self.logger.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.logger.__exit__(*exception)
        finally:
            self.console.__exit__(*exception)
