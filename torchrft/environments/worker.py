"""The life of a process that hosts episodes: no torch, so that it starts in a fraction of a second.

It shares nothing with the trainer but a socket that carries lines of JSON, and ends with it.
"""

import asyncio
import fcntl
import json
import os
import random
import resource
import socket
import traceback
import types
from collections.abc import Awaitable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any

from torchrft.environments.protocol import Environment, Opening, Turn
from torchrft.environments.registry import make

LONGEST_ANSWER = 2**20  # bytes of JSON, for one opening or turn


@dataclass(slots=True)
class _Episode:
    """An episode in this process: `random` is the state of Python's generator for it."""

    environment: Environment
    random: Any
    task: "asyncio.Task[None] | None" = None


class Worker:
    """Calls environments; `current` is a file that always holds the number of the running call."""

    def __init__(self, connection: socket.socket, current: int) -> None:
        self.connection, self.current, self.process = connection, current, os.getpid()
        self.unread = b""
        self.settings: list[Any] = []  # name and options, seconds per call, bytes of memory
        self.spare: Environment | None = None  # made before any deadline counts
        self.episodes: dict[int, _Episode] = {}

    def read(self) -> None:
        """Does what lines ask for; the first has the settings."""
        data = self.connection.recv(1 << 16)
        if not data:  # the trainer has ended
            os._exit(0)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            if self.settings:
                self.begin(*json.loads(line))
            else:
                self.prepare(json.loads(line))

    def prepare(self, settings: list[Any]) -> None:
        """Makes a first environment, and from then on limits the memory."""
        self.settings = settings
        try:
            self.spare = make(*settings[:2])
        except BaseException as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return self.answer(0, "broken", f"{kind}{error}"[:2000])
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + settings[3]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        self.answer(0, "ready")

    def answer(self, call: int, kind: str, value: Any = None) -> None:
        """Sends a line; a process that an environment has forked ends here instead."""
        if os.getpid() != self.process:
            os._exit(0)
        text = json.dumps([call, kind, value], default=_plain, ensure_ascii=False)
        line = text.encode() + b"\n"  # half of a surrogate pair is a ValueError
        if len(line) > LONGEST_ANSWER:
            raise ValueError(f"its answer has {len(line)} bytes, the limit is {LONGEST_ANSWER}")
        self.connection.sendall(line)

    def begin(self, call: int, number: int, method: str, arguments: list[Any]) -> None:
        """Calls a method; what it awaits goes on as a task, beside the calls of other episodes."""
        self.answer(call, "began")
        try:
            if method == "reset":
                state = random.Random(arguments[1]).getstate()
                made, self.spare = self.spare or make(*self.settings[:2]), None
                self.episodes[number] = _Episode(made, state)
            episode = self.episodes[number]
            if episode.task:  # of a call that nobody waits for any more
                episode.task.cancel()
            with self._at(call, episode):
                value = getattr(episode.environment, method)(*arguments)
            if isawaitable(value):
                task = self._await(call, number, method, value)
                episode.task = asyncio.get_running_loop().create_task(task)
            else:
                self._finish(call, number, method, value)
        except BaseException as error:  # sys.exit() and KeyboardInterrupt, too
            self._fail(call, error)

    async def _await(self, call: int, number: int, method: str, value: Awaitable[Any]) -> None:
        limit = asyncio.timeout(self.settings[2])
        try:
            async with limit:
                value = await self._resume(value, call, self.episodes[number])
            self._finish(call, number, method, value)
        except BaseException as error:
            self._fail(call, error, limit.expired())

    def _finish(self, call: int, number: int, method: str, value: Any) -> None:
        """Answers with what a method has returned, as plain data."""
        wanted = {"reset": Opening, "step": Turn}.get(method)
        if wanted is None:  # close
            del self.episodes[number]
            return self.answer(call, "done")
        if not isinstance(value, wanted):
            raise TypeError(f"{method} must return {wanted.__name__}(...), got {value!r:.80}")
        self.answer(call, "done", {key: getattr(value, key) for key in wanted.__annotations__})

    def _fail(self, call: int, error: BaseException, late: bool = False) -> None:
        """Answers that an episode ends here, and why."""
        if isinstance(error, MemoryError):
            return self.answer(call, "full")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:400]} ({frame.filename}, line {frame.lineno})"
        self.answer(call, "late" if late else "failed", text.encode(errors="replace").decode())

    @contextmanager
    def _at(self, call: int, episode: _Episode) -> Iterator[None]:
        """The episode runs inside: on record if it hangs, and with random numbers of its own."""
        os.pwrite(self.current, call.to_bytes(8, "little"), 0)
        random.setstate(episode.random)
        try:
            yield
        finally:
            episode.random = random.getstate()
            os.pwrite(self.current, bytes(8), 0)

    @types.coroutine
    def _resume(self, value: Any, call: int, episode: _Episode) -> Generator[Any, Any, Any]:
        """Awaits a value; each time that it goes on, it does so within `_at`."""
        steps = value.__await__()
        resume, argument = steps.send, None
        while True:
            try:
                with self._at(call, episode):
                    awaited = resume(argument)
            except StopIteration as end:
                return end.value
            try:
                resume, argument = steps.send, (yield awaited)
            except BaseException as error:
                resume, argument = steps.throw, error


def _plain(value: Any) -> Any:
    """What json does not know as it knows: mappings, and the numbers of numpy."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"an answer holds text, numbers, lists and dictionaries, got {value!r:.80}")


def serve(connection: int, lifeline: int, current: int) -> None:
    """Hosts episodes until the trainer is gone."""
    # SIGIO ends this process and what it started, whatever they are doing.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.add_reader(connection, Worker(socket.socket(fileno=connection), current).read)
    loop.run_forever()
