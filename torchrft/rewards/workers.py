"""Rules in processes of their own, which are killed when a sample takes too long or too much.

A worker imports no torch, so that it starts in a fraction of a second; it shares nothing with the
trainer but a socket, and ends with it.
"""

import fcntl
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from torchrft.rewards.registry import Rule, RuleFault, make_rule, told
from torchrft.rewards.rules import BUILT_IN, BuiltIn
from torchrft.rewards.source import RewardError, RewardResult

Rows = Sequence[Mapping[str, Any]]

_START_SECONDS = 120.0
_FLUSH = 0.05  # seconds for which a worker may keep results, so that quick ones travel together
_MOST = 32  # samples that travel together
_EARLY = 256  # samples of which a share must fail to end a run before all are judged
_BLOCKED = struct.pack("ll", 30, 0)  # seconds and microseconds in which a socket must move


@dataclass(frozen=True, slots=True)
class Task:
    """A rule as a worker makes it; `tolerant` as in Rule, `isolation` a sandbox's for programs."""

    name: str
    options: Mapping[str, Any]
    tolerant: bool
    isolation: Any = None


@dataclass(slots=True)
class _Job:
    """Samples on their way through a worker, by their places; the first `done` have results."""

    places: Sequence[int]
    done: int = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Samples that are judged, with what is still to do and what has been found, by their places.

    A sample has `seconds`, or all have them `together`.
    """

    task: int
    rows: Rows
    together: bool
    seconds: float
    jobs: deque[_Job]
    results: dict[int, RewardResult]
    tried: set[int]  # whose worker has died once


class _Worker:
    """A process and what it is doing; `job` None is idle, or still starting."""

    def __init__(self, tasks: Sequence[Task], memory: int, output: int) -> None:
        self.connection, theirs = Pipe()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # of a message's parts
                ours.setsockopt(socket.SOL_SOCKET, option, _BLOCKED)
        # The process gets a signal when nobody holds the other end any more.
        ending, self.lifeline = Pipe(duplex=False)
        self.current = os.fdopen(os.memfd_create("torchrft"), "rb", 0)  # which sample it is at
        fds = (theirs.fileno(), ending.fileno(), self.current.fileno())
        code = f"from torchrft.rewards.workers import serve; serve{fds}"
        paths = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
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
        for end in (self.connection, self.lifeline, self.current):
            end.close()
        return self.process.wait()


class WorkerPool:
    """Up to `count` processes, each with all `tasks`, started when there is work for them.

    `timeout` is in seconds per sample, `memory` in bytes beyond what a worker takes when loaded,
    `max_failures` the share of samples that may end without a verdict.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        count: int,
        timeout: float,
        memory: int,
        max_failures: float = 1.0,
    ) -> None:
        self.tasks, self.count, self.timeout, self.memory = tuple(tasks), count, timeout, memory
        self.max_failures, self.failures = max_failures, [0 for _ in self.tasks]
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()
        self.output: Any = None  # an Output, once there are workers

    def run(self, task: int, rows: Rows, together: bool, seconds: float) -> list[RewardResult]:
        """Results of `tasks[task]` for `rows`, one by one or all `together` within `seconds`.

        Where a worker had to be killed or died, the results have an `error`. Raises RuleFault for a
        bug in the rule, and RewardError if workers do not start or too many samples fail.
        """
        from torchrft.rewards.output import Output  # workers, which import this, do without
        from torchrft.tools import progress

        size = len(rows) if together else min(len(rows) // (4 * self.count), _MOST)
        starts = range(0, len(rows), max(size, 1))
        jobs = deque(_Job(range(len(rows))[first : first + max(size, 1)]) for first in starts)
        run = _Run(task, rows, together, seconds, jobs, {}, set())
        with self.lock:
            self.output = self.output or Output()
            while len(self.workers) < min(self.count, len(jobs)):
                self.workers.append(_Worker(self.tasks, self.memory, self.output.fd))
            try:
                while len(run.results) < len(rows):
                    progress.at(len(run.results), len(rows), "samples")
                    self._assign(run)
                    self._collect(run)
            except BaseException:  # nobody will fetch what the others find
                for worker in [worker for worker in self.workers if worker.job is not None]:
                    worker.kill()
                    self.workers.remove(worker)
                raise
            finally:
                self.output.end_call()
        return [run.results[place] for place in range(len(rows))]

    def close(self) -> None:
        """Ends all workers."""
        while self.workers:
            self.workers.pop().kill()
        if self.output is not None:
            self.output.close()
            self.output = None

    def _assign(self, run: _Run) -> None:
        for number, worker in enumerate(self.workers):
            if run.jobs and worker.is_idle:
                # From both ends, so that the samples of a prompt go to one worker, which remembers.
                worker.job = run.jobs.pop() if number % 2 else run.jobs.popleft()
                worker.deadline = time.monotonic() + run.seconds + _FLUSH
                rows = [run.rows[place] for place in worker.job.places]
                with suppress(OSError):  # it died in the meantime, which _collect will find
                    worker.connection.send((run.task, run.together, rows, self.timeout))

    def _collect(self, run: _Run) -> None:
        """Waits for the next answer or deadline, and takes all that there are."""
        busy = {worker.connection: worker for worker in self.workers if not worker.is_idle}
        nearest = min(worker.deadline for worker in busy.values())
        answered = wait(list(busy), max(nearest - time.monotonic(), 0.0))
        for connection, worker in busy.items():
            if connection in answered:
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    kind, value = "died", None
                except Exception as error:  # a function has written to the worker's socket
                    kind, value = "died", f"its answer cannot be read: {error!r:.200}"
                self._hear(worker, run, kind, value)
            elif worker.deadline <= time.monotonic():
                seconds = run.seconds if worker.job else _START_SECONDS
                self._replace(worker, run, f"it took more than {seconds:g} s")

    def _hear(self, worker: _Worker, run: _Run, kind: str, value: Any) -> None:
        job = worker.job
        if kind == "ready":
            worker.is_ready = True
        elif job is None or kind in ("full", "died"):
            self._replace(worker, run, value)
        elif kind == "fault":
            worker.job = None
            index, text, of_data = value
            raise RuleFault(job.places[index], text, of_data)
        else:
            first, job.done = job.done, job.done + len(value)
            run.results.update(zip(job.places[first : job.done], value, strict=True))
            worker.deadline = time.monotonic() + run.seconds + _FLUSH
            worker.job = job if job.done < len(job.places) else None

    def _replace(self, worker: _Worker, run: _Run, reason: str | None) -> None:
        """Another worker for one that hangs, has died or is full; its sample has no verdict.

        A sample whose worker died is judged again, once: it may have been killed from outside.
        """
        job, died = worker.job, reason is None
        at = int.from_bytes(os.pread(worker.current.fileno(), 4, 0), "little")
        code = worker.kill()
        if reason is None:
            reason = f"it died of signal {-code}" if code < 0 else f"it exited with {code}"
        number = self.workers.index(worker)
        if job is None:
            del self.workers[number]
            raise RewardError(f"a worker process for reward functions does not start: {reason}")
        lost = job.places if run.together else job.places[at : at + 1]
        if died and not run.tried.issuperset(lost):
            run.tried.update(lost)
            lost = []
        else:
            run.results.update(dict.fromkeys(lost, RewardResult(0.0, error=reason)))
            self._count_failures(run, len(lost), reason)
        if left := [place for place in job.places[job.done :] if place not in lost]:
            run.jobs.appendleft(_Job(left))
        self.workers[number] = _Worker(self.tasks, self.memory, self.output.fd)

    def _count_failures(self, run: _Run, more: int, reason: str) -> None:
        """Says a rule's first failure, and each doubling of those of all calls, at once; raises
        RewardError for too many in this one."""
        from torchrft.tools.logging import logger

        failed = sum(result.error is not None for result in run.results.values())
        judged = max(len(run.results), _EARLY)
        what = f"reward function {self.tasks[run.task].name!r}: no verdict on"
        if failed > self.max_failures * judged:
            raise RewardError(
                f"{what} {failed} of {len(run.results)} samples so far, the last because {reason}; "
                f"mend it, or raise max_reward_failures = {self.max_failures:g}"
            )
        before, self.failures[run.task] = self.failures[run.task], self.failures[run.task] + more
        if (count := self.failures[run.task]).bit_length() > before.bit_length():
            logger.warning(f"{what} {count} of all samples so far, the last because {reason}")


def serve(fd: int, lifeline: int, current: int) -> None:
    """A worker's life: makes its rules, then judges what comes until the trainer is gone."""
    # SIGIO ends this process and what it started, whatever they are doing.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    connection, own = Connection(fd), os.getpid()

    def send(*message: Any) -> None:
        if os.getpid() != own:  # a child that a function forked has come back from it
            os._exit(0)
        try:
            connection.send(message)
        except BrokenPipeError:  # the trainer has ended
            os._exit(0)

    try:
        tasks, memory = connection.recv()
        rules = [replace(make_rule(t.name, t.options), tolerant=t.tolerant) for t in tasks]
        for task in tasks:  # also imports what a rule needs, before its deadlines count
            if task.isolation is not None:
                task.isolation.choose()
            BUILT_IN.get(task.name, BuiltIn()).check(**task.options)
    except Exception as error:
        send("broken", told(error))
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    send("ready", None)
    while True:
        try:
            number, together, rows, timeout = connection.recv()
        except EOFError:
            return
        try:
            for results in _results(rules[number], together, rows, timeout, current):
                send("results", results)
        except RuleFault as fault:
            send("fault", (fault.index, fault.text, fault.of_data))
        except MemoryError:
            send("full", f"it took more than {memory / 2**30:g} GiB")
        except Exception as error:  # what a function returned cannot even be looked at: a bug
            place = 0 if together else int.from_bytes(os.pread(current, 4, 0), "little")
            send("fault", (place, told(error), False))


def _results(
    rule: Rule, together: bool, rows: Rows, timeout: float, current: int
) -> Iterator[list[RewardResult]]:
    """The results of `rows`, in their order, as they come; `current` always knows how far it is."""
    if together:
        yield rule(rows, timeout)
        return
    found: list[RewardResult] = []
    sent = time.monotonic()
    for index, row in enumerate(rows):
        os.pwrite(current, index.to_bytes(4, "little"), 0)
        try:
            found += rule([row], timeout)
        except RuleFault as fault:
            raise RuleFault(index, fault.text, fault.of_data) from fault
        if time.monotonic() - sent > _FLUSH:
            yield found
            found, sent = [], time.monotonic()
    if found:
        yield found
