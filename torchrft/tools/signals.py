"""Stop a run from outside without losing work."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

# On Ctrl-C a worker hears from the terminal and, right after, from its launcher: one key press, two
# signals. Only a later one is a person who insists.
SECONDS_BETWEEN_KEY_PRESSES = 1.0
# Slurm and Kubernetes kill 30 seconds after SIGTERM: a rollout that hangs leaves time to save.
SECONDS_TO_FINISH = 10.0
TIMES_TO_ASK = 20  # what goes on all the same, twice a second
# SIGHUP is a terminal's end, SIGUSR1 the warning that Slurm is asked for by --signal.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


LAUNCHER = "TORCHRFT_LAUNCHER"  # the environment variable with the process id of a rank's launcher
_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


def end_with_launcher() -> None:
    """The kernel kills this rank as soon as its launcher has ended, in whatever way.

    A rank that trained on would write beside the one that is started in its place.
    """
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # started by hand, and may outlive its shell
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if launcher is not None and os.getppid() != int(launcher):  # it ended before the call
        os._exit(128 + signal.SIGKILL)


def exit_on_signal() -> None:
    """A signal of STOPS ends the program by SystemExit with 128 + signal, after one line.

    Meant for what comes before a run can save. A rank among several keeps the default of all but
    Ctrl-C, which also ends what waits for other ranks in C++; its launcher says the line.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ
    for signum in heard_signals(STOPS if alone else (signal.SIGINT,)):
        signal.signal(signum, _exit)


def heard_signals(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """`signals` without SIGHUP where nohup ignores it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signum for signum in signals if not (signum == signal.SIGHUP and ignored)]


def _exit(signum: int, frame: FrameType | None) -> None:
    for number in heard_signals(STOPS):
        signal.signal(number, signal.SIG_DFL)
    _say(f"error: stopped by {signal.Signals(signum).name}")
    raise SystemExit(128 + signum)


def _say(line: str) -> None:
    # Not through logging: a handler may interrupt a write to the very same stream.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())


class Abandoned(BaseException):
    """The run is to end, and what is under way takes too long to be waited for."""


class SecondKeyboardInterrupt(KeyboardInterrupt):
    """A second Ctrl-C, told apart from a KeyboardInterrupt that a user's function raises."""


class StopSignal:
    """While entered, a signal of STOPS asks the run to save and end instead of killing it.

    `received` is the first signal's number. A second Ctrl-C raises SecondKeyboardInterrupt. What
    runs within `abandonable` is left by Abandoned if it does not end within SECONDS_TO_FINISH. What
    swallows it gets it again, TIMES_TO_ASK in all; then `last_resort` runs in another thread, and
    the process ends with 128 + signal. Enter it in the main thread only (Python allows signal
    handlers nowhere else).

    >>> with StopSignal() as stop:
    ...     stop.received is None
    True
    """

    def __init__(self, last_resort: Callable[[], None] = lambda: None) -> None:
        self.received: int | None = None
        self.last_resort = last_resort
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._may_leave = False
        self._ended = threading.Event()
        self._looking = threading.Lock()  # held by who decides on the last resort, to its end

    def __enter__(self) -> Self:
        for signum in heard_signals(STOPS):
            self._previous[signum] = signal.signal(signum, self._handle)
        threading.Thread(target=self._remind, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """What runs inside may be left where it is: nothing that is kept depends on it."""
        self._may_leave = True
        try:
            yield
        finally:
            self._may_leave = False
            with self._looking:  # what comes next must not change what a last resort saves
                pass

    def _remind(self) -> None:
        """Signals the main thread again, which may hang where it looks at no variable."""
        asked = 0
        while not self._ended.wait(0.5):
            with self._looking:
                if self.received is None or not self._may_leave or not self._is_late():
                    continue
                if (asked := asked + 1) > TIMES_TO_ASK:
                    self.last_resort()
                    os._exit(128 + self.received)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _is_late(self) -> bool:
        return time.monotonic() - self._received_at > SECONDS_TO_FINISH

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signum, now
            rank, name = os.environ.get("RANK", "0"), signal.Signals(signum).name
            _say(f"rank {rank}: received {name}, saving at the end of this step")
        elif signum == signal.SIGINT and now - self._received_at > SECONDS_BETWEEN_KEY_PRESSES:
            raise SecondKeyboardInterrupt
        elif self._may_leave and self._is_late():
            raise Abandoned
