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
from collections.abc import Coroutine, Generator, Mapping
from inspect import isawaitable
from pathlib import Path
from typing import Any

from torchrft.environments.protocol import Environment, Opening, Turn
from torchrft.environments.registry import make

LONGEST_ANSWER = 2**20  # bytes of JSON, for one opening or turn


class Worker:
    """Calls environments; `current` is a file that always holds the number of the running call."""

    def __init__(self, connection: socket.socket, current: int, settings: list[Any]) -> None:
        self.connection, self.current, self.process = connection, current, os.getpid()
        self.name, self.options, self.timeout, self.memory = settings
        self.spare: Environment | None = None  # made before any deadline counts
        self.environments: dict[int, Environment] = {}
        self.random: dict[int, Any] = {}  # of each environment: the state of Python's generator
        self.tasks: set[asyncio.Task[None]] = set()
        self.unread = b""

    def prepare(self) -> None:
        """Makes a first environment, and from then on limits the memory."""
        try:
            self.spare = make(self.name, self.options)
        except BaseException as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return self.answer(0, "error", f"{kind}{error}"[:2000])
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + self.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        self.answer(0, "done")

    def read(self) -> None:
        """Begins the calls that have come."""
        data = self.connection.recv(1 << 16)
        if not data:  # the trainer has ended
            os._exit(0)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            call, number, method, arguments = json.loads(line)
            if method == "reset":
                self.random[number] = random.Random(arguments[1]).getstate()
            steps = self._call(call, number, method, arguments)
            task = asyncio.get_event_loop().create_task(self._follow(call, number, steps))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def answer(self, call: int, kind: str, value: Any = None) -> None:
        """Sends a line; a process that an environment has forked ends here instead."""
        if os.getpid() != self.process:
            os._exit(0)
        text = json.dumps([call, kind, value], default=_plain, ensure_ascii=False)
        line = text.encode() + b"\n"  # half of a surrogate pair is a ValueError
        if len(line) > LONGEST_ANSWER:
            raise ValueError(f"its answer has {len(line)} bytes, the limit is {LONGEST_ANSWER}")
        self.connection.sendall(line)

    async def _call(self, call: int, number: int, method: str, arguments: list[Any]) -> None:
        """Calls a method of an environment, and answers what came of it."""
        self.answer(call, "began")
        limit = asyncio.timeout(self.timeout)
        try:
            if method == "reset":
                made, self.spare = self.spare or make(self.name, self.options), None
                self.environments[number] = made
            async with limit:
                value = getattr(self.environments[number], method)(*arguments)
                value = await value if isawaitable(value) else value
            if method == "close":
                del self.environments[number], self.random[number]
            self.answer(call, "done", _data(method, value))
        except MemoryError:
            self.answer(call, "full", f"it took more than {self.memory / 2**30:g} GiB of memory")
        except BaseException as error:  # sys.exit() and KeyboardInterrupt, too
            if limit.expired():
                return self.answer(call, "timeout", f"it took more than {self.timeout:g} s")
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:400]}"
            text += f" ({frame.filename}, line {frame.lineno})"
            self.answer(call, "error", text.encode(errors="replace").decode())

    async def _follow(self, call: int, number: int, steps: Coroutine[Any, Any, None]) -> None:
        await self._resume(call, number, steps)

    @types.coroutine
    def _resume(
        self, call: int, number: int, steps: Coroutine[Any, Any, None]
    ) -> Generator[Any, Any, None]:
        """Runs a coroutine. Whenever it goes on, that is on record, in case that it never ends,
        and random numbers are those of its episode alone."""
        resume: Any = steps.send
        argument: Any = None
        while True:
            os.pwrite(self.current, call.to_bytes(8, "little"), 0)
            random.setstate(self.random.get(number) or random.getstate())
            try:
                awaited = resume(argument)
            except StopIteration:
                return
            finally:
                if number in self.random:
                    self.random[number] = random.getstate()
                os.pwrite(self.current, bytes(8), 0)
            try:
                resume, argument = steps.send, (yield awaited)
            except BaseException as error:
                resume, argument = steps.throw, error


def _data(method: str, value: Any) -> dict[str, Any] | None:
    """What a method has returned, by its fields; TypeError for anything but an answer."""
    wanted = {"reset": Opening, "step": Turn}.get(method)
    if wanted is None:
        return None
    if not isinstance(value, wanted):
        raise TypeError(f"{method} must return {wanted.__name__}(...), got {value!r:.80}")
    return {key: getattr(value, key) for key in wanted.__annotations__}


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
    loop, ours = asyncio.new_event_loop(), socket.socket(fileno=connection)
    asyncio.set_event_loop(loop)
    worker = Worker(ours, current, json.loads(ours.makefile("rb", 0).readline()))
    worker.prepare()
    loop.add_reader(connection, worker.read)
    loop.run_forever()
