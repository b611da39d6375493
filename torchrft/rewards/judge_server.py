"""A judge on a server that speaks OpenAI's chat protocol, as vLLM, SGLang and others do."""

import asyncio
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from torchrft.config.reward_config import Judge as Entry
from torchrft.rewards.judge_template import Content
from torchrft.rewards.source import RewardError
from torchrft.tools.credentials import bearer_token
from torchrft.tools.http import Deadline, Server, ServerError, ServerGroup, run_all
from torchrft.tools.payload import parse

_LONGEST_REST = 10.0  # seconds before a server that failed is asked again
_START = 10.0  # seconds in which a server must say what it serves
_TOO_LONG = re.compile(r"(?i)context[ _]length")  # so say OpenAI, vLLM and SGLang


class ServerAnswers:
    """Answers of chat completions, one request each, spread over the servers of `server_url`.

    No answer, 429 and 5xx are tried again, at the next server, within `timeout` seconds; any other
    error stops the run with the server's words.

    Raises ValueError for a server that does not answer, refuses, or does not serve `model`.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        token = bearer_token(entry.token_env, f"judge {entry.name!r}: token_env")
        urls = [url.rstrip("/").removesuffix("/v1") for url in entry.server_url]
        servers = [Server(url, "server_url", token) for url in urls]
        self.group = ServerGroup(
            servers, f"reward source {entry.name!r}", RewardError, _LONGEST_REST
        )
        run_all(self._check, servers)

    def __call__(
        self, texts: Sequence[Content], seeds: Sequence[Sequence[int]]
    ) -> list[list[str] | None]:
        pairs = [(text, seed) for text, row in zip(texts, seeds, strict=True) for seed in row]
        flat = iter(run_all(self._answer, pairs, self.entry.concurrency, "answers"))
        answers = [list(islice(flat, len(row))) for row in seeds]
        return [None if None in row else [a for a in row if a is not None] for row in answers]

    async def _check(self, server: Server) -> None:
        where = f"judge {self.entry.name!r}"
        try:
            url = server.under("/v1/models")
            listed = parse(await server.exchange(url, None, Deadline(_START)))
            names = [model["id"] for model in listed["data"]]
        except (OSError, ServerError) as error:
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

    async def _answer(self, pair: tuple[Content, int]) -> str | None:
        """One answer, from whichever server gives it within the time; None if it is too long."""
        entry, (text, seed) = self.entry, pair
        deadline = Deadline(entry.timeout, "timeout")
        message = await asyncio.to_thread(_message_content, text)  # it reads images
        body = {
            "model": entry.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": entry.temperature,
            "max_tokens": entry.max_new_tokens,
            "seed": seed,
        }

        async def ask(server: Server) -> str | None:
            url = server.under("/v1/chat/completions")
            try:
                return _text_of(parse(await server.exchange(url, body, deadline)))
            except ServerError as error:
                if error.status == 400 and _TOO_LONG.search(error.message):
                    return None
                raise
            except (ValueError, LookupError, TypeError) as error:
                where = f"reward source {entry.name!r}, {server.url}"
                raise RewardError(f"{where}: the answer is no chat completion: {error}") from error

        return await self.group.answer("the text", ask, deadline)

    def close(self) -> None:
        """The server is the user's."""


def _message_content(content: Content) -> str | list[dict[str, Any]]:
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
