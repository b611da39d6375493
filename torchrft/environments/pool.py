"""Episodes in worker processes: what hangs, dies, leaks or answers nonsense costs its own episode.

An episode whose process was lost by another one is made again in a new process, by its row, its
seed and its replies.
"""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count as numbers
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from torchrft.environments.protocol import EnvironmentFault, Message, Opening, Status, Turn
from torchrft.environments.registry import importable
from torchrft.environments.worker import LONGEST_ANSWER
from torchrft.tools import payload
from torchrft.tools.text import one_line

T = TypeVar("T")
GRACE = 1.0  # seconds beyond a deadline in which an async environment ends by itself
_START_SECONDS = 120.0
_LONGEST_OUTPUT = 20_000  # bytes of what a process prints that are shown
_DEATHS = 2  # of its process at an episode, which end it


class _Lost(Exception):
    """The process of a call is gone: by the fault of another episode, or for the first time."""


class _Message(BaseModel, extra="allow"):
    role: str
    content: str


class _Answer(BaseModel, allow_inf_nan=False):
    """What an environment answers, as JSON."""

    messages: list[_Message]
    tools: list[dict[str, Any]] = []
    reward: float = 0.0
    done: bool = False
    metrics: dict[str, float] = {}


@dataclass(slots=True)
class _Call:
    owner: "Seat | _Process"
    answer: "asyncio.Future[Any]"
    deadline: float = math.inf


class _Process:
    """A process and the calls under way in it; its start is call 0."""

    def __init__(self, pool: "EnvironmentPool") -> None:
        self.pool, self.is_lost, self.room = pool, False, _LONGEST_OUTPUT
        self.connection, theirs = socket.socketpair()
        self.current = os.memfd_create("torchrft")  # which call it is at
        ending, self.lifeline = os.pipe()
        self.output, printing = os.pipe()
        fds = (theirs.fileno(), ending, self.current)
        paths = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from torchrft.environments.worker import serve; serve{fds}"],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=printing,
            stderr=printing,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        os.close(ending)
        os.close(printing)
        pool.loop.add_reader(self.output, self._show)
        self.ready: asyncio.Future[None] = pool.loop.create_future()
        self.calls = {0: _Call(self, self.ready)}
        self._limit(self.calls[0], _START_SECONDS)
        self.listening = pool.loop.create_task(self._listen())

    async def ask(self, seat: "Seat", method: str, arguments: tuple[Any, ...]) -> Any:
        """The answer of an environment's method; EnvironmentFault if it has none."""
        await asyncio.shield(self.ready)
        if self.is_lost:
            raise _Lost
        number, call = next(self.pool.numbers), _Call(seat, self.pool.loop.create_future())
        try:
            line = json.dumps([number, seat.number, method, arguments], default=dict).encode()
        except (TypeError, ValueError) as error:
            raise seat.fault(f"what it is given is no plain data: {error}") from None
        self.calls[number] = call
        self.writer.write(line + b"\n")
        return await call.answer

    def fault(self, reason: str, status: Status) -> Exception:
        """What it means for those who wait for the process that it does not start."""
        return ValueError(f"environment {self.pool.name!r} cannot be made: {one_line(reason)}")

    charge = fault

    def lose(self, reason: str, culprit: int = -1, status: Status = "error") -> None:
        """Ends the process; its calls are made again in another one, but for the culprit's.

        Without one it is the call that the process was at, else all of them.
        """
        if not self.is_lost:
            culprit = self._running() if culprit < 0 else culprit
            self.end()
            for number, call in self.calls.items():
                is_charged = number == culprit or culprit not in self.calls
                fault = call.owner.charge(reason, status) if is_charged else _Lost()
                if not call.answer.done():
                    call.answer.set_exception(fault)

    def end(self) -> None:
        """Ends the process with all that it started."""
        self.is_lost = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has forked, even if it is gone
        self.process.wait()
        os.set_blocking(self.output, False)
        with suppress(BlockingIOError):
            self._show()  # its last words
        self.pool.loop.remove_reader(self.output)
        self.listening.cancel()
        for fd in (self.lifeline, self.current, self.output):
            os.close(fd)

    async def _listen(self) -> None:
        pool, connection = self.pool, self.connection
        reader, self.writer = await asyncio.open_connection(sock=connection, limit=LONGEST_ANSWER)
        settings = [importable(pool.name), dict(pool.options), pool.timeout, pool.memory]
        self.writer.write(json.dumps(settings).encode() + b"\n")
        reason = "its process ended by itself"
        try:
            while line := await reader.readline():
                self._hear(*payload.parse(line))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"it has written to its process's socket: {error!r:.200}"
        except ConnectionError:
            pass
        finally:
            self.writer.close()
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1.0)
            reason = f"its process died of signal {-code}" if code < 0 else reason
        self.lose(reason)

    def _hear(self, number: int, kind: str, value: Any) -> None:
        call = self.calls[number]
        if kind == "began":
            self._limit(call, self.pool.timeout + GRACE)
        elif kind == "full" or (kind == "error" and number == 0):
            self.lose(str(value), number)
        else:
            del self.calls[number]
            if call.answer.done():  # cancelled
                return
            if kind == "done":
                call.answer.set_result(value)
            else:
                status: Status = "timeout" if kind == "timeout" else "error"
                call.answer.set_exception(call.owner.fault(str(value), status))

    def _running(self) -> int:
        return int.from_bytes(os.pread(self.current, 8, 0), "little")

    def _limit(self, call: _Call, seconds: float) -> None:
        call.deadline = self.pool.loop.time() + seconds
        self.pool.loop.call_at(call.deadline, self._look)

    def _look(self) -> None:
        """Ends a process that is at a call beyond its deadline."""
        if self.is_lost:
            return
        now, running = self.pool.loop.time(), self._running()
        late = [number for number, call in self.calls.items() if call.deadline <= now]
        if running in self.calls:  # others wait for it
            late = [number for number in late if number == running]
        if late:
            seconds = self.pool.timeout if late[0] else _START_SECONDS
            self.lose(f"it took more than {seconds:g} s", late[0], "timeout")

    def _show(self) -> None:
        data = os.read(self.output, 1 << 16)
        if not data:
            self.pool.loop.remove_reader(self.output)
        sys.stderr.write(data[: self.room].decode(errors="replace"))
        if 0 < self.room < len(data):
            sys.stderr.write(f"\nenvironment {self.pool.name!r}: more output is left out\n")
        self.room = max(self.room - len(data), 0)


