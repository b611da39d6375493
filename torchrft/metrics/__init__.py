"""What a run tells about itself: metrics, times, console, rollouts, plots."""

from torchrft.metrics.files import read_metrics as read_metrics
