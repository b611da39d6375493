"""What a reward server takes in before it looks at a request, and how long it waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Iterator
from typing import Any, cast

import h11
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from torchrft.tools.payload import branches, gunzip
from torchrft.tools.text import one_line

HEADER_SECONDS = 10.0  # until a request's headers are there
BODY_SECONDS = 30.0  # until its body is there
ANSWER_SECONDS = 60.0  # that a client may leave an answer unread
BODIES = 4  # as large as one may be, held at the same time
BRANCHES = 1 << 19  # lists, objects and keys of a request, 8 for each of the most samples
VALUE = 12  # bytes of the limit for each value that there may be; a token's id and text take 15
GRACE_SECONDS = 10  # that requests have to end when the server ends
CONNECTIONS = 512
_DRAIN = 1 << 23  # bytes of a refused body that are thrown away; before, the client may not read


def error_answer(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An ErrorAnswer; lone surrogates, which a request may hold, have no UTF-8."""
    return JSONResponse({"error": one_line(text)}, status, headers)


class _Refused(Exception):
    """A request that goes no further, and the answer to it."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        self.status, self.text, self.headers = status, text, headers


class Gate:
    """Asks for the token, then takes in the body within bounds; unpacks gzip; counts.

    Args: token, None for an open server; limit, bytes of a body, as sent and decompressed. All
    requests together hold at most `BODIES` times as much, from their first byte to their answer.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, limit: int, count: Callable[[int], None]
    ) -> None:
        self.app, self.limit, self.count = app, limit, count
        self.expected = None if token is None else b"Bearer " + token.encode()
        self.free = BODIES * limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count(message["status"])
            await send(message)

        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        allowed = self.expected is None or hmac.compare_digest(given, self.expected)
        scope.setdefault("state", {})["authorized"] = allowed
        try:
            if not allowed and (scope["path"] != "/health" or _has_body(headers)):
                bearer = {"WWW-Authenticate": "Bearer"}
                raise _Refused(401, "this server needs its bearer token", **bearer)
            with self._room() as take:
                body = await self._body(headers, receive, take)
                scope["headers"] = [p for p in scope["headers"] if p[0] != b"content-encoding"]
                unread = [{"type": "http.request", "body": body, "more_body": False}]

                async def replay() -> Any:
                    return unread.pop() if unread else await receive()

                del body  # the request holds it alone
                await self.app(scope, replay, counted)
        except _Refused as refused:
            await _turn_away(refused, receive, counted, 8 * self.limit if allowed else _DRAIN)
        except asyncio.CancelledError:  # the server has waited for GRACE_SECONDS
            await _turn_away(_Refused(503, "the server ends"), receive, counted, 0)

    @contextlib.contextmanager
    def _room(self) -> Iterator[Callable[[int], None]]:
        """Hands out room for bytes, as far as there is any, and takes it back at the end."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if size > self.free:
                text = "the requests under way fill this server's memory"
                raise _Refused(503, text, **{"Retry-After": "1"})
            taken, self.free = taken + size, self.free - size

        try:
            yield take
        finally:
            self.free += taken

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, take: Callable[[int], None]
    ) -> bytes:
        """The body, unpacked. Raises _Refused."""
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b"gzip"):
            told = encoding.decode("latin-1")
            raise _Refused(415, f"Content-Encoding must be gzip, not {told}")
        large = _Refused(413, f"a request may have {self.limit} bytes; send fewer samples in one")
        if int(headers.get(b"content-length", b"0")) > self.limit:
            raise large
        parts, size, more = list[bytes](), 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size > self.limit:
                        raise large
                    take(len(part))
                    parts.append(part)
        except TimeoutError:
            raise _Refused(408, f"the body did not come within {BODY_SECONDS:g} seconds") from None
        body = b"".join(parts)
        try:
            body = gunzip(body, self.limit) if encoding == b"gzip" and body else body
            # Parsing holds up all others. What is parsed takes about 128 bytes for each.
            parsed = min(128 * branches(body, BRANCHES, self.limit // VALUE), self.limit)
        except ValueError as error:
            status = 413 if "more than" in str(error) else 400
            remedy = "; send fewer samples in one" if status == 413 else ""
            raise _Refused(status, f"the body is {error}{remedy}") from None
        take(max(0, len(body) - size) + parsed)
        return body


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


async def _turn_away(refused: _Refused, receive: Receive, send: Send, most: int) -> None:
    """Answers at once and closes; what the client still sends is thrown away for a while before,
    or it would not get to the answer."""
    answer = error_answer(refused.status, refused.text, {**refused.headers, "Connection": "close"})
    start = {"status": refused.status, "headers": answer.raw_headers}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEADER_SECONDS):
            while most > 0 and (message := await receive()).get("more_body"):
                most -= len(message["body"])
    await send({"type": "http.response.body", "body": b""})


class Connection(H11Protocol):
    """A connection that is dropped when a request's headers are late, or an answer stays unread."""

    headers_due: asyncio.TimerHandle | None = None
    reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self.headers_due = _cancelled(self.headers_due)
        elif self.headers_due is None:
            self.headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.reading_due = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.reading_due = _cancelled(self.reading_due)

    def connection_lost(self, exc: Exception | None) -> None:
        self.headers_due = _cancelled(self.headers_due)
        self.reading_due = _cancelled(self.reading_due)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None


LIMITS: dict[str, Any] = {
    "http": Connection,
    "ws": "none",
    "limit_concurrency": CONNECTIONS,
    "timeout_graceful_shutdown": GRACE_SECONDS,
}
"""Options of uvicorn."""