@dataclass(eq=False)
class Seat:
    """An episode that a pool hosts. Close it in the end, also after a fault."""

    pool: "EnvironmentPool"
    row: Mapping[str, Any]
    row_number: int | None
    place: int
    number: int
    process: _Process | None = None
    deaths: int = 0
    is_open: bool = True
    history: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    async def step(self, reply: Message) -> Turn:
        """The answer to a reply. Raises EnvironmentFault, which ends the episode."""
        return await self.pool.run(self._step(reply))

    async def close(self) -> None:
        """Gives back what the episode holds; never raises for the environment."""
        await self.pool.run(self.leave())

    def fault(self, reason: str, status: Status = "error") -> EnvironmentFault:
        """What ends this episode, in a sentence."""
        row = f"{dict(self.row)!r:.80}" if self.row_number is None else self.row_number
        text = f"environment {self.pool.name!r}, row {row}: {reason}"
        return EnvironmentFault(one_line(text), status)

    def charge(self, reason: str, status: Status) -> Exception:
        """What the loss of the process means for this episode, which it was at."""
        self.deaths += 1
        ends = status == "timeout" or self.deaths == _DEATHS
        return self.fault(reason, status) if ends else _Lost()

    async def enter(self, seed: int) -> tuple["Seat", Opening]:
        """Has the environment made and reset, in the pool's thread."""
        self.pool.episodes[self.place] += 1
        try:
            answer = await self._call("reset", dict(self.row), seed)
            return self, Opening(tuple(answer["messages"]), tuple(answer["tools"]))
        except BaseException:
            await self.leave()
            raise

    async def _step(self, reply: Message) -> Turn:
        answer = await self._call("step", reply)
        if any(message["role"] == "assistant" for message in answer["messages"]):
            raise self.fault("a turn must not hold a message of the role assistant")
        messages = tuple(answer["messages"])
        return Turn(messages, answer["reward"], answer["done"], answer["metrics"])

    async def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """The answer of this episode's environment, which is made again where it was lost."""
        while True:
            try:
                process = self.pool.process(self.place)
                if self.process is not process:
                    self.process = process
                    await self._make_again(process)
                answer = self._checked(await process.ask(self, method, arguments))
            except _Lost:
                continue
            self.history.append((method, arguments, answer))
            return answer

    async def _make_again(self, process: _Process) -> None:
        for method, arguments, answer in self.history:
            again = self._checked(await process.ask(self, method, arguments))
            if again | {"metrics": None} != answer | {"metrics": None}:
                raise self.fault(
                    "made again after another episode ended its process, it answers in another "
                    "way; equal rows, seeds and replies must give equal answers"
                )

    def _checked(self, answer: Any) -> dict[str, Any]:
        if payload.is_deeper(answer):
            raise self.fault(f"its answer is nested more than {payload.DEEPEST} deep")
        try:
            return _Answer.model_validate(answer).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            why = f"{where}: {first['msg'].lower()}, got {first['input']!r:.80}"
            raise self.fault(f"its answer is no opening or turn: {why}") from None

    async def leave(self) -> None:
        """Closes the environment, in the pool's thread."""
        if self.is_open:
            self.is_open = False
            self.pool.episodes[self.place] -= 1
            if self.process is not None and not self.process.is_lost:
                with suppress(_Lost, EnvironmentFault, ValueError):
                    await self.process.ask(self, "close", ())


