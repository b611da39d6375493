"""A judge on a server that speaks OpenAI's chat protocol, as vLLM, SGLang and others do."""

import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Any

from torchrft.config.reward_config import Judge as Entry
from torchrft.rewards.judge_template import Content
from torchrft.rewards.source import RewardError
from torchrft.tools.http import FAILURES, JsonServer, ServerError, bearer_token, parse

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0  # seconds before a request is sent again
_START = 10.0  # seconds in which a server must say what it serves
_TOO_LONG = re.compile(r"(?i)context[ _]length")  # so say OpenAI, vLLM and SGLang


class ServerAnswers:
    """Answers of chat completions, one request each, spread over the servers of `server_url`.

    No answer, 429 and 5xx are tried again, at the next server, within `timeout` seconds; any other
    error stops the run with the server's words.

    Raises ValueError for a server that does not answer, refuses, or does not serve `model`.
    """

    def __init__(self, entry: Entry) -> None:
        where = f"judge {entry.name!r}"
        token = bearer_token(entry.token_env, f"{where}: token_env")
        self.entry, self.next, self.lock = entry, 0, threading.Lock()
        urls = [url.rstrip("/").removesuffix("/v1") for url in entry.server_url]
        self.servers = [JsonServer(url, "server_url", token) for url in urls]
        for server in self.servers:
            self._check(server, where)

    def __call__(
        self, texts: Sequence[Content], seeds: Sequence[Sequence[int]]
    ) -> list[list[str] | None]:
        for server in self.servers:
            server.is_cut = False  # a reward server goes on after a request that failed
        work = [(text, seed) for text, own in zip(texts, seeds, strict=True) for seed in own]
        pool, ended = ThreadPoolExecutor(self.entry.concurrency, "judge"), threading.Event()
        try:
            asked = [pool.submit(self._answer, *pair, ended) for pair in work]
            for first in as_completed(asked):
                first.result()
        except BaseException:  # what fails ends the others
            ended.set()
            for server in self.servers:
                server.cut()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        given = iter(asked)
        answers = [[future.result() for future in islice(given, len(own))] for own in seeds]
        return [None if None in own else [a for a in own if a is not None] for own in answers]

    def _check(self, server: JsonServer, where: str) -> None:
        try:
            listed = parse(server.exchange(server.under("/v1/models"), None, _START))
            names = [model["id"] for model in listed["data"]]
        except (*FAILURES, ServerError) as error:
            raise ValueError(
                f"{where}: server_url = {server.url} does not say what it serves: {error}"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{where}: server_url = {server.url} answers /v1/models in another form than "
                "OpenAI's"
            ) from error
        if self.entry.model not in names:
            raise ValueError(
                f'{where}: {server.url} does not serve model = "{self.entry.model}"; it serves '
                f"{', '.join(map(str, names)) or 'none'}"
            )

    def _answer(self, text: Content, seed: int, ended: threading.Event) -> str | None:
        """One answer, from whichever server gives it within the time; None if it is too long."""
        deadline, wait = time.monotonic() + self.entry.timeout, _FIRST_WAIT
        body = {
            "model": self.entry.model,
            "messages": [{"role": "user", "content": _sent(text)}],
            "temperature": self.entry.temperature,
            "max_tokens": self.entry.max_new_tokens,
            "seed": seed,
        }
        fault: Exception
        while True:
            server = self._next()
            what = f"reward source {self.entry.name!r}, {server.url}"
            path, left = server.under("/v1/chat/completions"), deadline - time.monotonic()
            try:
                return _text_of(parse(server.exchange(path, body, left)))
            except ServerError as error:
                if error.status == 400 and _TOO_LONG.search(error.message):
                    return None
                if error.status < 500 and error.status != 429:
                    raise RewardError(f"{what} refuses: {error}") from error
                fault, wait = error, max(wait, error.retry_after)
            except FAILURES as error:
                fault = error
            except (ValueError, LookupError, TypeError) as error:
                raise RewardError(f"{what}: the answer is no chat completion: {error}") from error
            if ended.is_set() or time.monotonic() + wait >= deadline:
                raise RewardError(
                    f"{what}: no answer within timeout = {self.entry.timeout:g} seconds: {fault}"
                ) from fault
            ended.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _next(self) -> JsonServer:
        with self.lock:
            self.next += 1
            return self.servers[self.next % len(self.servers)]

    def close(self) -> None:
        """The server is the user's."""


def _sent(content: Content) -> str | list[dict[str, Any]]:
    """A message's content in OpenAI's form."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            parts.append({"type": "image_url", "image_url": {"url": part.data_uri()}})
    return parts


def _text_of(answer: Any) -> str:
    text = answer["choices"][0]["message"]["content"]
    if text is None:  # reasoning took all tokens: an answer without a verdict
        return ""
    if not isinstance(text, str):
        raise ValueError(f"its content is {text!r:.80}")
    return text
