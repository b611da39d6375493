"""HTTP to one vLLM server: retries with back-off, and a deadline."""

import os
import time
from typing import Any

from torchrft.tools.http import FAILURES, JsonServer, ServerError, bearer_token, parse

__all__ = ["Server", "ServerError"]

_FIRST_WAIT = 0.5  # seconds before the first retry; doubled for every further one


class Server(JsonServer):
    """One server, and how many requests of this process it works on.

    Args: url, as http://host:port; timeout, seconds for a call with all its retries; retries, how
        often a call is repeated that found no connection or ended in a 5xx.
    Raises ValueError for another kind of url.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        variable = "VLLM_API_KEY" if os.environ.get("VLLM_API_KEY") else None
        super().__init__(url, "server_urls", bearer_token(variable, "the token of server_urls"))
        self.timeout, self.retries = timeout, retries
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
                content = self.exchange(self.under(path), body, deadline - time.monotonic())
                return parse(content) if content else None
            except TimeoutError:
                raise ConnectionError(
                    f"no answer to {path} within request_timeout = {self.timeout:g} seconds"
                ) from None
            except ServerError as error:
                if error.status < 500 or attempt == self.retries or not retry:
                    raise
                last: Exception = error
            except (*FAILURES, ValueError) as error:
                last = error
        raise ConnectionError(f"{type(last).__name__}: {last}")
