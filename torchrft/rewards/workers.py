"""Rules in processes of their own, which are killed when a sample takes too long or too much.

A worker imports no torch, so that it starts in a fraction of a second; it shares nothing with the
trainer but a socket, and ends with it.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from torchrft.rewards.registry import RuleFault, make_rule
from torchrft.rewards.rules import BUILT_IN, BuiltIn
from torchrft.rewards.source import RewardError, RewardResult

Rows = Sequence[Mapping[str, Any]]

_START_SECONDS = 120.0
GRACE = 1.0  # seconds beyond the deadline in which an async function returns what it has


@dataclass(frozen=True, slots=True)
class Task:
    """A rule as a worker makes it; `tolerant` as in Rule."""

    name: str
    options: Mapping[str, Any]
    tolerant: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """Samples that a worker judges in one go, by their places."""

    places: range
    seconds: float


class _Worker:
    """A process and what it is doing; `job` None is idle, or still starting."""

    def __init__(self, tasks: Sequence[Task], memory: int) -> None:
        self.connection, theirs = Pipe()
        # The process gets a signal when nobody holds the other end any more.
        ending, self.lifeline = Pipe(duplex=False)
        fds = (theirs.fileno(), ending.fileno())
        code = f"from torchrft.rewards.workers import serve; serve{fds}"
        paths = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        ending.close()
        self.connection.send((tasks, memory))
        self.is_ready = False
        self.job: _Job | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.job is None

    def kill(self) -> int:
        """Ends the process with all that it started; returns its exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        self.lifeline.close()
        return self.process.wait()


class WorkerPool:
    """Up to `count` processes, each with all `tasks`, started when there is work for them.

    `timeout` is in seconds per sample, `memory` in bytes beyond what a worker takes when loaded.
    """

    def __init__(self, tasks: Sequence[Task], count: int, timeout: float, memory: int) -> None:
        self.tasks, self.count, self.timeout, self.memory = tuple(tasks), count, timeout, memory
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()

    def run(self, task: int, rows: Rows, together: bool, seconds: float) -> list[RewardResult]:
        """Results of `tasks[task]` for `rows`, one by one or all `together` within `seconds`.

        Where a worker had to be killed or died, the results have an `error`. Raises RuleFault for a
        bug in the rule and RewardError if workers do not start.
        """
        step = len(rows) if together else 1
        jobs = deque(
            _Job(range(start, min(start + step, len(rows))), seconds)
            for start in range(0, len(rows), max(step, 1))
        )
        results: dict[int, RewardResult] = {}
        with self.lock:
            while len(self.workers) < min(self.count, len(jobs)):
                self.workers.append(_Worker(self.tasks, self.memory))
            try:
                while len(results) < len(rows):
                    self._assign(jobs, task, rows)
                    self._collect(results)
            except BaseException:  # nobody will fetch what the others find
                self._replace_busy()
                raise
        return [results[place] for place in range(len(rows))]

    def close(self) -> None:
        """Ends all workers."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _assign(self, jobs: deque[_Job], task: int, rows: Rows) -> None:
        for number, worker in enumerate(self.workers):
            if jobs and worker.is_idle:
                # From both ends, so that the samples of a prompt go to one worker, which remembers.
                worker.job = job = jobs.pop() if number % 2 else jobs.popleft()
                worker.deadline = time.monotonic() + job.seconds
                with suppress(OSError):  # it died in the meantime, which _collect will find
                    worker.connection.send((task, [rows[i] for i in job.places], self.timeout))

    def _collect(self, results: dict[int, RewardResult]) -> None:
        """Waits for the next answer or deadline, and takes all that there are."""
        busy = {worker.connection: worker for worker in self.workers if not worker.is_idle}
        nearest = min(worker.deadline for worker in busy.values())
        answered = wait(list(busy), max(nearest - time.monotonic(), 0.0))
        for worker in (busy[connection] for connection in answered):  # type: ignore[index]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                self._failed(worker, None, results)
                continue
            if kind == "fault" and worker.job is not None:
                index, text, worker.job = value[0] + worker.job.places[0], value[1], None
                raise RuleFault(index, text)
            if kind == "ready":
                worker.is_ready = True
            elif kind == "results" and worker.job is not None:
                results.update(zip(worker.job.places, value, strict=True))
                worker.job = None
            else:
                self._failed(worker, value, results)
        for worker in busy.values():
            if worker.connection not in answered and worker.deadline <= time.monotonic():
                seconds = worker.job.seconds if worker.job else _START_SECONDS
                self._failed(worker, f"it took more than {seconds:g} s", results)

    def _failed(
        self, worker: _Worker, reason: str | None, results: dict[int, RewardResult]
    ) -> None:
        """Puts another worker in the place of one that hangs, has died or is full."""
        code = worker.kill()
        if reason is None:
            reason = f"it died of signal {-code}" if code < 0 else f"it exited with {code}"
        place = self.workers.index(worker)
        if worker.job is None:
            del self.workers[place]
            raise RewardError(f"a worker process for reward functions does not start: {reason}")
        results.update(dict.fromkeys(worker.job.places, RewardResult(0.0, error=reason)))
        self.workers[place] = _Worker(self.tasks, self.memory)

    def _replace_busy(self) -> None:
        for place, worker in enumerate(self.workers):
            if worker.job is not None:
                worker.kill()
                self.workers[place] = _Worker(self.tasks, self.memory)


def serve(fd: int, lifeline: int) -> None:
    """A worker's life: makes its rules, then judges what comes until the trainer is gone."""
    # SIGIO ends this process and what it started, whatever they are doing.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    connection = Connection(fd)
    try:
        tasks, memory = connection.recv()
        rules = [replace(make_rule(t.name, t.options), tolerant=t.tolerant) for t in tasks]
        for task in tasks:  # also imports what a rule needs, before its deadlines count
            BUILT_IN.get(task.name, BuiltIn()).check(**task.options)
    except Exception as error:
        connection.send(("broken", f"{type(error).__name__}: {error}"))
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send(("ready", None))
    while True:
        try:
            place, rows, timeout = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = "results", rules[place](rows, timeout)
        except RuleFault as fault:
            answer = "fault", (fault.index, fault.text)
        except MemoryError:
            answer = "full", f"it took more than {memory / 2**30:g} GiB"
        connection.send(answer)
