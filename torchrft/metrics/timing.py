"""Measured seconds per phase, and peak memory."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from torchrft.tools.progress import told


class PhaseTimer:
    """Adds up the seconds spent in named phases.

    On CUDA the device is waited for at both ends of a phase, so that work is counted where it was
    started. Phases may nest; each counts its whole time. `expected` ones are reported always.

    >>> timer = PhaseTimer(torch.device("cpu"))
    >>> with timer.phase("rollout"):
    ...     pass
    >>> list(timer.pop())
    ['time/rollout']
    """

    def __init__(self, device: torch.device, expected: Iterable[str] = ()) -> None:
        self._device = device
        self._expected = tuple(expected)
        self._seconds = dict.fromkeys(self._expected, 0.0)
        self.failed: str | None = None  # the innermost phase that an exception ended

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`, also if it raises; one that takes long is told of."""
        start = self._now()
        try:
            with told(name):
                yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def pop(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last `pop`, which starts from zero again."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._expected, 0.0)
        return {f"time/{name}": value for name, value in seconds.items()}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB (2**30 bytes): on CUDA, allocated by torch since the last call.

    On a CPU it is the largest resident size of this process since its start; the operating system
    has no way to reset it.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resident * bytes_per_unit / 2**30
