"""Rewards from HTTP servers: see docs/rewards_remote.md for the protocol and what is retried."""

import asyncio
import base64
import json
import sys
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any
from urllib.parse import urljoin

from torchrft.config.reward_config import Reward
from torchrft.rewards.source import RewardError, RewardRequest, RewardResult
from torchrft.tools.credentials import bearer_token
from torchrft.tools.http import Deadline, Server, ServerError, ServerGroup, run_all
from torchrft.tools.images import ImageError
from torchrft.tools.payload import parse

_LONGEST_REST = 30.0  # seconds before a server that failed is asked again
_HEALTH_TIMEOUT = 10.0  # seconds
_LARGEST_ANSWER = 1 << 26  # bytes
_LARGEST = sys.float_info.max


class RemoteRewards:
    """The rewards that servers give, all alike; any may answer any request.

    Samples go out in batches of `remote_rm_batch_size`, several at a time; results do not depend
    on which server answers, nor when. A server that cannot be reached or answers 429 or 5xx is
    left alone for a while, and asked for its health before it gets work again; the others take over
    what it had.

    Raises ValueError if a URL is none, no server answers, or one refuses the token.
    """

    name = "remote"
    collective = False

    def __init__(self, config: Reward) -> None:
        self.config = config
        token = bearer_token(config.remote_rm_token_env, "remote_rm_token_env")
        self.servers = [Server(url, "remote_rm_url", token) for url in config.remote_rm_url]
        self.group = ServerGroup(self.servers, "reward source 'remote'", RewardError, _LONGEST_REST)
        end = Deadline(_HEALTH_TIMEOUT)
        checked = run_all(partial(_health_fault, end=end), self.servers)
        pairs = zip(self.servers, checked, strict=True)
        faults = {server: fault for server, fault in pairs if fault is not None}
        if len(faults) == len(self.servers):
            told = "; ".join(f"{server.url}: {fault}" for server, fault in faults.items())
            raise ValueError(
                f"no reward server can be reached: {told}; start it or correct remote_rm_url"
            )
        for server, fault in faults.items():
            self.group.rest(server, fault)

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """See RewardSource; the servers' `extra_logs` become metrics."""
        size, limit = self.config.remote_rm_batch_size, self.config.remote_rm_concurrency
        end = Deadline(self.config.remote_rm_deadline, "remote_rm_deadline")
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        scored = run_all(partial(self._score, end=end), batches, limit, "requests")
        return [result for batch in scored for result in batch]

    def close(self) -> None:
        """The servers are the user's, and go on."""

    async def _score(self, batch: Sequence[RewardRequest], end: Deadline) -> list[RewardResult]:
        """One batch's results, from the first server that gives them."""
        tries = 1 + self.config.remote_rm_retries * len(self.servers)
        rows = [request.prompt.row for request in batch]
        ask = partial(self._ask, batch, rows, end)
        return await self.group.answer(f"prompt rows {_few(rows)}", ask, end, tries)

    async def _ask(
        self, batch: Sequence[RewardRequest], rows: Sequence[int], end: Deadline, server: Server
    ) -> list[RewardResult]:
        deadline = Deadline(self.config.remote_rm_timeout, "remote_rm_timeout").or_earlier(end)
        protocol = self.config.remote_rm_protocol
        try:
            if server.failures and (fault := await _health_fault(server, deadline)) is not None:
                raise fault
            takes = server.info.get("takes")
            extras = takes if isinstance(takes, list) else ()
            # In a thread, since it reads images.
            body = await asyncio.to_thread(request_body, batch, protocol, extras)
            content = await server.exchange(server.url, body, deadline, _LARGEST_ANSWER)
        except ValueError as error:
            raise RewardError(f"reward source 'remote', {server.url}: {error}") from error
        return parse_answer(content, rows, server.url)


async def _health_fault(server: Server, end: Deadline) -> OSError | ServerError | None:
    """Asks /health why the server is not well, and notes what it says of itself.

    A server that has no /health and says so is well. Raises ValueError for a refused token.
    """
    health = None
    try:
        url, deadline = urljoin(server.url, "health"), Deadline(_HEALTH_TIMEOUT).or_earlier(end)
        health = parse(await server.exchange(url, None, deadline))
    except OSError as error:
        return error
    except (ServerError, ValueError) as error:
        if isinstance(error, ServerError) and error.is_transient:
            return error
    server.info = health if isinstance(health, dict) else {}
    if server.info.get("authorized") is False:
        raise ValueError(
            f"{server.url} refuses the token: remote_rm_token_env must name the environment "
            "variable that holds the server's"
        )
    return None


