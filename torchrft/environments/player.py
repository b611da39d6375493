"""Many episodes at once on an engine: `Player.generate` is the engine's `generate`, by episodes.

Episodes go in rounds: when each one that is under way has asked for a reply or has ended, the
engine gets all requests in one call, in the order of their prompts. So what the engine computes
together does not depend on how long environments take, and a run is the same every time.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, get_args

from torchrft.environments.play import Episode, play
from torchrft.environments.pool import EnvironmentPool, Seat
from torchrft.environments.protocol import Limits, Message, Opening, Renderer, Status, Turn
from torchrft.tools import progress
from torchrft.tools.seeds import derive_seed
from torchrft.types import Branch, Completion, Prompt, Sampler, SamplingParams

_STATUSES = get_args(Status)
_ENVIRONMENT = 1_000_003  # sets the environment's seed apart from those of replies


@dataclass
class _Request:
    """A prompt that an episode waits for a reply to."""

    prompt: Prompt
    seed: int | None
    reply: asyncio.Future[Completion]


class Player:
    """Plays `n` episodes for each prompt, whose rows the environment gets.

    Args: engine; environments, as an EnvironmentPool; renderer, of the policy's chat template;
        row_of, what an environment gets of a prompt; seed, of environments where sampling has none.
    """

    def __init__(
        self,
        engine: Sampler,
        environments: EnvironmentPool,
        renderer: Renderer,
        limits: Limits,
        row_of: Callable[[Prompt], Mapping[str, Any]],
        seed: int = 0,
    ) -> None:
        self.engine, self.environments = engine, environments
        self.renderer, self.limits, self.row_of, self.seed = renderer, limits, row_of, seed

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """One completion an episode, in the order of prompts and samples."""
        return asyncio.run(_Rounds(self, sampling).play(prompts))

    def close(self) -> None:
        """Ends the environments and the engine."""
        self.environments.close()
        self.engine.close()


class _Rounds:
    """The episodes of one call and what they wait for, by prompt and sample."""

    def __init__(self, player: Player, sampling: SamplingParams) -> None:
        self.player, self.sampling = player, sampling
        self.waiting: dict[tuple[int, int], _Request] = {}
        self.changed = asyncio.Event()

    async def play(self, prompts: Sequence[Prompt]) -> list[Completion]:
        keys = [(i, j) for i in range(len(prompts)) for j in range(self.sampling.n)]
        tasks = [asyncio.create_task(self._episode(prompts[i], i, j)) for i, j in keys]
        for task in tasks:
            task.add_done_callback(lambda _: self.changed.set())
        try:
            while under_way := [task for task in tasks if not task.done()]:
                progress.at(len(tasks) - len(under_way), len(tasks), "episodes")
                if len(self.waiting) == len(under_way):
                    self._reply()
                    await asyncio.sleep(0)
                else:
                    await self.changed.wait()
                    self.changed.clear()
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
        return await play(
            _Hosted(player.environments, prompt.row),
            player.row_of(prompt),
            derive_seed(first, _ENVIRONMENT),
            ask,
            player.renderer,
            player.limits,
        )

    async def _ask(
        self, key: tuple[int, int], row: Prompt, seed: int | None, ids: Sequence[int], turn: int
    ) -> Completion:
        prompt = replace(row, token_ids=tuple(ids))
        reply = asyncio.get_running_loop().create_future()
        turn_seed = None if seed is None else derive_seed(seed, turn)
        self.waiting[key] = _Request(prompt, turn_seed, reply)
        self.changed.set()
        return await reply

    def _reply(self) -> None:
        """Has the engine answer all requests. Equal prompts that are neighbors share a prefill."""
        requests = [self.waiting.pop(key) for key in sorted(self.waiting)]
        groups = [list(group) for _, group in groupby(requests, lambda r: r.prompt.token_ids)]
        if len({len(group) for group in groups}) > 1:
            groups = [[request] for request in requests]
        seeds = None
        if self.sampling.seeds is not None:
            seeds = tuple(tuple(r.seed or 0 for r in group) for group in groups)
        stops = {*self.sampling.stop_token_ids, *self.player.renderer.get_stop_token_ids()}
        sampling = replace(
            self.sampling, n=len(groups[0]), seeds=seeds, stop_token_ids=tuple(sorted(stops))
        )
        replies = self.player.engine.generate([group[0].prompt for group in groups], sampling)
        for reply in replies:
            groups[reply.prompt_index][reply.sample_index].reply.set_result(reply)


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
