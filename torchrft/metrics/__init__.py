"""What a run tells about itself: metrics, times, console, rollouts, plots."""

from torchrft.metrics.console import Console as Console
from torchrft.metrics.files import read_metrics as read_metrics
from torchrft.metrics.logger import MetricLogger as MetricLogger
from torchrft.metrics.plots import plot_curves as plot_curves
from torchrft.metrics.plots import plot_lengths as plot_lengths
from torchrft.metrics.rollout_dump import dump as dump
from torchrft.metrics.timing import PhaseTimer as PhaseTimer
from torchrft.metrics.timing import peak_memory_gib as peak_memory_gib
