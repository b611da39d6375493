"""JSON over HTTP to one server or to several that are alike, with deadlines, retries and failover.

All requests of a process run in one event loop, which has a thread of its own. `run` and `run_all`
call it from any other thread. What interrupts the caller cancels its requests.
"""

import asyncio
import gzip
import json
import math
import os
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from itertools import count
from typing import Any, TypeVar

import httpx

from torchrft.tools import progress
from torchrft.tools.credentials import check_url
from torchrft.tools.logging import logger
from torchrft.tools.payload import parse

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_WAIT = 0.5  # seconds before a server that failed is asked again; doubled for each failure
_SMALL = 1024  # bytes; less is not worth compressing
_LARGEST = 1 << 30  # bytes of an answer


class ServerError(Exception):
    """The server at `url` answered with an error: `status`, its words, and the seconds it asks for.

    `is_transient`: the same request may succeed later.
    """

    def __init__(self, url: str, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.url, self.status, self.message, self.retry_after = url, status, message, retry_after
        self.is_transient = status >= 500 or status == 429


class Deadline:
    """The moment `seconds` from now, and the option that sets it.

    >>> str(Deadline(5, "request_timeout")), str(Deadline(10))
    ('request_timeout = 5 seconds', '10 seconds')
    """

    def __init__(self, seconds: float, option: str = "") -> None:
        self.text = f"{option} = {seconds:g} seconds" if option else f"{seconds:g} seconds"
        self.at = time.monotonic() + seconds

    def __str__(self) -> str:
        return self.text

    def or_earlier(self, other: "Deadline") -> "Deadline":
        return min(self, other, key=lambda deadline: deadline.at)


class Server:
    """One server and its state, which belongs to the event loop while requests are made.

    Args: url, as http://host:port, with or without a path; option, which names it, for errors;
        token, a bearer token.
    Raises ValueError for another kind of url.
    """

    def __init__(self, url: str, option: str, token: str | None = None) -> None:
        check_url(url, option)
        self.url = url
        self.headers: dict[str, Any] = {"Accept-Encoding": "gzip"}
        self.headers["Content-Type"] = "application/json"
        if token:
            self.headers["Authorization"] = b"Bearer " + token.encode()
        self.info: dict[str, Any] = {}  # what the server said about itself
        self.takes_gzip = False  # whether it said that it takes compressed requests (RFC 7694)
        self.outstanding = 0  # requests
        self.failures = 0  # in a row
        self.fault: str | None = None  # of the last failure, if no success came after it
        self.rests_until = 0.0  # time.monotonic()

    def under(self, path: str) -> str:
        """The URL of `path` below the server's own."""
        return self.url.partition("?")[0].rstrip("/") + path

    async def exchange(
        self, url: str, body: Any, deadline: Deadline, limit: int = _LARGEST
    ) -> bytes:
        """What `url` answers to POST of `body` as JSON, or to GET for None.

        Raises ConnectionError when no whole answer came, TimeoutError when it did not come in time,
        ServerError for one that is no success, and ValueError for one beyond `limit` bytes.
        """
        method, data, headers = "GET", None, dict(self.headers)
        if body is not None:
            method, data = "POST", json.dumps(body).encode()
            if len(data) > _SMALL and self.takes_gzip:
                data, headers["Content-Encoding"] = gzip.compress(data, 1), "gzip"
        content = bytearray()
        try:
            async with (
                asyncio.timeout_at(deadline.at),
                _client().stream(method, url, content=data, headers=headers) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > limit:
                        raise ValueError(f"an answer of more than {limit} bytes")
        except TimeoutError:
            raise TimeoutError(f"no answer within {deadline}") from None
        except httpx.DecodingError as error:
            raise ValueError(f"no valid gzip: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ConnectionError(_root_cause(error)) from error
        if data is not None and _is_cut_short(response, content):
            raise ConnectionError(f"an answer without a length ended early: {content[:80]!r}")
        self.takes_gzip |= "gzip" in response.headers.get("Accept-Encoding", "")
        if response.status_code >= 300:
            wait = _seconds(response.headers.get("Retry-After", ""))
            raise ServerError(self.url, response.status_code, _error_message(content), wait)
        return bytes(content)

    async def ask(self, path: str, body: Any, deadline: Deadline, retries: int = 0) -> Any:
        """The JSON that `path` below the server's URL answers, None for an empty answer.

        A failed connection and a transient error are tried again, `retries` times.
        Raises ConnectionError when no answer came, and ServerError for one of 300 or more.
        """
        for attempt in count():
            try:
                content = await self.exchange(self.under(path), body, deadline)
                return parse(content) if content else None
            except TimeoutError:
                raise ConnectionError(f"no answer to {path} within {deadline}") from None
            except (ConnectionError, ServerError) as error:
                if attempt == retries or not getattr(error, "is_transient", True):
                    raise
            except ValueError as error:
                if attempt == retries:
                    raise ConnectionError(f"{type(error).__name__}: {error}") from error
            await asyncio.sleep(min(FIRST_WAIT * 2**attempt, deadline.at - time.monotonic()))


ServerCall = Callable[[Server], Awaitable[Result]]


@dataclass
class ServerGroup:
    """Servers that are alike: each request goes to the least busy one, in turn if equally busy.

    A server that fails rests for a while, which doubles with each failure in a row up to
    `longest_rest` seconds; the others take its work over.

    Args: name, for errors, and error, their class; until, the event at which the owner calls
        `readmit`, for servers that rest until then; turn, the place of the server to ask first.
    """

    servers: Sequence[Server]
    name: str
    error: type[Exception]
    longest_rest: float = math.inf
    until: str = ""
    turn: int = 0

    async def answer(
        self,
        subject: str,
        ask: ServerCall[Result],
        deadline: Deadline,
        tries: int = sys.maxsize,
        preferred: Server | None = None,
    ) -> Result:
        """The first answer that `ask` gets from a server about `subject`, if it can the `preferred`
        one.

        `ask` raises OSError or a transient ServerError for a failure that may pass. Any other
        ServerError is a refusal, which ends all tries as the end of the deadline does.
        """
        for _ in range(tries):
            server = await self._next_server(subject, deadline, preferred)
            failures = server.failures
            server.outstanding += 1
            try:
                answer = await ask(server)
            except (OSError, ServerError) as error:
                if isinstance(error, ServerError) and not error.is_transient:
                    refusal = f"{self.name}, {server.url} refuses {subject}: {error}"
                    raise self.error(refusal) from error
                if server.failures == failures:  # else another request has counted this failure
                    self.rest(server, error)
            else:
                server.failures = 0
                if server.rests_until <= time.monotonic():
                    self.readmit(server)
                return answer
            finally:
                server.outstanding -= 1
        raise self.given_up(f"{subject} found no answer in {tries} tries")

    async def _next_server(
        self, subject: str, deadline: Deadline, preferred: Server | None
    ) -> Server:
        while True:
            now, soonest = time.monotonic(), min(s.rests_until for s in self.servers)
            if max(now, soonest) >= deadline.at:  # a wait that is too long is not begun
                limit = f"before {self.until}" if soonest == math.inf else f"within {deadline}"
                raise self.given_up(f"{subject} found no answer {limit}")
            if usable := [server for server in self.servers if server.rests_until <= now]:
                if preferred in usable:
                    return preferred
                first = self.turn % len(usable)
                self.turn += 1
                return min(usable[first:] + usable[:first], key=lambda s: s.outstanding)
            await asyncio.sleep(soonest - now)

    def given_up(self, fault: str) -> Exception:
        """The error that ends the run."""
        return self.error(f"{self.name}: {fault} ({self.faults()}); is the server running?")

    def try_each(self, call: ServerCall[object], servers: Sequence[Server]) -> None:
        """Calls for all `servers` at the same time. A server for which it fails rests."""

        async def attempt(server: Server) -> None:
            try:
                await call(server)
            except (OSError, ServerError) as error:
                self.rest(server, error)

        run_all(attempt, servers)

    def rest(self, server: Server, fault: Exception | str) -> None:
        """Leaves a server alone for a while, if it is not left out already."""
        if server.rests_until == math.inf:
            return
        wait = min(FIRST_WAIT * 2 ** min(server.failures, 30), self.longest_rest)
        if isinstance(fault, ServerError):
            wait = max(wait, fault.retry_after)
        server.failures += 1
        server.rests_until = math.inf if self.until else time.monotonic() + wait
        server.fault = str(fault)
        when = f"left out until {self.until}" if self.until else f"asked again in {wait:g} s"
        logger.warning(f"{server.url} is {when}: {fault}")

    def readmit(self, server: Server) -> None:
        """Ends the rest of a server that answers."""
        if server.fault is not None:
            logger.info(f"{server.url} answers again")
        server.failures, server.fault, server.rests_until = 0, None, 0.0

    def faults(self) -> str:
        """The servers that fail, with their last faults."""
        return "; ".join(f"{s.url}: {s.fault}" for s in self.servers if s.fault is not None)


def start(requests: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Starts a coroutine that makes requests."""
    return asyncio.run_coroutine_threadsafe(requests, _event_loop())


def run(requests: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that makes requests. What interrupts this thread cancels it."""
    future = start(requests)
    try:
        # Not one endless wait: a signal that comes just before it begins would not be heard in it.
        while not future.done():
            wait_for([future], 1.0)
        return future.result()
    except BaseException:
        future.cancel()
        raise


def run_all(
    call: Callable[[Item], Awaitable[Result]],
    items: Sequence[Item],
    limit: int = sys.maxsize,
    things: str = "servers",
) -> list[Result]:
    """The results of `call(item)`, in the order of the items; at most `limit` run at a time.

    The first failure cancels the others. `things` names the items where progress is logged.
    """

    async def call_all() -> list[Result]:
        turns, done = asyncio.Semaphore(limit), count(1)

        async def call_in_turn(item: Item) -> Result:
            async with turns:
                result = await call(item)
            progress.at(next(done), len(items), things)
            return result

        tasks = [asyncio.create_task(call_in_turn(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    return run(call_all())


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
    return loop


@cache
def _client() -> httpx.AsyncClient:
    """The client of the event loop. Deadlines are those of `exchange`; proxies are not used.

    Each request has a connection of its own. A server stops working on a request whose connection
    is closed, and no request fails because a kept connection was closed by a restart.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    trusted = ssl.create_default_context()
    return httpx.AsyncClient(verify=trusted, trust_env=False, timeout=None, limits=limits)


def _root_cause(error: BaseException) -> str:
    """The type and text of the error that httpx has wrapped.

    >>> _root_cause(httpx.ReadError("cut"))
    'ReadError: cut'
    """
    while cause := error.__cause__ or error.__context__:
        error = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause
    if isinstance(error, OSError) and error.errno and "Connect call failed" in str(error):
        error = OSError(error.errno, os.strerror(error.errno))  # asyncio replaces the system's text
    return f"{type(error).__name__}: {error}"


def _is_cut_short(response: httpx.Response, content: bytearray) -> bool:
    """Whether an answer that ends where its connection does begins like JSON and is not whole."""
    headers = response.headers
    if "Content-Length" in headers or "Transfer-Encoding" in headers or not response.is_success:
        return False
    try:
        parse(content)
    except ValueError:
        return content.lstrip()[:1] in (b"", b"{", b"[")  # else it never was JSON
    return False


def _seconds(retry_after: str) -> float:
    """The header's seconds or date, as seconds from now; 0 for what is neither."""
    if retry_after.isdecimal():
        return float(retry_after[:6])
    try:
        date = parsedate_to_datetime(retry_after).astimezone(UTC)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _error_message(content: bytearray) -> str:
    """The server's own words in an error's body."""
    try:
        answer = parse(content)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("detail", answer))
        message = error.get("message", error) if isinstance(error, dict) else error
    else:
        message = content[:200].decode(errors="replace")
    return str(message)[:2000]
