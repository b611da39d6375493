"""What a run tells about itself: metrics, times, console, rollouts, plots."""

from torchrft.metrics.console import Console
from torchrft.metrics.files import read_metrics
from torchrft.metrics.logger import MetricLogger
from torchrft.metrics.plots import plot_curves, plot_lengths
from torchrft.metrics.rollout_dump import dump
from torchrft.metrics.timing import PhaseTimer, peak_memory_gib

__all__ = [
    "Console",
    "MetricLogger",
    "PhaseTimer",
    "dump",
    "peak_memory_gib",
    "plot_curves",
    "plot_lengths",
    "read_metrics",
]
