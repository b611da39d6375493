"""JSON over HTTP to one server, one exchange at a time, each within its deadline."""

import contextlib
import gzip
import http.client
import json
import os
import socket
import threading
import time
import zlib
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from torchrft.tools.text import redact, remember_secret

FAILURES = (OSError, http.client.HTTPException)
"""What `JsonServer.exchange` raises when no whole answer came; TimeoutError is one of them."""

_SMALL = 1024  # bytes; less is not worth compressing
_LARGEST = 1 << 30  # bytes of an answer


class ServerError(Exception):
    """The server answered with an error: `status`, its own words, and the seconds it asks for."""

    def __init__(self, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message, self.retry_after = status, message, retry_after
        self.passes = status >= 500 or status == 429  # it may be otherwise the next time


class JsonServer:
    """One server.

    Args: url, as http://host:port, with or without a path; option, which names it, for errors;
        token, a bearer token. `path` is the url's own, with its query.
    Raises ValueError for another kind of url.
    """

    def __init__(self, url: str, option: str, token: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # raises for one that is no number
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(redact(f'{option} holds "{url}"; write each as http://host:port'))
        if (shown := redact(f'"{url}"')) != f'"{url}"':
            raise ValueError(
                f"{option} holds {shown}: a URL is shown in logs and trackers, so it may hold no "
                "password or key; put a bearer token into an environment variable "
                "(remote_rm_token_env, token_env of a judge, VLLM_API_KEY)"
            )
        self.url = url
        self._address = parts.netloc.rpartition("@")[2]
        self._folder = parts.path
        self.path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._headers: dict[str, Any] = {
            "Content-Type": "application/json",
            "Accept-Encoding": "gzip",
        }
        if token:
            self._headers["Authorization"] = b"Bearer " + token.encode()
        self._open: set[socket.socket] = set()
        self.is_cut = False
        self._unzips = False  # whether it has said that it takes compressed requests (RFC 7694)

    def under(self, path: str) -> str:
        """`path` below that of the url."""
        return self._folder.rstrip("/") + path

    def beside(self, name: str) -> str:
        """`name` in place of the last part of the url's path: /a/score becomes /a/name."""
        return urljoin(self._folder or "/", name)

    def cut(self) -> None:
        """Ends the exchanges under way in other threads, and any that begin while `is_cut`; they
        raise one of FAILURES."""
        self.is_cut = True
        for connected in list(self._open):
            _cut(connected)

    def exchange(self, path: str, body: Any, timeout: float, limit: int = _LARGEST) -> bytes:
        """What `path` answers to POST of `body` as JSON, or to GET for None, within `timeout` s.

        Raises one of FAILURES when no answer came, ServerError for one that is no success, and
        ValueError for one beyond `limit` bytes.
        """
        if timeout <= 0:
            raise TimeoutError("no time is left")
        deadline = time.monotonic() + timeout
        data = None if body is None else json.dumps(body).encode()
        headers = dict(self._headers)
        if data is not None and len(data) > _SMALL and self._unzips:
            data, headers["Content-Encoding"] = gzip.compress(data, 1), "gzip"
        connection = self._connection(self._address, timeout=timeout)
        watch: threading.Timer | None = None
        connected: socket.socket | None = None
        try:
            connection.connect()
            # A socket's timeout is that of one read: what trickles in would pass it.
            left, connected = max(0.0, deadline - time.monotonic()), connection.sock
            watch = threading.Timer(left, _cut, (connected,))
            watch.daemon = True
            watch.start()
            self._open.add(connected)
            if self.is_cut:  # while it connected
                raise ConnectionAbortedError("the exchange was ended")
            connection.request("GET" if data is None else "POST", path, data, headers)
            response = connection.getresponse()
            content = response.read(limit + 1)
            if len(content) <= limit and response.length:
                raise http.client.IncompleteRead(content, response.length)
            if data is not None and _breaks_off(response, content):
                raise ConnectionError(f"an answer without a length ended early: {content[:80]!r}")
            if time.monotonic() >= deadline:  # cut off, which may look like a short answer
                raise TimeoutError
        except FAILURES as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no answer within {timeout:g} seconds") from error
            raise
        finally:
            if watch is not None and connected is not None:
                watch.cancel()
                self._open.discard(connected)
            connection.close()  # a server that still works on it stops
        if "gzip" in response.headers.get("Accept-Encoding", ""):
            self._unzips = True
        if response.headers.get("Content-Encoding") == "gzip":
            content = gunzip(content, limit)
        if len(content) > limit:
            raise ValueError(f"an answer of more than {limit} bytes")
        if response.status >= 300:
            wait = _seconds(response.headers.get("Retry-After", ""))
            raise ServerError(response.status, _words(content), wait)
        return content


def bearer_token(variable: str | None, option: str) -> str | None:
    """The token in an environment variable. It shows in no message from then on.

    Raises ValueError, naming `option`, if none is set or it cannot be sent as a header.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f'{option} = "{variable}": the variable is not set')
    remember_secret(token)
    if token.split() != [token] or not token.isprintable():
        fault = "its token has a line break, a blank or a control character in it; correct it"
        raise ValueError(f'{option} = "{variable}": {fault}')
    return token


def gunzip(data: bytes, limit: int) -> bytes:
    """The bytes that `data` is the gzip of. Raises ValueError if it is none, or beyond `limit`."""
    try:
        unzip = zlib.decompressobj(wbits=31)
        content = unzip.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"no valid gzip: {error}") from None
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes when decompressed")
    if not unzip.eof or unzip.unused_data:
        raise ValueError("no valid gzip: it ends early or late")
    return content


DEEPEST = 64
"""Lists and objects within each other, of labels and other columns of a row."""


def is_deeper(value: Any, limit: int = DEEPEST) -> bool:
    """Whether lists and objects lie more than `limit` deep within each other: what copies, sends or
    prints them may end in a RecursionError."""
    level = [value]
    for _ in range(limit + 1):
        level = [one for one in level if isinstance(one, list | dict)]
        level = [v for one in level for v in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def parse(content: bytes) -> Any:
    """The value of JSON text. Raises ValueError for anything else, however deeply nested."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _breaks_off(response: http.client.HTTPResponse, content: bytes) -> bool:
    """Whether an answer without a length, which ends where the server closes, is no whole JSON."""
    headers = response.headers
    if response.status >= 300 or "Content-Length" in headers or "Transfer-Encoding" in headers:
        return False
    try:
        if headers.get("Content-Encoding") == "gzip":
            content = gunzip(content, _LARGEST)
        parse(content)
    except ValueError:
        return content.lstrip()[:1] in (b"", b"{", b"[", b"\x1f")  # else it never was JSON
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


def _words(content: bytes) -> str:
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
