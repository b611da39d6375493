"""Many episodes at once on an engine: `Player.generate` is the engine's `generate`, by episodes.

Episodes go in rounds: when each one that is under way has asked for a reply or has ended, the
engine gets all requests together, in the order of their prompts. So what the engine computes
together does not depend on how long environments take, and a run is the same every time, to the
last bit. Or they go freely: the engine gets each request at once, beside what it decodes.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

from torchrft.environments.agent import run_agent
from torchrft.environments.batches import Batches
from torchrft.environments.play import Episode, play
from torchrft.environments.pool import EnvironmentPool, Seat
from torchrft.environments.protocol import Limits, Message, Opening, Renderer, Status, Turn
from torchrft.environments.recording import Recorder
from torchrft.environments.serve import Endpoint
from torchrft.tools import progress
from torchrft.tools.seeds import derive_seed
from torchrft.types import Branch, Completion, Prompt, Sampler, SamplingParams, Serves, Serving

_STATUSES = get_args(Status)
_ENVIRONMENT = 1_000_003  # sets the environment's seed apart from those of replies
_PASSES = 3  # of the event loop, in which a reply reaches its environment, or an answer the engine


@dataclass
class _Request:
    """A prompt that an episode waits for a reply to."""

    prompt: Prompt
    seed: int | None
    reply: asyncio.Future[Completion]


class Player:
    """Plays `n` episodes for each prompt, whose rows the environment gets.

    Args: engine; environments, as an EnvironmentPool; renderer, of the policy's chat template;
        row_of, what an environment gets of a prompt; seed, of environments where sampling has none;
        in_rounds, whether episodes wait for each other; are_agents, whether environments own their
        loop and call the policy at an endpoint.
    """

    def __init__(
        self,
        engine: Sampler,
        environments: EnvironmentPool,
        renderer: Renderer,
        limits: Limits,
        row_of: Callable[[Prompt], Mapping[str, Any]],
        seed: int = 0,
        in_rounds: bool = True,
        are_agents: bool = False,
    ) -> None:
        self.engine, self.environments = engine, environments
        self.renderer, self.limits, self.row_of, self.seed = renderer, limits, row_of, seed
        self.in_rounds, self.are_agents = in_rounds, are_agents

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """One completion an episode, in the order of prompts and samples."""
        serving, failed = self._serving(len(prompts), sampling), True
        try:
            completions = asyncio.run(_Episodes(self, serving, sampling).play(prompts))
            failed = False
        finally:
            serving.close(failed)
        return completions

    def _serving(self, prompts: int, sampling: SamplingParams) -> Serving:
        stops = {*sampling.stop_token_ids, *self.renderer.get_stop_token_ids()}
        at_once = prompts * sampling.n
        sampling = replace(sampling, n=1, seeds=None, stop_token_ids=tuple(sorted(stops)))
        if isinstance(self.engine, Serves):
            return self.engine.serve(sampling, at_once)
        return Batches(self.engine, sampling)

    def close(self) -> None:
        """Ends the environments and the engine."""
        self.environments.close()
        self.engine.close()


class _Episodes:
    """The episodes of one call and what they wait for, by prompt and sample."""

    def __init__(self, player: Player, serving: Serving, sampling: SamplingParams) -> None:
        self.player, self.serving, self.sampling = player, serving, sampling
        self.waiting: dict[tuple[int, int, int], _Request] = {}
        self.under_way = 0  # episodes
        self.unanswered = 0  # requests that the engine has
        self.failure: BaseException | None = None
        self.changed = asyncio.Event()
        self.endpoint = Endpoint(sampling) if player.are_agents else None

    async def play(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """One completion an episode."""
        async with self.endpoint or nullcontext():
            return await self._play(prompts)

    async def _play(self, prompts: Sequence[Prompt]) -> list[Completion]:
        keys = [(i, j) for i in range(len(prompts)) for j in range(self.sampling.n)]
        tasks = [asyncio.create_task(self._episode(prompts[i], i, j)) for i, j in keys]
        for task in tasks:
            task.add_done_callback(self._end)
        self.under_way = len(tasks)
        try:
            while self.under_way:
                progress.at(len(tasks) - self.under_way, len(tasks), "episodes")
                await self._advance()
                if self.failure is not None:
                    raise self.failure
            episodes = [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
        return [
            _completion(key, episode, self.player.renderer.get_stop_token_ids())
            for key, episode in zip(keys, episodes, strict=True)
        ]

    async def _episode(self, prompt: Prompt, i: int, j: int) -> Episode:
        player, seeds = self.player, self.sampling.seeds
        # Equal for the samples of a prompt, which are compared with each other.
        first = derive_seed(player.seed, prompt.row) if seeds is None else seeds[i][0]
        ask = partial(self._ask, (i, j), prompt, None if seeds is None else seeds[i][j])
        hosted = _Hosted(player.environments, prompt.row)
        given = player.row_of(prompt), derive_seed(first, _ENVIRONMENT)
        if self.endpoint is None:
            episode = await play(hosted, *given, ask, player.renderer, player.limits)
        else:
            recorder = Recorder(ask, player.renderer, player.limits)
            name = self.endpoint.open(recorder)
            end = await run_agent(hosted, *given, self.endpoint.url, name)
            self.endpoint.close(name)
            for key in [key for key in self.waiting if key[:2] == (i, j)]:
                self.waiting.pop(key).reply.cancel()  # nobody hears the answer any more
            episode = recorder.episode(*end)
        self.serving.release((i, j))
        return episode

    async def _ask(
        self, key: tuple[int, int], row: Prompt, seed: int | None, ids: Sequence[int], turn: int
    ) -> Completion:
        prompt = replace(row, token_ids=tuple(ids))
        reply = asyncio.get_running_loop().create_future()
        turn_seed = None if seed is None else derive_seed(seed, turn)
        self.waiting[*key, turn] = _Request(prompt, turn_seed, reply)
        self.changed.set()
        return await reply

    async def _advance(self) -> None:
        """Has the engine go on, or waits for a request where it cannot."""
        in_rounds = self.player.in_rounds
        # An agent may wait for several replies at once.
        if not in_rounds or len({key[:2] for key in self.waiting}) == self.under_way:
            self._submit()
        if (not in_rounds or self.unanswered) and self.serving.advance():
            for _ in range(_PASSES):
                await asyncio.sleep(0)
        else:
            await self.changed.wait()
        self.changed.clear()

    def _submit(self) -> None:
        """Gives the engine what waits, in the order of the prompts."""
        for key in sorted(self.waiting):
            request = self.waiting.pop(key)
            answer = self.serving.submit(request.prompt, request.seed, session=key[:2])
            self.unanswered += 1
            asyncio.wrap_future(answer).add_done_callback(partial(self._answer, request.reply))

    def _answer(
        self, reply: asyncio.Future[Completion], answer: asyncio.Future[Completion]
    ) -> None:
        self.unanswered -= 1
        self.changed.set()
        if reply.done() or answer.cancelled():
            return
        if (failure := answer.exception()) is not None:
            reply.set_exception(failure)
        else:
            reply.set_result(answer.result())

    def _end(self, task: asyncio.Task[Episode]) -> None:
        self.under_way -= 1
        self.changed.set()
        if not task.cancelled():
            self.failure = self.failure or task.exception()


class _Hosted:
    """An environment that is opened where environments run."""

    def __init__(self, environments: EnvironmentPool, row_number: int) -> None:
        self.environments, self.row_number = environments, row_number
        self.seat: Seat | None = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        self.seat, opening = await self.environments.open(row, seed, self.row_number)
        return opening

    async def step(self, reply: Message) -> Turn:
        assert self.seat is not None
        return await self.seat.step(reply)

    async def close(self) -> None:
        if self.seat is not None:
            await self.seat.close()


def _completion(key: tuple[int, int], episode: Episode, stop_ids: Sequence[int]) -> Completion:
    """The episode as the samples of a rollout are; one without a reply has a row that teaches
    nothing."""
    branches = episode.branches
    if not branches:
        nothing = (stop_ids[0],)
        branches = (Branch(nothing, nothing, (True,), (0.0,)),)
    sampled = [
        (token, logprob)
        for branch in branches
        for token, logprob, own in zip(
            branch.token_ids, branch.logprobs, branch.sampled, strict=True
        )
        if own
    ]
    versions = [version for branch in branches for version in branch.versions]
    counted = {f"status/{name}": float(name == episode.status) for name in _STATUSES}
    counted |= {"turns": float(episode.turns), **episode.metrics}
    return Completion(
        *key,
        tuple(token for token, _ in sampled),
        tuple(logprob for _, logprob in sampled),
        episode.text,
        "length" if episode.status == "length" else "stop",
        min(versions, default=0),
        episode.kept,
        branches,
        episode.messages,
        episode.reward,
        counted,
        episode.fault,
    )
