"""The records and protocols of an episode; plain data, no torch.

A row of data opens an episode. The policy replies, the environment answers, until one of them ends
it. What the policy sampled is kept token by token in branches, which are the training rows.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
"""A chat message: `role` and `content`, and `tool_calls` or `name` as chat templates take them."""

ToolSpec = Mapping[str, Any]
"""A tool as chat templates take it: `{"type": "function", "function": {name, description,
parameters}}`, the parameters as a JSON schema."""

Messages = Sequence[Message]
Tools = Sequence[ToolSpec] | None

Status = Literal["done", "turns", "length", "error", "timeout"]
"""How an episode ended: by the environment, the limit of turns, the limit of tokens, an exception
or nonsense of the environment, or its deadline."""


class EnvironmentFault(Exception):
    """What ended an episode from the environment's side: `status` "error" or "timeout"."""

    def __init__(self, text: str, status: Status = "error") -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Opening:
    """What an episode starts with: the first messages, and the tools that the policy may call."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()


@dataclass(frozen=True)
class Turn:
    """What the environment answers to a reply; its messages are never the assistant's."""

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """One episode. Every method may be async. Equal rows, seeds and replies give equal answers."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening | Awaitable[Opening]:
        """The opening of an episode on a `row` of the data; all that is random follows `seed`."""
        ...

    def step(self, reply: Message) -> Turn | Awaitable[Turn]:
        """The answer to the policy's `reply`, a message with the role assistant."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Gives back what the episode holds."""
        ...


@dataclass(frozen=True)
class ParsedResponse:
    """A reply as a message: its text, its thinking if the family marks it, and its tool calls.

    `fault` says why a tool call could not be read; the policy then gets it as an observation.
    """

    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    fault: str | None = None

    def message(self) -> dict[str, Any]:
        """The message of the role assistant."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


class Renderer(Protocol):
    """From messages to token ids and back, with the names of the `renderers` package."""

    def render_ids(
        self, messages: Messages, *, tools: Tools = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """The ids of a conversation."""
        ...

    def parse_response(
        self, ids: Sequence[int], *, tools: Tools = None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedResponse:
        """The message that sampled `ids` mean; never raises for what a policy may sample.

        `prompt_ids` tell whether the prompt ends inside the thinking.
        """
        ...

    def bridge_to_next_turn(
        self,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        new_messages: Messages,
        *,
        tools: Tools = None,
        messages: Messages,
    ) -> list[int] | None:
        """The next prompt, which begins with `prompt_ids` and the sampled `ids` as they are.

        `messages` are the conversation up to the reply, which is their last. None where the
        template cannot go on exactly: a new branch starts then.
        """
        ...

    def get_stop_token_ids(self) -> list[int]:
        """The tokens that end a reply."""
        ...


@dataclass(frozen=True)
class Limits:
    """What ends an episode: replies, and tokens of a branch with its prompt."""

    max_turns: int = 8
    max_tokens: int = 4096
