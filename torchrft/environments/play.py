"""One episode: replies and answers by turns, and the rows that are trained on.

No token is encoded twice: what the engine sampled goes into the next prompt as it is. Where a chat
template cannot continue that way, the conversation is rendered anew and a new branch begins.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torchrft.environments.protocol import (
    Environment,
    EnvironmentFault,
    Limits,
    Message,
    Opening,
    Renderer,
    Status,
    Turn,
)
from torchrft.types import Branch, Completion, Kept

Generate = Callable[[Sequence[int], int], Awaitable[Completion]]
"""Samples a reply to the prompt of these ids; the number is the turn's, from 0."""


@dataclass
class Row:
    """A branch as it grows."""

    prompt: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    def observe(self, ids: Sequence[int]) -> None:
        """Adds tokens that the policy did not sample."""
        self.token_ids += ids
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def add(self, reply: Completion) -> None:
        """Adds a turn's sampled tokens; its reward is not known yet."""
        self.token_ids += reply.token_ids
        self.sampled += [True] * len(reply.token_ids)
        self.logprobs += reply.logprobs
        self.turn_ends.append(len(self.token_ids))
        self.turn_rewards.append(0.0)
        self.versions.append(reply.policy_version)

    def branch(self) -> Branch:
        """The row up to its last sampled token."""
        end = self.turn_ends[-1]
        return Branch(
            self.prompt,
            tuple(self.token_ids[:end]),
            tuple(self.sampled[:end]),
            tuple(self.logprobs[:end]),
            tuple(self.turn_ends),
            tuple(self.turn_rewards),
            tuple(self.versions),
        )


@dataclass(frozen=True)
class Episode:
    """What came of one episode; `reward` is the sum of its turns' rewards, `text` the last reply.

    `metrics` are the means over its turns of what the environment measured. With the status "error"
    or "timeout", `fault` says in one sentence what the environment did.
    """

    branches: tuple[Branch, ...]
    reward: float
    status: Status
    messages: tuple[Message, ...]
    text: str = ""
    kept: Kept | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None

    @property
    def turns(self) -> int:
        """Replies that were sampled."""
        return sum(len(branch.turn_ends) for branch in self.branches)


async def play(
    environment: Environment,
    row: Mapping[str, Any],
    seed: int,
    generate: Generate,
    renderer: Renderer,
    limits: Limits,
) -> Episode:
    """Plays one episode to its end; what the environment does wrong ends the episode alone.

    Raises what `generate` raises. The environment is closed in any case.
    """
    play = _Play(environment, generate, renderer, limits)
    status, fault = await play.to_end(row, seed)
    branches = tuple(row.branch() for row in play.rows if row.turn_ends)
    values: dict[str, list[float]] = {}
    for answer in play.answers:
        for name, value in answer.metrics.items():
            values.setdefault(name, []).append(float(value))
    return Episode(
        branches,
        sum(sum(branch.turn_rewards) for branch in branches),
        status,
        tuple(play.messages),
        play.text,
        Kept.join(play.kept) if play.kept else None,
        {name: sum(of_name) / len(of_name) for name, of_name in values.items()},
        fault,
    )


class _Play:
    """The state of one episode."""

    def __init__(
        self, environment: Environment, generate: Generate, renderer: Renderer, limits: Limits
    ) -> None:
        self.environment, self.generate = environment, generate
        self.renderer, self.limits = renderer, limits
        self.rows: list[Row] = []
        self.messages: list[Message] = []
        self.answers: list[Turn] = []
        self.kept: list[Kept] = []
        self.text = ""

    async def to_end(self, row: Mapping[str, Any], seed: int) -> tuple[Status, str | None]:
        """How the episode ended, and the environment's fault if there was one."""
        try:
            return await self._turns(row, seed), None
        except EnvironmentFault as error:
            return error.status, str(error)
        finally:
            with suppress(EnvironmentFault):
                await _called(self.environment.close)

    async def _turns(self, row: Mapping[str, Any], seed: int) -> Status:
        opening: Opening = await _called(self.environment.reset, row, seed)
        self.messages = list(opening.messages)
        tools = opening.tools or None
        prompt = self._rendered(tools)
        self.rows.append(Row(tuple(prompt)))
        for turn in range(self.limits.max_turns):
            if len(prompt) >= self.limits.max_tokens:
                return "length"
            reply = await self.generate(prompt, turn)
            self.rows[-1].add(reply)
            self.text = reply.text
            self.kept += [] if reply.kept is None else [reply.kept]
            answer = await self._answer(prompt, reply, tools)
            if answer.done:
                return "done"
            if turn + 1 < self.limits.max_turns:
                prompt = self._next_prompt(prompt, reply, answer, tools)
        return "turns"

    async def _answer(self, prompt: Sequence[int], reply: Completion, tools: Any) -> Turn:
        parsed = self.renderer.parse_response(reply.token_ids, tools=tools, prompt_ids=prompt)
        message = parsed.message()
        self.messages.append(message)
        heard = message if parsed.fault is None else {**message, "fault": parsed.fault}
        answer: Turn = await _called(self.environment.step, heard)
        self.answers.append(answer)
        self.messages += answer.messages
        self.rows[-1].turn_rewards[-1] = float(answer.reward)
        return answer

    def _next_prompt(
        self, prompt: Sequence[int], reply: Completion, answer: Turn, tools: Any
    ) -> list[int]:
        """The reply and the answer behind the prompt, token by token, or a new branch's prompt."""
        before = len(prompt) + len(reply.token_ids)
        so_far = self.messages[: len(self.messages) - len(answer.messages)]
        with _template():
            ids = self.renderer.bridge_to_next_turn(
                prompt, reply.token_ids, answer.messages, tools=tools, messages=so_far
            )
        if ids is None:
            ids = self._rendered(tools)
            self.rows.append(Row(tuple(ids)))
        else:
            self.rows[-1].observe(ids[before:])
        return ids

    def _rendered(self, tools: Any) -> list[int]:
        with _template():
            return self.renderer.render_ids(self.messages, tools=tools, add_generation_prompt=True)


@contextmanager
def _template() -> Iterator[None]:
    """A chat template may refuse the messages of an environment, by any exception."""
    try:
        yield
    except Exception as error:
        text = f"its messages do not fit the chat template: {error!s:.300}"
        raise EnvironmentFault(text) from error


async def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function or coroutine function of the environment's returns."""
    try:
        result = function(*arguments)
        return await result if inspect.isawaitable(result) else result
    except EnvironmentFault:
        raise
    except Exception as error:
        raise EnvironmentFault(f"{type(error).__name__}: {error!s:.300}") from error
