"""Lines about phases that take long: after ten seconds, and then ever more seldom."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any, TypeVar

from tqdm import tqdm

from torchrft.tools.logging import logger

T = TypeVar("T")

SECONDS_UNTIL_FIRST = 10.0
_MOST_SECONDS_BETWEEN = 300.0
_phases: list[str] = []  # those under way, the innermost last
_counts: dict[str, tuple[int, int]] = {}


def at(done: int, total: int, things: str) -> None:
    """Notes how far the phase under way is; costs nothing worth counting."""
    _counts[things] = done, total


def each(items: Iterable[T], total: int, things: str) -> Iterator[T]:
    """The `items`, of which there are `total`, counted as they are taken."""
    for done, item in enumerate(items):
        at(done, total, things)
        yield item


@contextmanager
def told(name: str) -> Iterator[None]:
    """Logs, from rank 0, how far the phase `name` is, while no phase inside of it is under way.

    The lines come 10, 20, 40, 80 … seconds after its start, and at most 300 apart.
    """
    start, ended = time.monotonic(), threading.Event()
    depth = len(_phases)
    _phases.append(name)
    _counts.clear()

    def tell() -> None:
        wait = SECONDS_UNTIL_FIRST
        while not ended.wait(wait):
            seconds = time.monotonic() - start
            wait = min(seconds, _MOST_SECONDS_BETWEEN)
            counts = "".join(f", {d} of {t} {name}" for name, (d, t) in [*_counts.items()])
            if len(_phases) == depth + 1:
                logger.info("%s: %.0f seconds so far%s", name, seconds, counts)

    threading.Thread(target=tell, name=f"progress of {name}", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        del _phases[depth:]


class Counted(tqdm):  # type: ignore[type-arg]
    """A bar of tqdm that shows nothing and counts here: for libraries that take a bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        quiet = {"file": StringIO(), "mininterval": 3600, "disable": False}
        super().__init__(*args, **{**options, **quiet})

    def update(self, n: float | None = 1) -> bool | None:
        at(int(self.n + (n or 0)), int(self.total or 0), "requests")
        return super().update(n)
