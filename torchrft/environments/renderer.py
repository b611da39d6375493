"""Messages to token ids and back, exactly, for any chat template of a tokenizer.

The tokens that a policy sampled are never encoded again. The next prompt is the old one, the
sampled tokens, and behind them only what the template writes after the reply.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchrft.environments.protocol import Message, ParsedResponse, ToolSpec
from torchrft.environments.tool_calls import (
    checked,
    parameters_of,
    parse,
    parse_by_tokenizer,
    parser_for,
)
from torchrft.models.tokenizer import decode, encode, render_chat

_MARK = "reply0ends0here"


class ChatRenderer:
    """The `Renderer` of a Hugging Face tokenizer with a chat template.

    `stop_token_ids` are those of the engine beside the tokenizer's end of sequence and the tokens
    that the template writes behind a reply. `template_options` are variables of the template, as
    `enable_thinking`. Raises ValueError for a tokenizer without a chat template.

    >>> renderer = ChatRenderer(tokenizer)                                  # doctest: +SKIP
    >>> prompt = renderer.render_ids(messages, add_generation_prompt=True)  # doctest: +SKIP
    >>> reply = renderer.parse_response(ids)                                # doctest: +SKIP
    >>> renderer.bridge_to_next_turn(                                       # doctest: +SKIP
    ...     prompt, ids, answer, messages=[*messages, reply.message()]
    ... )[: len(prompt) + len(ids)] == prompt + ids
    True
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_token_ids: Sequence[int] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "environments speak in messages, but the tokenizer has no chat template: lay a "
                "chat_template.jinja beside its tokenizer.json, or take the instruct model's"
            )
        self.tokenizer, self.options = tokenizer, dict(template_options or {})
        self._template = str(tokenizer.chat_template)
        self._parser = parser_for(self._template)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token): id for id, token in added if token.special}
        self._opening = self._text([{"role": "user", "content": "."}], prompt=True)
        closing = self._closing_tokens()
        ends = [*stop_token_ids, tokenizer.eos_token_id, *closing]
        self._stops = {id: tokenizer.decode([id]) for id in ends if id is not None}
        self._closings = [self._stops[id] for id in closing]
        if not self._stops:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so that no reply would end: name one "
                "as eos_token in its tokenizer_config.json"
            )

    def render_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSpec] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """The ids of a conversation.

        Raises ValueError for messages that the template refuses and for tools that it ignores.
        """
        text = self._text(messages, tools, add_generation_prompt)
        if tools and text == self._text(messages, None, add_generation_prompt):
            raise ValueError(
                "the chat template takes no tools: describe them in a message, or give the "
                "tokenizer a template that takes them"
            )
        return encode(self.tokenizer, [text], special=False)[0]

    def get_stop_token_ids(self) -> list[int]:
        """The tokens that end a reply."""
        return list(self._stops)

    def parse_response(
        self,
        ids: Sequence[int],
        *,
        tools: Sequence[ToolSpec] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedResponse:
        """The message that sampled `ids` mean; never raises for what a policy may sample.

        `prompt_ids` tell whether the prompt ends inside the thinking; without them the prompt is
        taken to end as the template has it.
        """
        before = self.tokenizer.decode(prompt_ids) if prompt_ids else self._opening
        thinks = before.rstrip().endswith("<think>")
        text = decode(self.tokenizer, ids, stop_ids=self._stops)
        if getattr(self.tokenizer, "response_template", None) is None:
            parsed = parse(text, self._parser, tools, thinks)
        else:
            whole = decode(self.tokenizer, ids)
            parsed = parse_by_tokenizer(self.tokenizer, whole, before, tools)
        return self._renderable(parsed, text, tools)

    def bridge_to_next_turn(
        self,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSpec] | None = None,
        messages: Sequence[Message],
    ) -> list[int] | None:
        """The next prompt, which begins with `prompt_ids` and the sampled `ids` as they are.

        `messages` are the conversation up to the reply, which is their last. None where the
        template does not leave it as it stands in the tokens: when it writes earlier messages
        anew, or drops the reply's thinking. Raises ValueError for messages that it refuses.
        """
        before = self._text(messages[:-1], tools, prompt=True)
        replied = self._text(messages, tools)
        after = self._text([*messages, *new_messages], tools, prompt=True)
        stop = self._stops.get(ids[-1]) if ids else None
        text = before + decode(self.tokenizer, ids, stop_ids=self._stops)
        if after.startswith(text) and (stop is None or self._stop_at(after[len(text) :])):
            rest = after[len(text) :]
        elif replied.startswith(before) and after.startswith(replied):
            # The template writes the reply in other words. What it writes behind it is the same.
            reply = replied[len(before) :]
            end = max((reply.rfind(text) for text in self._closings), default=-1)
            rest = (reply[end:] if end >= 0 else "") + after[len(replied) :]
        else:
            return None
        if stop is not None:
            rest = rest.removeprefix(stop)
        return [*prompt_ids, *ids, *self._encoded_behind_a_stop(rest)]

    def _stop_at(self, text: str) -> bool:
        return text.startswith(tuple(self._stops.values()))

    def _encoded_behind_a_stop(self, text: str) -> list[int]:
        """Behind a token, since some tokenizers put a space in front of a text."""
        stop = next(iter(self._stops.values()))
        return encode(self.tokenizer, [stop + text], special=False)[0][1:]

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
        prompt: bool = False,
    ) -> str:
        """The messages as the template writes them."""
        options = {**self.options, "tools": list(tools) if tools else None}
        filled = self._filled(messages)
        return render_chat(
            self.tokenizer, filled, "messages", add_generation_prompt=prompt, **options
        )

    def _filled(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages with the keys that templates ask for: a tool's answer has the id and the name
        of its call, and thinking lies under `thinking`, too, for gpt-oss."""
        filled: list[dict[str, Any]] = []
        calls: list[Mapping[str, Any]] = []
        for message in messages:
            whole = dict(message)
            if whole.get("role") == "assistant":
                calls = list(whole.get("tool_calls") or ())
                if "message.thinking" in self._template and whole.get("reasoning_content"):
                    whole["thinking"] = whole["reasoning_content"]
            elif whole.get("role") == "tool" and calls:
                call = calls.pop(0)
                whole.setdefault("tool_call_id", call.get("id"))
                whole.setdefault("name", call.get("function", call).get("name"))
            filled.append(whole)
        return filled

    def _closing_tokens(self) -> list[int]:
        """The special tokens that the template writes behind a reply and behind a tool call."""
        function = {"name": "f", "arguments": {"x": _MARK}}
        call = {"type": "function", "id": "a23456789", "function": function}
        closing = []
        for reply in ({"content": _MARK}, {"content": "", "tool_calls": [call]}):
            asked = {"role": "user", "content": "."}
            try:
                text = self._text([asked, {"role": "assistant", **reply}])
            except ValueError:  # a template without tool calls may refuse them
                continue
            _, mark, behind = text.rpartition(_MARK)
            places = {behind.rfind(token): id for token, id in self._special.items()}
            places.pop(-1, None)
            closing += [places[max(places)]] if mark and places else []
        return closing

    def _renderable(
        self, parsed: ParsedResponse, text: str, tools: Sequence[ToolSpec] | None
    ) -> ParsedResponse:
        """A reply that the template refuses, as two calls at once, is a faulty one instead."""
        asked = {"role": "user", "content": "."}
        try:
            self._text([asked, parsed.message()], tools)
            return parsed
        except ValueError as error:
            fault = parsed.fault or f"The reply does not fit: {error!s:.200}."
        plain = text.encode(errors="replace").decode()
        for token in self._special:
            plain = plain.replace(token, "")
        return ParsedResponse(plain, fault=fault)


class PackageRenderer:
    """A renderer of the `renderers` package in the place of a `ChatRenderer`."""

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer
        self.get_stop_token_ids = renderer.get_stop_token_ids

    def render_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSpec] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """The ids of a conversation."""
        return self.renderer.render_ids(
            list(messages), tools=tools, add_generation_prompt=add_generation_prompt
        )

    def parse_response(
        self,
        ids: Sequence[int],
        *,
        tools: Sequence[ToolSpec] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedResponse:
        """The message that sampled `ids` mean; a call that the package could not read is a
        fault."""
        prompt = None if prompt_ids is None else list(prompt_ids)
        parsed = self.renderer.parse_response(list(ids), tools=tools, prompt_ids=prompt)
        schemas, calls = parameters_of(tools), []
        try:
            for place, call in enumerate(parsed.tool_calls):
                if call.status != "ok":
                    raise ValueError(f"The tool call is faulty ({call.status}): {call.raw:.200}")
                calls.append(checked(vars(call), schemas, place))
        except ValueError as error:
            return ParsedResponse(parsed.content, parsed.reasoning_content, fault=str(error))
        return ParsedResponse(parsed.content, parsed.reasoning_content, tuple(calls))

    def bridge_to_next_turn(
        self,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSpec] | None = None,
        messages: Sequence[Message] = (),
    ) -> list[int] | None:
        """The next prompt, or None where the package begins it anew or changes the tokens."""
        sampled = [*prompt_ids, *ids]
        prompt, reply = list(prompt_ids), list(ids)
        bridge = self.renderer.bridge_to_next_turn(prompt, reply, list(new_messages), tools=tools)
        if bridge is None or bridge.token_ids[: len(sampled)] != sampled:
            return None
        return bridge.token_ids