def request_body(
    batch: Sequence[RewardRequest], protocol: str, extras: Collection[str] = ()
) -> dict[str, list[Any]]:
    """What is sent for B samples, lists of length B; `extras` names what the server takes besides.

    Raises RewardError naming the row for a label or metadata that JSON cannot hold, and for an
    image that cannot be read.
    """
    images = {}
    for prompt in {id(request.prompt): request.prompt for request in batch}.values():
        where = f"reward source 'remote', prompt row {prompt.row}"
        try:
            json.dumps([prompt.label, dict(prompt.metadata), prompt.messages])
            images[id(prompt)] = [base64.b64encode(i.read()).decode() for i in prompt.images]
        except ImageError as error:
            raise RewardError(f"{where}: {error}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(
                f"{where}: its label or metadata cannot be sent as JSON ({error}); store it as "
                "text or a number"
            ) from None
    prompts = [request.prompt.text for request in batch]
    texts = [request.prompt.text + request.completion.text for request in batch]
    labels = [request.prompt.label for request in batch]
    if protocol == "predecessor":
        return {"queries": texts, "prompts": prompts, "references": labels}
    more: dict[str, list[Any]] = {
        "messages": [request.prompt.messages for request in batch],
        "prompt_token_ids": [request.prompt.token_ids for request in batch],
        "token_ids": [request.completion.token_ids for request in batch],
        "finish_reasons": [request.completion.finish_reason for request in batch],
        "rows": [request.prompt.row for request in batch],
    }
    return {
        "query": texts,
        "prompts": prompts,
        "responses": [request.completion.text for request in batch],
        "labels": labels,
        "images": [images[id(request.prompt)] for request in batch],
        "metadata": [dict(request.prompt.metadata) for request in batch],
        **{name: values for name, values in more.items() if name in extras},
    }


def parse_answer(content: bytes, rows: Sequence[int], url: str) -> list[RewardResult]:
    """The results in a server's answer about the prompts `rows`.

    Raises RewardError naming the server, and the row where there is one, for anything but
    {"rewards": [B numbers], "extra_logs": {name: number or B numbers or nulls}}.
    """
    where = f"reward source 'remote', {url}"
    said = content[:200].decode(errors="replace")
    try:
        answer = parse(content)
    except ValueError as error:
        raise RewardError(f"{where}: the answer is no JSON ({error}): {said}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
        raise RewardError(f'{where}: the answer has no list "rewards": {said}')
    logs = answer.get("extra_logs") or {}
    if not isinstance(logs, dict):
        raise RewardError(f'{where}: "extra_logs" must be an object of numbers or lists: {said}')
    metrics: list[dict[str, float]] = [{} for _ in rows]
    for name, value in logs.items():
        values = value if isinstance(value, list) else [value] * len(rows)
        _check(values, rows, f"{where}: the log {name!r:.80}", (int, float, type(None)))
        for place, number in enumerate(values):
            if number is not None:
                metrics[place][name] = float(number)
    _check(answer["rewards"], rows, f'{where}: "rewards"', (int, float))
    scores = map(float, answer["rewards"])
    return [RewardResult(score, metrics=log) for score, log in zip(scores, metrics, strict=True)]


def _check(values: list[Any], rows: Sequence[int], what: str, kinds: tuple[type, ...]) -> None:
    """Raises RewardError unless there is a value of `kinds` for each row, if a number a finite."""
    if len(values) != len(rows):
        raise RewardError(
            f"{what} has {len(values)} values for {len(rows)} samples, of the prompt rows "
            f"{_few(rows)}"
        )
    for row, value in zip(rows, values, strict=True):
        # A bool is no number here; an int beyond the floats is none either.
        if type(value) not in kinds or not -_LARGEST <= (value or 0) <= _LARGEST:
            raise RewardError(
                f"{what}, prompt row {row}, must be a finite number, got {value!r:.80}"
            )


def _few(rows: Sequence[int]) -> str:
    """Rows without repeats, the first few.

    >>> _few([7, 7, 2]), _few(range(9))
    ('7, 2', '0, 1, 2, 3, ...')
    """
    unique = list(dict.fromkeys(rows))
    return ", ".join(map(str, unique[:4])) + (", ..." if len(unique) > 4 else "")
