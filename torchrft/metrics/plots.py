"""PNG plots in `log_dir`/plots. Figures are made without pyplot, which keeps global state."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrft.metrics.files import read_metrics, write_atomically

NUM_BINS = 40


def plot_lengths(log_dir: str | Path, step: int, lengths: Sequence[int], max_len: int) -> Path:
    """Histogram of response lengths in tokens -> plots/lengths-step-N.png.

    `lengths` holds one or more; `max_len` is the longest response that was possible.
    """
    figure, axes = _figure()
    end = max(max_len, *lengths)
    axes.hist(lengths, bins=min(NUM_BINS, end + 1), range=(0, end + 1), color="tab:blue")
    mean = sum(lengths) / len(lengths)
    axes.axvline(mean, color="tab:orange", label=f"mean {mean:.1f}")
    axes.axvline(max_len, color="tab:red", linestyle="--", label=f"limit {max_len}")
    axes.set(xlabel="response length (tokens)", ylabel="responses", title=f"Step {step}")
    axes.legend()
    return _save(figure, Path(log_dir) / "plots" / f"lengths-step-{step}.png")


def plot_curves(log_dir: str | Path) -> Path | None:
    """Training and evaluation reward against steps, from metrics.jsonl -> plots/reward.png.

    Returns None if no reward was logged yet.
    """
    records = read_metrics(log_dir)
    figure, axes = _figure()
    for key, label, style in (
        ("reward/mean", "training (sampled)", {"alpha": 0.6}),
        ("eval/reward/mean", "evaluation (greedy)", {"marker": "o"}),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if not axes.lines:
        return None
    axes.set(xlabel="step", ylabel="mean reward")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, Path(log_dir) / "plots" / "reward.png")


def _figure() -> tuple[Any, Any]:
    # matplotlib takes a while to import and many runs plot seldom.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
    return path
