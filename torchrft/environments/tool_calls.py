"""What a sampled reply says: its thinking, its text and its tool calls, by the model's family.

A reply that tries to call a tool and fails is no exception: `ParsedResponse.fault` says in one
sentence what is wrong, and the text stays the message's content.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrft.environments.protocol import ParsedResponse, ToolSpec

Parameters = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""


@dataclass
class Reply:
    """The parts of a reply; a call is a mapping with `name` and `arguments`, and perhaps `id`."""

    content: str
    reasoning: str | None = None
    calls: list[Mapping[str, Any]] = field(default_factory=list)


Parser = Callable[[str, Parameters], Reply]
"""Reads a reply without its thinking; raises ValueError for a malformed call."""


def parser_for(chat_template: str) -> Parser:
    """The parser of the family whose tool calls a chat template writes."""
    for mark, parser in _FAMILIES.items():
        if mark in chat_template:
            return parser
    return _plain


def parse(
    text: str, parser: Parser, tools: Sequence[ToolSpec] | None = None, thinks: bool = False
) -> ParsedResponse:
    """The message that `text` means; never raises for what a policy may sample.

    `thinks`: the prompt ends inside the thinking. Without tools, text that looks like a call is
    text: an environment may have its own way of tools.
    """
    thought, rest = (None, text) if parser is _harmony else split_thinking(text, thinks)
    schemas = parameters_of(tools)
    try:
        reply = parser(rest, schemas) if schemas or parser is _harmony else Reply(rest)
        thought = reply.reasoning if thought is None else thought
        calls = tuple(checked(call, schemas, place) for place, call in enumerate(reply.calls))
    except RecursionError:
        return ParsedResponse(rest, thought, fault="The tool call is nested too deeply.")
    except ValueError as error:
        return ParsedResponse(rest, thought, fault=str(error))
    return ParsedResponse(reply.content, thought, calls)


def parse_by_tokenizer(
    tokenizer: Any, text: str, before: str, tools: Sequence[ToolSpec] | None = None
) -> ParsedResponse:
    """Like `parse`, by the tokenizer's own `response_template`; the prompt `before` goes with it.

    `text` has what ended the reply.
    """
    schemas = parameters_of(tools)
    try:
        message = tokenizer.parse_response(text, prefix=before, tools=list(tools or ()))
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        whole = tuple(checked(call, schemas, place) for place, call in enumerate(calls))
    except Exception as error:  # a response template raises what it likes
        return ParsedResponse(text, fault=str(error) or type(error).__name__)
    thought = message.get("reasoning_content") or message.get("thinking")
    return ParsedResponse(message.get("content") or "", thought, whole)


def split_thinking(text: str, thinks: bool = False) -> tuple[str | None, str]:
    """The thinking between `<think>` and `</think>`, without the line breaks around it, and the
    rest; thinking that is not closed goes to the end."""
    opened = text.lstrip().startswith("<think>")
    before, closed, rest = text.partition("</think>")
    if not (opened or thinks):
        return None, text
    thought = before.lstrip().removeprefix("<think>") if opened else before
    return thought.strip("\n"), rest.lstrip("\n") if closed else ""


def parameters_of(tools: Sequence[ToolSpec] | None) -> Parameters:
    """The schemas of the tools' arguments; a tool's function may lie in `function` or be flat."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def checked(call: Mapping[str, Any], schemas: Parameters, place: int = 0) -> dict[str, Any]:
    """A call in the form that chat templates take; ValueError says what is wrong with it.

    Its id, if the reply has none, follows from the call: nine letters, which Mistral insists on.
    """
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError("The tool call has no name.")
    if name not in schemas:
        raise ValueError(
            f"There is no tool {name!r:.100}; there are: {', '.join(schemas) or 'none'}."
        )
    if not isinstance(arguments, Mapping):
        raise ValueError(f"The arguments of {name} are not a JSON object.")
    try:
        text = json.dumps([place, name, arguments], allow_nan=False)
    except ValueError:
        raise ValueError(f"The arguments of {name} have a number that is not finite.") from None
    if fault := misfit(arguments, {"additionalProperties": False, **schemas[name]}, name):
        raise ValueError(fault)
    own = call.get("id")
    ident = own if isinstance(own, str) and own else hashlib.sha256(text.encode()).hexdigest()[:9]
    function = {"name": name, "arguments": dict(arguments)}
    return {"type": "function", "id": ident, "function": function}


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, Mapping),
    "null": lambda value: value is None,
}


def _types(schema: Mapping[str, Any]) -> list[str]:
    """The names of the types that a schema allows; none if it names none."""
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def misfit(value: Any, schema: Any, where: str) -> str | None:
    """The sentence that says why a value does not fit a JSON schema, or None if it fits.

    Looks at type, enum, required, properties, additionalProperties, items and anyOf.
    """
    if not isinstance(schema, Mapping):
        return None
    if choices := schema.get("anyOf"):
        faults = [misfit(value, choice, where) for choice in choices]
        return None if None in faults else faults[0]
    kinds = [kind for kind in _types(schema) if kind in _TYPES]
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        return f"{where} must be of the type {' or '.join(kinds)}, but is {_shown(value)}."
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {_shown(schema['enum'])}, but is {_shown(value)}."
    faults = []
    if isinstance(value, Mapping):
        inner: Mapping[str, Any] = schema.get("properties") or {}
        missing = [name for name in schema.get("required") or () if name not in value]
        unknown = [name for name in value if name not in inner]
        if missing:
            return f"{where} lacks {missing[0]!r}."
        if unknown and schema.get("additionalProperties") is False:
            return f"{where} does not take {unknown[0]!r:.100}."
        given = [name for name in inner if name in value]
        faults = [misfit(value[name], inner[name], f"{where}.{name}") for name in given]
    elif isinstance(value, list):
        faults = [
            misfit(each, schema.get("items"), f"{where}[{n}]") for n, each in enumerate(value)
        ]
    return next((fault for fault in faults if fault), None)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:100]


