"""Episodes of agents that own their loop: each call is recorded, token by token.

A call's tokens continue a row that it begins with, else they open a branch. So each reply is
trained on once, behind the very tokens that it was sampled behind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrft.environments.play import Episode, Generate, Row
from torchrft.environments.protocol import Limits, Message, ParsedResponse, Renderer, Status
from torchrft.types import Completion, Kept


class CallError(Exception):
    """A call that gets no reply, and why; `code` as in OpenAI's errors."""

    def __init__(self, text: str, code: str = "invalid_request_error") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Call:
    """A call with its reply; `messages` are the conversation up to the reply, which is the last."""

    prompt: Sequence[int]
    reply: Completion
    messages: tuple[Message, ...] = ()
    tools: Any = None


class Recorder:
    """One episode. `generate` samples a reply, see `play`; its turn is the number of the call."""

    def __init__(self, generate: Generate, renderer: Renderer, limits: Limits) -> None:
        self.generate, self.renderer, self.limits = generate, renderer, limits
        self.begin()

    def begin(self) -> None:
        """Forgets all calls: the agent begins anew, since its process was lost."""
        self.rows: list[Row] = []
        self.calls: list[Call] = []
        self.kept: list[tuple[Row, Kept]] = []
        self.asked = 0
        self.limit: Status | None = None  # which one a call ran into
        self.reward = 0.0

    def chat_prompt(self, messages: Sequence[Message], tools: Any) -> list[int]:
        """The ids of a conversation: where it goes on from an earlier call, those of that call,
        as they were sampled, with what the template writes behind them.

        Raises CallError for messages that the template refuses.
        """
        try:
            for call in reversed(self.calls):
                size = len(call.messages)
                if size and tools == call.tools and _alike(messages[:size], call.messages):
                    ids = self.renderer.bridge_to_next_turn(
                        call.prompt,
                        call.reply.token_ids,
                        messages[size:],
                        tools=tools,
                        messages=call.messages,
                    )
                    if ids is not None:
                        return ids
                    messages = (*call.messages, *messages[size:])  # with their thinking
                    break
            return self.renderer.render_ids(messages, tools=tools, add_generation_prompt=True)
        except Exception as error:
            raise CallError(f"the messages do not fit the chat template: {error!s:.300}") from error

    async def sample(self, ids: Sequence[int]) -> Completion:
        """A reply to the prompt `ids`, not yet recorded. Raises CallError beyond the limits."""
        if self.asked >= self.limits.max_turns:
            self.limit = "turns"
            raise CallError(f"the episode has had its max_turns = {self.asked} calls", "max_turns")
        if len(ids) >= self.limits.max_tokens:
            self.limit = "length"
            text = f"the prompt has {len(ids)} tokens, max_len is {self.limits.max_tokens}"
            raise CallError(text, "context_length_exceeded")
        self.asked += 1
        return await self.generate(ids, self.asked - 1)

    def parse(self, ids: Sequence[int], reply: Completion, tools: Any) -> ParsedResponse:
        """The reply as a message."""
        return self.renderer.parse_response(reply.token_ids, tools=tools, prompt_ids=ids)

    def add(self, call: Call) -> None:
        """Records a call that was answered."""
        ids = tuple(call.prompt)
        before = [row for row in self.rows if ids[: len(row)] == (*row.prompt, *row.token_ids)]
        if before:
            row = max(before, key=len)
            row.observe(ids[len(row) :])
            self.rows.remove(row)
        else:
            row = Row(ids)
        row.add(call.reply)
        if call.reply.kept is not None:
            self.kept.append((row, call.reply.kept))
        self.rows.append(row)  # the last one has the last reply
        self.calls.append(call)

    def episode(self, status: Status, fault: str | None, reward: float) -> Episode:
        """What was recorded. The agent's `reward` and that of `self` lie on the last reply.

        An agent that fails because of a limit has run into the limit.
        """
        reward += self.reward
        if self.limit is not None and status in ("done", "error"):
            status, fault = self.limit, None
        if self.rows:
            self.rows[-1].turn_rewards[-1] += reward
        kept = [one for row in self.rows for own, one in self.kept if own is row]
        return Episode(
            tuple(row.branch() for row in self.rows),
            reward,
            status,
            tuple(self.calls[-1].messages) if self.calls else (),
            self.calls[-1].reply.text if self.calls else "",
            Kept.join(kept) if kept else None,
            {},
            fault,
        )


def read_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's form as chat templates take it. Raises CallError for what is none."""
    role, content = message.get("role"), message.get("content")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise CallError(f"a message has the role {role!r:.40}: use system, user, assistant or tool")
    if isinstance(content, list):
        if any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
            raise CallError("content may be text or a list of parts with the type text")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str | None):
        raise CallError(f"content must be text, got {content!r:.80}")
    read: dict[str, Any] = {"role": role, "content": content or ""}
    read |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if calls := message.get("tool_calls"):
        try:
            read["tool_calls"] = [_read_call(call) for call in calls]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CallError(f"tool_calls cannot be read: {error!r:.200}") from None
    return read


def _read_call(call: Any) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {
        "type": "function",
        "id": call["id"],
        "function": {"name": name, "arguments": arguments},
    }


def _alike(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether they say the same; clients do not send thinking back."""
    keys = ("role", "content", "tool_calls", "name", "tool_call_id")
    return [[m.get(key) or None for key in keys] for m in messages] == [
        [m.get(key) or None for key in keys] for m in others
    ]
