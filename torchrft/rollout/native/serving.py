"""Single requests to the native engine, which come while others are decoded."""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import torch

from torchrft.models.support import check_length
from torchrft.rollout.engine import check_prompts, random_seed
from torchrft.rollout.native.scheduler import Request, Scheduler
from torchrft.rollout.native.sessions import Sessions
from torchrft.types import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    from torchrft.rollout.native.engine import NativeEngine


class NativeServing:
    """See `torchrft.types.Serving`; `slots` sequences are decoded at a time.

    Sessions take as much memory as the slots at most; beyond it the oldest one is dropped. They end
    with the weights that they were computed by.
    """

    def __init__(self, engine: NativeEngine, sampling: SamplingParams, slots: int) -> None:
        self.engine, self.slots = engine, slots
        self.sampling = replace(sampling, n=1, seeds=None)
        self.scheduler: Scheduler | None = None
        self.numbers = count()
        self.replies: dict[int, Future[Completion]] = {}

    def submit(
        self, prompt: Prompt, seed: int | None, session: Hashable = None
    ) -> Future[Completion]:
        engine, sampling, number = self.engine, self.sampling, next(self.numbers)
        vocabulary = engine.model.get_input_embeddings().weight.shape[0]
        check_prompts([prompt], sampling, engine.version, engine.vision is not None, vocabulary)
        budget = sampling.budget(len(prompt.token_ids))
        longest = len(prompt.token_ids) + budget
        check_length(longest, engine.limit, type(engine.model).__name__)
        shift = 0 if engine.vision is None else engine.vision.shift(prompt)
        seeds = [random_seed(sampling) if seed is None else seed]
        # Keys of the same tokens differ by the pictures before them.
        session = None if prompt.images else session
        request = Request(number, prompt, seeds, budget, shift, session)
        if self.scheduler is None:
            self.scheduler = self._scheduler()
        self.scheduler.add(request)
        reply = self.replies[number] = Future()
        return reply

    def _scheduler(self) -> Scheduler:
        engine, sampling = self.engine, self.sampling
        longest = min(sampling.max_total_tokens, engine.limit or sampling.max_total_tokens)
        budget, sessions = sampling.budget(1), Sessions(self.slots * longest)
        sees = engine.vision is not None
        return engine.scheduler(sampling, self.slots, longest, budget, sees, sessions)

    @torch.inference_mode()
    @torch._dynamo.config.patch(recompile_limit=64)  # shapes of caches differ
    def advance(self) -> bool:
        scheduler = self.scheduler
        if scheduler is None or not scheduler.busy:
            return False
        for sample in scheduler.advance():
            completion = self.engine.completion(sample, self.sampling)
            reply = self.replies.pop(sample.request.number)
            if reply.set_running_or_notify_cancel():
                reply.set_result(replace(completion, prompt_index=0))
        return True

    def release(self, session: Hashable) -> None:
        if self.scheduler is not None:
            self.scheduler.sessions.drop(session)

    def forget(self) -> None:
        """Drops the caches; raises ValueError if requests are under way."""
        if self.replies:
            raise ValueError(f"{len(self.replies)} requests are under way: end them first")
        self.scheduler = None

    def close(self, failed: bool = False) -> None:
        for reply in self.replies.values():
            reply.cancel()
        self.replies.clear()
        self.scheduler = self.engine.serving = None
