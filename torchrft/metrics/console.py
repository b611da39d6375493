"""What a person sees of a run: progress with time left, one line per step, a summary."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from torchrft.tools.distributed import is_main
from torchrft.tools.logging import on_terminal, terminal

Paths = Mapping[str, str | Path]
Records = Sequence[Mapping[str, Any]]
# Shown name, metric, format.
COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("eval", "eval/reward/mean", "{:.3f}"),
    ("loss", "policy/loss", "{:.4f}"),
    ("kl", "policy/kl", "{:.5f}"),
    ("grad_norm", "grad_norm", "{:.3f}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("tok/s", "throughput/tokens_per_second", "{:,.0f}"),
    ("seconds", "time/step", "{:.2f}"),
)


class Console(AbstractContextManager["Console"]):
    """Progress of the steps after `start_step` (0 in a fresh run) up to `total_steps`.

    On a terminal a bar stays below the lines; elsewhere each line tells the time left, which the
    first step, slower than the others, does not count for. Ranks other than 0 print nothing.
    Leaving the context removes the bar.
    """

    def __init__(self, total_steps: int, start_step: int = 0) -> None:
        self.total_steps, self.start_step = total_steps, start_step
        self._started_at = time.monotonic()
        self._first_at = math.inf  # end of the first step, which compiles and warms up
        columns = ("training", BarColumn(), MofNCompleteColumn(), "{task.fields[left]}")
        is_shown = is_main() and on_terminal()
        self._bar = Progress(*columns, console=terminal(), disable=not is_shown)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, left="")
        self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a finished step; metrics that it lacks are left out."""
        now = time.monotonic()
        self._first_at = min(self._first_at, now)
        left = self._time_left(step, now - self._first_at)
        line_left = left if self._bar.disable else None
        self._print(step_line(step, self.total_steps, metrics, line_left))
        self._bar.update(self._task, completed=step, left=f"{left} left")

    def summary(self, paths: Paths, records: Records) -> None:
        """Print the end of the run: first and last evaluation reward, time, what was written where.

        `records` are the run's metrics as `read_metrics` returns them, so that a resumed run shows
        its evaluation before the interruption too.
        """
        self.close()
        for line in summary_lines(paths, records, time.monotonic() - self._started_at):
            self._print(line)

    def close(self) -> None:
        """Remove the bar; calling it again does nothing."""
        if self._bar.live.is_started:
            self._bar.stop()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _time_left(self, step: int, seconds: float) -> str:
        left, counted = self.total_steps - step, step - self.start_step - 1
        return _clock(seconds / max(counted, 1) * left) if counted > 0 or left == 0 else "?"

    def _print(self, line: str) -> None:
        if is_main() and on_terminal():
            terminal().print(escape(line), highlight=False, soft_wrap=True)
        elif is_main():
            print(line, flush=True)


def step_line(
    step: int, total_steps: int, metrics: Mapping[str, float], left: str | None = None
) -> str:
    """One legible line.

    >>> step_line(3, 100, {"reward/mean": 0.25, "time/step": 1.5}, left="02:25")
    'step   3/100 | reward 0.250 | seconds 1.50 | left 02:25'
    """
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, key, form in COLUMNS:
        value = metrics.get(key)
        # A step that only collects has no update to tell of.
        waits = metrics.get("update/optimizer_steps") == 0
        if value is not None and not (waits and math.isnan(value)):
            parts.append(f"{name} {form.format(value)}")
    if left is not None:
        parts.append(f"left {left}")
    return " | ".join(parts)


def summary_lines(paths: Paths, records: Records, seconds: float) -> list[str]:
    """The lines of the summary."""
    last_step = records[-1]["step"] if records else 0
    lines = ["", f"finished at step {last_step} after {_clock(seconds)}"]
    key = "eval/reward/mean"
    evaluated = [record for record in records if record.get(key) is not None]
    if evaluated:
        ends = [f"{record[key]:.3f} (step {record['step']})" for record in evaluated]
        lines.append(f"evaluation reward {ends[0]} -> {ends[-1]}")
    width = max((len(name) for name in paths), default=0)
    lines += [f"{name:<{width}}  {path}" for name, path in paths.items()]
    return lines


def _clock(seconds: float) -> str:
    """mm:ss, or h:mm:ss from an hour on."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")
