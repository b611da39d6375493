"""Messages to token ids and back, exactly, for any chat template of a tokenizer.

The tokens that a policy sampled are never encoded again. The next prompt is the old one, the
sampled tokens, and behind them only what the template writes after the reply.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchrft.environments.protocol import Messages, ParsedResponse, Tools
from torchrft.environments.tool_calls import check_reply, parse, parse_by_tokenizer, parser_for
from torchrft.models.tokenizer import decode, encode, render_chat

_ASKED = {"role": "user", "content": "."}
_MARK = "reply0ends0here"


class ChatRenderer:
    """The `Renderer` of a Hugging Face tokenizer with a chat template.

    `stop_token_ids` are those of the engine beside the tokenizer's end of sequence and the tokens
    that the template writes behind a reply. `options` are variables of the template, as
    `enable_thinking`. Raises ValueError for a tokenizer without a chat template.

    >>> renderer = ChatRenderer(tokenizer)                                  # doctest: +SKIP
    >>> prompt = renderer.render_ids(messages, add_generation_prompt=True)  # doctest: +SKIP
    >>> reply = renderer.parse_response(ids)                                # doctest: +SKIP
    >>> renderer.bridge_to_next_turn(                                       # doctest: +SKIP
    ...     prompt, ids, answer, messages=[*messages, reply.message()]
    ... )[: len(prompt) + len(ids)] == prompt + ids
    True
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int] = (), **options: Any) -> None:
        if not tokenizer.chat_template or tokenizer.eos_token_id is None:
            raise ValueError(
                "environments speak in messages: the tokenizer needs a chat template and an end of "
                "sequence; lay chat_template.jinja beside it, or take an instruct model's tokenizer"
            )
        self.tokenizer, self.options = tokenizer, options
        self._parser = parser_for(str(tokenizer.chat_template))
        self._parses_itself = getattr(tokenizer, "response_template", None) is not None
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token): id for id, token in added if token.special}
        self._opening = self._text([_ASKED], prompt=True)
        self._closings = self._closing_tokens()
        ends = [*self._closings.values(), tokenizer.eos_token_id, *stop_token_ids]
        self._stops = {id: tokenizer.decode([id]) for id in ends}

    def render_ids(
        self, messages: Messages, *, tools: Tools = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """The ids of a conversation.

        Raises ValueError for messages that the template refuses and for tools that it ignores, or
        whose calls nobody here can read.
        """
        text = self._text(messages, tools, add_generation_prompt)
        if tools and text == self._text(messages, None, add_generation_prompt):
            raise ValueError("the chat template takes no tools: describe them in a message instead")
        if tools and self._parser is None and not self._parses_itself:
            raise ValueError("unknown form of tool calls: give the tokenizer a response_template")
        return self.encode(text)

    def get_stop_token_ids(self) -> list[int]:
        """The tokens that end a reply."""
        return list(self._stops)

    def parse_response(
        self, ids: Sequence[int], *, tools: Tools = None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedResponse:
        """The message that sampled `ids` mean; never raises for what a policy may sample.

        `prompt_ids` tell whether the prompt ends inside the thinking; without them the prompt is
        taken to end as the template has it.
        """
        before = self.tokenizer.decode(prompt_ids) if prompt_ids else self._opening
        text = decode(self.tokenizer, ids, stop_ids=self._stops)
        if self._parses_itself:
            parsed = parse_by_tokenizer(self.tokenizer, decode(self.tokenizer, ids), before, tools)
        else:
            parsed = parse(text, self._parser, tools, before.rstrip().endswith("<think>"))
        try:
            self._text([_ASKED, parsed.message()], tools)
            return parsed
        except ValueError as error:  # two calls where a template takes one, half a character
            fault = parsed.fault or f"The reply does not fit: {error!s:.200}"
        plain = text.encode(errors="replace").decode()
        for token in self._special:
            plain = plain.replace(token, "")
        return ParsedResponse(plain, fault=fault)

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
        template does not leave it as it is in the tokens: when new messages have it write earlier
        ones otherwise, as without their thinking. Raises ValueError for messages that it refuses.
        """
        before = self._text(messages[:-1], tools, prompt=True)
        replied = self._text(messages, tools)
        after = self._text([*messages, *new_messages], tools, prompt=True)
        stop = self._stops.get(ids[-1]) if ids else None
        sampled = before + decode(self.tokenizer, ids, stop_ids=self._stops)
        rest = after.removeprefix(sampled)
        closed = stop is None or rest.startswith(tuple(self._stops.values()))
        if not (after.startswith(sampled) and closed):
            if not (replied.startswith(before) and after.startswith(replied)):
                return None
            # The template writes the reply in other words. What it writes behind it is the same.
            reply = replied.removeprefix(before)
            end = max((reply.rfind(token) for token in self._closings), default=-1)
            rest = (reply[end:] if end >= 0 else "") + after.removeprefix(replied)
        if stop is not None:
            rest = rest.removeprefix(stop)
        # Encoded behind a token, since some tokenizers put a space in front of a text.
        first = next(iter(self._stops.values()))
        return [*prompt_ids, *ids, *self.encode(first + rest)[1:]]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it included, without any in front."""
        return encode(self.tokenizer, [text], special=False)[0]

    def _text(self, messages: Messages, tools: Tools = None, prompt: bool = False) -> str:
        """The messages as the template writes them."""
        given = {"tools": list(tools) if tools else None, "add_generation_prompt": prompt}
        return render_chat(self.tokenizer, _filled(messages), "messages", **self.options, **given)

    def _closing_tokens(self) -> dict[str, int]:
        """The special tokens that the template writes behind a reply and behind a tool call."""
        function = {"name": "f", "arguments": {"x": _MARK}}
        call = {"type": "function", "id": "a23456789", "function": function}
        closings: dict[str, int] = {}
        for reply in ({"content": _MARK}, {"content": "", "tool_calls": [call]}):
            try:
                text = self._text([_ASKED, {"role": "assistant", **reply}])
            except ValueError:  # a template without tool calls may refuse them
                continue
            _, mark, behind = text.rpartition(_MARK)
            tokens = [token for token in self._special if mark and token in behind]
            last = sorted(tokens, key=behind.rfind)[-1:]
            closings |= {token: self._special[token] for token in last}
        return closings


def _filled(messages: Messages) -> list[dict[str, Any]]:
    """Messages with the keys that templates ask for: a tool's answer has the id and the name of
    its call, and thinking lies under `thinking`, too, for gpt-oss."""
    whole, calls = [], []
    for message in map(dict, messages):
        if message.get("role") == "assistant":
            calls = list(message.get("tool_calls") or ())
            if message.get("reasoning_content"):
                message["thinking"] = message["reasoning_content"]
        elif message.get("role") == "tool" and calls:
            call = calls.pop(0)
            message = {"tool_call_id": call["id"], "name": call["function"]["name"], **message}
        whole.append(message)
    return whole


class PackageRenderer:
    """A renderer of the `renderers` package in the place of a `ChatRenderer`."""

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer
        self.render_ids, self.get_stop_token_ids = renderer.render_ids, renderer.get_stop_token_ids

    def parse_response(
        self, ids: Sequence[int], *, tools: Tools = None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedResponse:
        """The message that `ids` mean; a call that the package could not read is a fault."""
        prompt = list(prompt_ids or ())  # the package takes none and an empty one alike
        parsed = self.renderer.parse_response(list(ids), tools=tools, prompt_ids=prompt)

        def read(_: Any) -> ParsedResponse:
            for call in parsed.tool_calls:
                if call.status != "ok":
                    raise ValueError(f"The tool call is faulty ({call.status}): {call.raw:.200}")
            return ParsedResponse(parsed.content, tool_calls=tuple(map(vars, parsed.tool_calls)))

        reply = check_reply(parsed.content, tools, read)
        return replace(reply, reasoning_content=parsed.reasoning_content)

    def bridge_to_next_turn(
        self, prompt_ids: Sequence[int], ids: Sequence[int], new_messages: Messages, **options: Any
    ) -> list[int] | None:
        """The next prompt, or None where the package begins it anew or changes the tokens."""
        options.pop("messages", None)  # the package reads them from the tokens
        given, sampled = (list(prompt_ids), list(ids)), [*prompt_ids, *ids]
        bridge = self.renderer.bridge_to_next_turn(*given, list(new_messages), **options)
        whole = bridge is not None and bridge.token_ids[: len(sampled)] == sampled
        return bridge.token_ids if whole else None