class EnvironmentPool:
    """Episodes of the environment `name` in up to `count` processes; usable from any event loop.

    `timeout` is in seconds per call, without the time in which a call waits for those of other
    episodes; `memory` in bytes beyond what a process takes when loaded. Episodes of one process
    take turns; async methods wait side by side. An answer has up to 1 MiB of JSON.

    >>> pool = EnvironmentPool("my_env.py:Calculator", {}, count=2, timeout=60)  # doctest: +SKIP
    >>> seat, opening = await pool.open(row, seed)  # doctest: +SKIP
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], count: int, timeout: float, memory: int = 2**32
    ) -> None:
        self.name, self.options, self.timeout, self.memory = name, options, timeout, memory
        self.episodes = [0] * count  # of each process
        self.processes: list[_Process | None] = [None] * count
        self.numbers = numbers(1)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def check(self) -> None:
        """Starts a process. Raises ValueError if the environment cannot be made."""
        await self.run(self._start())

    async def _start(self) -> None:
        await asyncio.shield(self.process(0).ready)

    async def open(
        self, row: Mapping[str, Any], seed: int, row_number: int | None = None
    ) -> tuple[Seat, Opening]:
        """Starts an episode. Raises EnvironmentFault, and ValueError as `check` does."""
        return await self.run(self._open(row, seed, row_number))

    async def _open(
        self, row: Mapping[str, Any], seed: int, row_number: int | None
    ) -> tuple[Seat, Opening]:
        place = self.episodes.index(min(self.episodes))
        return await Seat(self, row, row_number, place, next(self.numbers)).enter(seed)

    def process(self, place: int) -> _Process:
        """The process at a place, a new one if it was lost; in the pool's thread."""
        process = self.processes[place]
        if process is None or process.is_lost:
            process = self.processes[place] = _Process(self)
        return process

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the pool's thread."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def close(self) -> None:
        """Ends all processes, and what waits for them by CancelledError."""

        async def end() -> None:
            for process in self.processes:
                if process is not None and not process.is_lost:
                    process.end()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(end(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()
