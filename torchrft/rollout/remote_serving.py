"""Single requests to vLLM servers."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING

from torchrft.rollout.engine import random_seed
from torchrft.tools.http import Server, start
from torchrft.types import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    from torchrft.rollout.remote import RemoteVllmEngine


class RemoteServing:
    """See `torchrft.types.Serving`.

    The turns of a session go to one server, whose prefix cache has the earlier ones, as long as it
    answers.
    """

    def __init__(self, engine: RemoteVllmEngine, sampling: SamplingParams) -> None:
        self.engine, self.sampling = engine, replace(sampling, n=1, seeds=None)
        self.stack = ExitStack()
        self.oldest = self.stack.enter_context(engine.scaled(sampling.temperature or 1.0))
        servers = engine.group.servers
        self.turns = asyncio.Semaphore(engine.rollout.max_num_seqs * len(servers))
        self.next_server = cycle(servers)
        self.servers: dict[Hashable, Server] = {}
        self.replies: set[Future[Completion]] = set()

    def submit(
        self, prompt: Prompt, seed: int | None, session: Hashable = None
    ) -> Future[Completion]:
        seed = random_seed(self.sampling) if seed is None else seed
        sampling = replace(self.sampling, seeds=((seed,),))
        self.engine.check([prompt], sampling)
        if session is not None and session not in self.servers:
            self.servers[session] = next(self.next_server)
        reply = start(self._complete(prompt, sampling, self.servers.get(session)))
        self.replies.add(reply)
        reply.add_done_callback(self.replies.discard)
        return reply

    async def _complete(
        self, prompt: Prompt, sampling: SamplingParams, server: Server | None
    ) -> Completion:
        async with self.turns:
            (completion,) = await self.engine.complete(sampling, self.oldest, (0, prompt), server)
        return completion

    def advance(self) -> bool:
        """The servers go on by themselves."""
        return False

    def release(self, session: Hashable) -> None:
        self.servers.pop(session, None)

    def close(self, failed: bool = False) -> None:
        for reply in list(self.replies):
            reply.cancel()
        self.stack.close()
