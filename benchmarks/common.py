"""What the benchmarks share: the machine's line, medians and tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

REPOSITORY = Path(__file__).resolve().parent.parent
DEBUG_MODEL = str(REPOSITORY / "tests/assets/debug_model")


def machine(*packages: str) -> str:
    """One line: processor, cores, Python and the versions of `packages`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def seconds(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = perf_counter()
    function()
    return perf_counter() - start


def middle(values: Sequence[float]) -> str:
    """Median with the lowest and highest value.

    >>> middle([1.0, 3.0, 2.0])
    '2.0 (1.0-3.0)'
    """
    digits = 0 if median(values) >= 100 else 1 if median(values) >= 2 else 3
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    lines = (
        (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, rule, *rows)
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