def _json_at(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and what follows it without spaces before."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
    except ValueError as error:
        raise ValueError(f"The tool call is not valid JSON: {error}.") from None
    return value, text.lstrip()[end:].lstrip()


def _call(value: Any, arguments: str = "arguments") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("The tool call is not a JSON object.")
    return {**value, "arguments": value.get(arguments, value.get("arguments"))}


def _plain(text: str, schemas: Parameters) -> Reply:
    """A family without tool calls."""
    return Reply(text)


def _tagged(text: str, read: Callable[[str], tuple[Mapping[str, Any], str]]) -> Reply:
    """Calls between <tool_call> and </tool_call>; `read` takes one off the front of a text."""
    content, tag, rest = text.partition("<tool_call>")
    reply = Reply(content.removesuffix("\n") if tag else content)
    while tag:
        call, rest = read(rest)
        reply.calls.append(call)
        if not rest.startswith("</tool_call>"):
            raise ValueError("The tool call is not followed by </tool_call>.")
        behind, tag, rest = rest.removeprefix("</tool_call>").partition("<tool_call>")
        reply.content += behind if behind.strip() else ""
    return reply


def _hermes(text: str, schemas: Parameters) -> Reply:
    """Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

    def read(rest: str) -> tuple[Mapping[str, Any], str]:
        value, rest = _json_at(rest)
        return _call(value), rest

    return _tagged(text, read)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _coder(text: str, schemas: Parameters) -> Reply:
    """Qwen3-Coder and Qwen3.5: `<function=name><parameter=key>value</parameter></function>`."""

    def value_of(name: str, key: str, text: str) -> Any:
        schema = (schemas.get(name, {}).get("properties") or {}).get(key) or {}
        if "string" in _types(schema):
            return text
        try:
            return json.loads(text)
        except ValueError:
            return text

    def read(rest: str) -> tuple[Mapping[str, Any], str]:
        function = _FUNCTION.match(rest)
        if not function or _PARAMETER.sub("", function[2]).strip():
            raise ValueError("The tool call is not <function=...> with <parameter=...> inside.")
        name, pairs = function[1], _PARAMETER.findall(function[2])
        arguments = {key: value_of(name, key, value) for key, value in pairs}
        return {"name": name, "arguments": arguments}, rest[function.end() :]

    return _tagged(text, read)


_LLAMA = re.compile(r"\s*(?:<\|python_tag\|>|(?=\{\s*\"name\"))")


def _llama(text: str, schemas: Parameters) -> Reply:
    """Llama 3: a reply that is nothing but `{"name": ..., "parameters": ...}`; several by `;`."""
    mark = _LLAMA.match(text)
    if not mark:
        return Reply(text)
    reply, rest = Reply(""), text[mark.end() :]
    while rest:
        value, rest = _json_at(rest)
        reply.calls.append(_call(value, "parameters"))
        if rest and not rest.startswith(";"):
            raise ValueError("There is text behind the tool call.")
        rest = rest.removeprefix(";").lstrip()
    return reply


_ARGS = re.compile(r"\s*([^\s\[\]{}]+)(?:\[CALL_ID\](\w+))?\[ARGS\]")


def _mistral(text: str, schemas: Parameters) -> Reply:
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": ...}]` or `[TOOL_CALLS]name[ARGS]{...}`."""
    content, tag, rest = text.partition("[TOOL_CALLS]")
    reply = Reply(content)
    if rest.lstrip().startswith("["):
        values, rest = _json_at(rest)
        reply.calls += map(_call, values)
        tag = ""
    while tag:
        head = _ARGS.match(rest)
        if not head:
            raise ValueError("[TOOL_CALLS] is not followed by a list or by a name and [ARGS].")
        value, rest = _json_at(rest[head.end() :])
        reply.calls.append({"name": head[1], "id": head[2], "arguments": value})
        tag = "[TOOL_CALLS]" if rest.startswith("[TOOL_CALLS]") else ""
        rest = rest.removeprefix(tag)
    if reply.calls and rest:
        raise ValueError("There is text behind the tool call.")
    return reply


_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_ENDS = re.compile(r"<\|(?:end|call|return)\|>$")


def _harmony(text: str, schemas: Parameters) -> Reply:
    """gpt-oss: messages on channels; analysis is thinking, a message to `functions.x` a call."""
    reply = Reply("")
    for place, part in enumerate(text.split("<|start|>")):
        head, mark, body = part.partition("<|message|>")
        if not mark or (place and not head.startswith("assistant")):
            raise ValueError("The reply is not in the form <|channel|>...<|message|>...")
        body = _ENDS.sub("", body)
        recipient = _RECIPIENT.search(head)
        if recipient:
            value, rest = _json_at(body)
            if rest:
                raise ValueError("There is text behind the tool call.")
            name = recipient[1].removeprefix("functions.")
            reply.calls.append({"name": name, "arguments": value})
        elif "<|channel|>analysis" in head:
            reply.reasoning = body if reply.reasoning is None else f"{reply.reasoning}\n{body}"
        else:
            reply.content += body
    return reply


# By what the chat template has of a family alone; the first that is found counts.
_FAMILIES: Mapping[str, Parser] = {
    "<|channel|>": _harmony,
    "[TOOL_CALLS]": _mistral,
    "<function=": _coder,
    "<tool_call>": _hermes,
    '"parameters": ': _llama,
}
