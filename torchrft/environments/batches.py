"""Single requests for an engine that takes batches only: those that wait are one batch."""

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import groupby

from torchrft.types import Completion, Prompt, Sampler, SamplingParams


@dataclass
class _Request:
    prompt: Prompt
    seed: int | None
    reply: Future[Completion]


class Batches:
    """A `Serving` on the engine's `generate`; it keeps nothing of a session."""

    def __init__(self, engine: Sampler, sampling: SamplingParams) -> None:
        self.engine, self.sampling = engine, sampling
        self.requests: list[_Request] = []

    def submit(
        self, prompt: Prompt, seed: int | None, session: Hashable = None
    ) -> Future[Completion]:
        request = _Request(prompt, seed, Future())
        self.requests.append(request)
        return request.reply

    def advance(self) -> bool:
        """Has the engine answer all requests. Equal prompts that are neighbors share a prefill."""
        requests, self.requests = self.requests, []
        if not requests:
            return False
        groups = [list(group) for _, group in groupby(requests, lambda r: r.prompt.token_ids)]
        if len({len(group) for group in groups}) > 1:
            groups = [[request] for request in requests]
        seeds = None
        if all(request.seed is not None for request in requests):
            seeds = tuple(tuple(r.seed or 0 for r in group) for group in groups)
        sampling = replace(self.sampling, n=len(groups[0]), seeds=seeds)
        for reply in self.engine.generate([group[0].prompt for group in groups], sampling):
            groups[reply.prompt_index][reply.sample_index].reply.set_result(reply)
        return True

    def release(self, session: Hashable) -> None:
        """Nothing is kept."""

    def close(self, failed: bool = False) -> None:
        for request in self.requests:
            request.reply.cancel()
