"""HTTP to one vLLM server: retries with back-off, and a deadline."""

from __future__ import annotations

import http.client
import json
import os
import time
from typing import Any
from urllib.parse import urlsplit

_FIRST_WAIT = 0.5  # seconds before the first retry; doubled for every further one


class ServerError(Exception):
    """The server answered with an error: `status`, and its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message = status, message


class Server:
    """One server, and how many requests of this process it works on.

    Args: url, as http://host:port; timeout, seconds for a call with all its retries; retries, how
        often a call is repeated that found no connection or ended in a 5xx.
    Raises ValueError for another kind of url.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f'server_urls holds "{url}"; write each as http://host:port')
        self.url, self.timeout, self.retries = url, timeout, retries
        self._address = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self.outstanding = 0
        self.failure: str | None = None  # why it is left out
        self.sleeps = False

    def ask(self, path: str, body: Any = None, retry: bool = True) -> Any:
        """The JSON that `path` answers to POST of `body` as JSON, or to GET for None.

        Raises ConnectionError when no answer came, and ServerError for one of 400 or more.
        """
        deadline = time.monotonic() + self.timeout
        for attempt in range(self.retries + 1 if retry else 1):
            if attempt:
                wait = _FIRST_WAIT * 2 ** (attempt - 1)
                time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
                if self.failure is not None:
                    break  # another thread has given it up meanwhile
            try:
                return self._ask_once(path, body, deadline)
            except TimeoutError:
                raise ConnectionError(
                    f"no answer to {path} within request_timeout = {self.timeout:g} seconds"
                ) from None
            except ServerError as error:
                if error.status < 500 or attempt == self.retries or not retry:
                    raise
                last: Exception = error
            except (OSError, http.client.HTTPException) as error:
                last = error
        raise ConnectionError(f"{type(last).__name__}: {last}")

    def _ask_once(self, path: str, body: Any, deadline: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connection(self._address, timeout=_left(deadline))
        try:
            text = None if body is None else json.dumps(body)
            connection.request(
                "GET" if body is None else "POST", self._prefix + path, text, headers
            )
            socket = connection.sock
            response = connection.getresponse()
            parts = []
            # A timeout of a socket is that of one read: an answer that trickles in would pass it.
            while part := response.read1(1 << 20):
                parts.append(part)
                socket.settimeout(_left(deadline))
        finally:
            connection.close()  # a server that still works on it stops
        return _parsed(response.status, b"".join(parts))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _parsed(status: int, content: bytes) -> Any:
    try:
        answer = json.loads(content or b"null")
    except ValueError:
        answer = None
    if status < 400:
        return answer
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    message = error.get("message", error) if isinstance(error, dict) else error
    raise ServerError(status, str(message or content[:200]))
