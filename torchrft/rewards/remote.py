"""Rewards from HTTP servers: see docs/rewards_remote.md for the protocol and what is retried."""

import base64
import json
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from torchrft.config.reward_config import Reward
from torchrft.rewards.source import RewardError, RewardRequest, RewardResult
from torchrft.tools.http import FAILURES, JsonServer, ServerError, bearer_token, parse
from torchrft.tools.images import ImageError
from torchrft.tools.logging import logger
from torchrft.tools.progress import each
from torchrft.types import Prompt

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before a server that failed is asked again
_HEALTH_TIMEOUT = 10.0  # seconds
_LARGEST_ANSWER = 1 << 26  # bytes
_LARGEST = sys.float_info.max
_TRANSIENT = (*FAILURES, ServerError)


def images_of(prompt: Prompt) -> list[str]:
    """The prompt's encoded images in base64. Raises ImageError for a file that cannot be read."""
    return [base64.b64encode(image.read()).decode() for image in prompt.images]


class _Server(JsonServer):
    """One server: how it does, and what it takes. Its counts are guarded by the client's lock."""

    outstanding = 0
    failures = 0  # in a row
    fault = ""  # the last one
    asked_again_at = 0.0  # time.monotonic()
    extras: Collection[str] = ()  # what it takes beyond the protocol's lists

    def check(self, timeout: float = _HEALTH_TIMEOUT) -> None:
        """Asks /health. Raises one of FAILURES or ServerError if the server is not well.

        One that has no /health and says so is well. Raises ValueError for a refused token.
        """
        try:
            health = parse(self.exchange(self.beside("health"), None, timeout))
        except ServerError as error:
            if error.passes:
                raise
            health = None
        except ValueError:
            health = None
        if isinstance(health, dict):
            takes = health.get("takes")
            self.extras = takes if isinstance(takes, list) else ()
            if health.get("authorized") is False:
                raise ValueError(
                    f"{self.url} refuses the token: remote_rm_token_env must name the environment "
                    "variable that holds the server's"
                )


class RemoteRewards:
    """The rewards that servers give, all alike; any may answer any request.

    Samples go out in batches of `remote_rm_batch_size`, several at a time; results do not depend
    on which server answers, nor when. A server that cannot be reached or answers 429 or 5xx is
    left alone for a while, which doubles with each failure, and asked for its health before it gets
    work again; the others take over what it had.

    Raises ValueError if a URL is none, no server answers, or one refuses the token.
    """

    name = "remote"
    collective = False

    def __init__(self, config: Reward) -> None:
        self.config, self.lock = config, threading.Lock()
        token = bearer_token(config.remote_rm_token_env, "remote_rm_token_env")
        self.servers = [_Server(url, "remote_rm_url", token) for url in config.remote_rm_url]
        faults: list[tuple[_Server, Exception]] = []
        for server in self.servers:
            try:
                server.check()
            except _TRANSIENT as error:
                faults.append((server, error))
        if len(faults) == len(self.servers):
            told = "; ".join(f"{server.url} ({_told(fault)})" for server, fault in faults)
            raise ValueError(
                f"no reward server can be reached: {told}; start it or correct remote_rm_url"
            )
        for server, fault in faults:
            self._failed(server, 0, fault)

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """See RewardSource; the servers' `extra_logs` become metrics."""
        size = self.config.remote_rm_batch_size
        for server in self.servers:
            server.is_cut = False  # a reward server goes on after a request that failed
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        deadline, ended = time.monotonic() + self.config.remote_rm_deadline, threading.Event()
        pool = ThreadPoolExecutor(self.config.remote_rm_concurrency, "remote-reward")
        try:
            scored = [pool.submit(self._score, batch, deadline, ended) for batch in batches]
            for first in each(as_completed(scored), len(scored), "requests"):
                first.result()
        except BaseException:  # what fails first ends the others
            ended.set()
            for server in self.servers:
                server.cut()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [result for part in scored for result in part.result()]

    def close(self) -> None:
        """The servers are the user's, and go on."""

    def _score(
        self, batch: Sequence[RewardRequest], deadline: float, ended: threading.Event
    ) -> list[RewardResult]:
        """One batch's results, from the first server that gives them."""
        rows = _few([request.prompt.row for request in batch])
        tries = 1 + self.config.remote_rm_retries * len(self.servers)
        for _ in range(tries):
            server, failures = self._next(deadline, ended)
            try:
                content = self._ask(server, failures, batch, deadline)
            except _TRANSIENT as error:
                if isinstance(error, ServerError) and not error.passes:
                    raise RewardError(
                        f"reward source 'remote', {server.url} refuses prompt rows {rows}: {error}"
                    ) from error
                self._failed(server, failures, error)
            except ValueError as error:
                raise RewardError(f"reward source 'remote', {server.url}: {error}") from error
            else:
                return parse_answer(content, [r.prompt.row for r in batch], server.url)
            finally:
                with self.lock:
                    server.outstanding -= 1
        raise self._given_up(f"prompt rows {rows} found no answer in {tries} tries")

    def _ask(
        self, server: _Server, failures: int, batch: Sequence[RewardRequest], deadline: float
    ) -> bytes:
        left = min(self.config.remote_rm_timeout, deadline - time.monotonic())
        if failures:
            server.check(min(left, _HEALTH_TIMEOUT))
        body = request_body(batch, self.config.remote_rm_protocol, server.extras)
        content = server.exchange(server.path, body, left, _LARGEST_ANSWER)
        with self.lock:
            if server.failures:
                logger.info(f"{server.url} answers again")
            server.failures = 0
        return content

    def _next(self, deadline: float, ended: threading.Event) -> tuple[_Server, int]:
        """The least busy server that may be asked now, and its failures so far; waits for one."""
        while not ended.is_set():
            now = time.monotonic()
            if now >= deadline:
                limit = self.config.remote_rm_deadline
                raise self._given_up(f"no answer within remote_rm_deadline = {limit:g} seconds")
            with self.lock:
                if usable := [s for s in self.servers if s.asked_again_at <= now]:
                    server = min(usable, key=lambda s: s.outstanding)
                    server.outstanding += 1
                    return server, server.failures
                soonest = min(server.asked_again_at for server in self.servers)
            ended.wait(min(soonest, deadline) - now)
        raise RewardError("another request has failed")

    def _failed(self, server: _Server, failures: int, error: Exception) -> None:
        """Leaves a server alone for a while, unless what was asked meanwhile has done so."""
        with self.lock:
            if server.failures != failures:
                return
            wait = min(_FIRST_WAIT * 2 ** min(failures, 30), _LONGEST_WAIT)
            if isinstance(error, ServerError):
                wait = max(wait, error.retry_after)
            server.failures += 1
            server.asked_again_at = time.monotonic() + wait
            server.fault = _told(error)
        logger.warning(f"{server.url} is asked again in {wait:g} s: {server.fault}")

    def _given_up(self, what: str) -> RewardError:
        faults = "; ".join(f"{s.url}: {s.fault}" for s in self.servers if s.failures)
        return RewardError(f"reward source 'remote': {what} ({faults}); is the server running?")


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
            images[id(prompt)] = images_of(prompt)
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


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
