"""What a sampled reply says: its thinking, its text and its tool calls, by the model's family.

A reply that tries to call a tool and fails is no exception: `ParsedResponse.fault` says in one
sentence what is wrong, and the text stays the message's content.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torchrft.environments.protocol import ParsedResponse, Tools

Call = Mapping[str, Any]
"""A call as it was sampled: `name`, `arguments` and perhaps `id`, none of them checked."""

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""

Reader = Callable[[Schemas], ParsedResponse]

Parser = Callable[[str, Schemas], ParsedResponse]
"""Reads a reply behind its thinking, the calls unchecked; raises ValueError for a malformed one."""


def parse(text: str, parser: Parser | None, tools: Tools, thinks: bool = False) -> ParsedResponse:
    """The message that `text` means; never raises for what a policy may sample.

    `thinks`: the prompt ends inside the thinking. Without tools or a parser, text that looks like
    a call is text: an environment may have its own way of tools.
    """
    if parser is _harmony:  # its thinking has a channel of its own
        return check_reply(text, tools, partial(parser, text))
    thought, rest = split_thinking(text, thinks)
    if parser is None or not tools:
        return ParsedResponse(rest, thought)
    reply = check_reply(rest, tools, partial(parser, rest))
    return replace(reply, reasoning_content=thought)


def check_reply(text: str, tools: Tools, read: Reader) -> ParsedResponse:
    """What `read` makes of a reply, its calls checked; a faulty reply keeps its `text`."""
    functions = [tool.get("function", tool) for tool in tools or ()]
    schemas = {function["name"]: function.get("parameters") or {} for function in functions}
    try:
        reply = read(schemas)
        calls = [checked(call, schemas, place) for place, call in enumerate(reply.tool_calls)]
    except (ValueError, RecursionError) as error:  # JSON may be nested too deeply
        return ParsedResponse(text, fault=str(error))
    return replace(reply, tool_calls=tuple(calls))


def parse_by_tokenizer(tokenizer: Any, text: str, before: str, tools: Tools) -> ParsedResponse:
    """Like `parse`, by the tokenizer's own `response_template`; the prompt `before` goes with it.

    `text` has the token that ended the reply.
    """

    def read(schemas: Schemas) -> ParsedResponse:
        try:
            message = tokenizer.parse_response(text, prefix=before, tools=list(tools or ()))
            calls = tuple(call["function"] for call in message.get("tool_calls") or ())
        except Exception as error:  # a response template raises what it likes
            raise ValueError(f"The reply cannot be read: {error!s:.200}") from None
        thought = message.get("reasoning_content") or message.get("thinking")
        return ParsedResponse(message.get("content") or "", thought, calls)

    return check_reply(text, tools, read)


def split_thinking(text: str, thinks: bool = False) -> tuple[str | None, str]:
    """The thinking between `<think>` and `</think>`, without the line breaks around it, and the
    rest; thinking that is not closed goes to the end."""
    bare = text.lstrip()
    if not (thinks or bare.startswith("<think>")):
        return None, text
    thought, _, rest = bare.removeprefix("<think>").partition("</think>")
    return thought.strip("\n"), rest.lstrip("\n")


def checked(call: Call, schemas: Schemas, place: int = 0) -> dict[str, Any]:
    """A call in the form that chat templates take; ValueError says what is wrong with it.

    Its id, if the reply has none, follows from the call: nine letters, which Mistral insists on.
    """
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or name not in schemas:
        raise ValueError(f"There is no tool {_shown(name)}; there are: {', '.join(schemas)}.")
    fault = misfit(arguments, {"type": "object", "additionalProperties": False, **schemas[name]})
    if fault:
        raise ValueError(f"The arguments of {name} do not fit: {fault}.")
    text = json.dumps([place, name, arguments], allow_nan=False)  # a ValueError for infinities
    ident = call.get("id") or hashlib.sha256(text.encode()).hexdigest()[:9]
    return {"type": "function", "id": ident, "function": {"name": name, "arguments": arguments}}


_TYPES: dict[str, Any] = {"string": str, "boolean": bool, "array": list, "object": dict}
_TYPES |= {"integer": int, "number": (int, float), "null": type(None)}


def _types(schema: Mapping[str, Any]) -> list[str]:
    """The names of the types that a schema allows; none if it names none."""
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def misfit(value: Any, schema: Mapping[str, Any] | None, where: str = "the object") -> str | None:
    """Why a value does not fit a JSON schema, or None if it fits.

    Looks at type, enum, required, properties, additionalProperties, items and anyOf.
    """
    schema = schema or {}
    kinds, choices = _types(schema), schema.get("anyOf")
    if choices and all(misfit(value, choice, where) for choice in choices):
        return misfit(value, choices[0], where)
    fits = [isinstance(value, _TYPES.get(kind, object)) for kind in kinds]
    if kinds and (not any(fits) or (isinstance(value, bool) and "boolean" not in kinds)):
        return f"{where} must be of the type {' or '.join(kinds)}, but is {_shown(value)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {_shown(schema['enum'])}, but is {_shown(value)}"
    faults: list[str | None] = []
    if isinstance(value, dict):
        known = schema.get("properties") or {}
        faults = [f"{name} is missing" for name in schema.get("required", ()) if name not in value]
        if schema.get("additionalProperties") is False:
            faults += [f"{_shown(name)} is unknown" for name in value if name not in known]
        faults += [misfit(value[name], known[name], name) for name in known if name in value]
    elif isinstance(value, list):
        faults = [misfit(each, schema.get("items"), f"a part of {where}") for each in value]
    return next((fault for fault in faults if fault), None)


def _shown(value: Any) -> str:
    return json.dumps(value)[:100]


def _json_at(text: str, nothing_else: bool = False) -> tuple[Any, str]:
    """The JSON value that a text begins with, and what follows it without spaces before."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except ValueError as error:
        raise ValueError(f"The tool call is not valid JSON: {error}.") from None
    if nothing_else and text[end:].strip():
        raise ValueError("There is text behind the tool call.")
    return value, text[end:].lstrip()


def _call(value: Any) -> Call:
    if not isinstance(value, dict):
        raise ValueError("The tool call is not a JSON object.")
    return {**value, "arguments": value.get("arguments", value.get("parameters"))}


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _qwen(text: str, schemas: Schemas) -> ParsedResponse:
    """Hermes, Qwen2.5 and Qwen3: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, and
    with a function's and parameters' tags in place of the JSON, Qwen3-Coder and Qwen3.5."""
    content, tag, rest = text.partition("<tool_call>")
    content, calls = content.removesuffix("\n") if tag else content, []
    while tag:
        if function := _FUNCTION.match(rest):
            calls.append(_tagged_call(function[1], function[2], schemas))
            rest = rest[function.end() :]
        else:
            value, rest = _json_at(rest)
            calls.append(_call(value))
        if not rest.startswith("</tool_call>"):
            raise ValueError("The tool call is not followed by </tool_call>.")
        behind, tag, rest = rest.removeprefix("</tool_call>").partition("<tool_call>")
        content += behind if behind.strip() else ""
    return ParsedResponse(content, tool_calls=tuple(calls))


def _tagged_call(name: str, text: str, schemas: Schemas) -> Call:
    if _PARAMETER.sub("", text).strip():
        raise ValueError("The tool call has something beside <parameter=...>...</parameter>.")
    arguments: dict[str, Any] = dict(_PARAMETER.findall(text))
    known = schemas.get(name, {}).get("properties") or {}
    for key in arguments:
        if "string" not in _types(known.get(key, {})):
            arguments[key], _ = _json_at(arguments[key], nothing_else=True)
    return {"name": name, "arguments": arguments}


_LLAMA = re.compile(r"\s*(?:<\|python_tag\|>|(?=\{\s*\"name\"))")


def _llama(text: str, schemas: Schemas) -> ParsedResponse:
    """Llama 3: a reply that is nothing but `{"name": ..., "parameters": ...}`."""
    mark = _LLAMA.match(text)
    if not mark:
        return ParsedResponse(text)
    value, _ = _json_at(text[mark.end() :], nothing_else=True)
    return ParsedResponse("", tool_calls=(_call(value),))


_NAME = re.compile(r"\s*([^\s\[\]{}]+)(?:\[CALL_ID\](\w+))?\[ARGS\]")


def _mistral(text: str, schemas: Schemas) -> ParsedResponse:
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": ...}]` or `[TOOL_CALLS]name[ARGS]{...}`."""
    content, *parts = text.split("[TOOL_CALLS]")
    calls: list[Call] = []
    for part in parts:
        name = _NAME.match(part)
        value, _ = _json_at(part[name.end() :] if name else part, nothing_else=True)
        if name:
            calls.append({"name": name[1], "id": name[2], "arguments": value})
        else:
            calls += map(_call, value if isinstance(value, list) else [value])
    return ParsedResponse(content, tool_calls=tuple(calls))


_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_ENDS = re.compile(r"<\|(?:end|call|return)\|>$")


def _harmony(text: str, schemas: Schemas) -> ParsedResponse:
    """gpt-oss: messages on channels; analysis is thinking, a message to `functions.x` a call."""
    content, thoughts, calls = "", [], []
    for place, part in enumerate(text.split("<|start|>")):
        head, mark, body = part.partition("<|message|>")
        if not mark or (place and not head.startswith("assistant")):
            raise ValueError("The reply is not in the form <|channel|>...<|message|>...")
        body = _ENDS.sub("", body)
        if recipient := _RECIPIENT.search(head):
            value, _ = _json_at(body, nothing_else=True)
            calls.append({"name": recipient[1], "arguments": value})
        elif "<|channel|>analysis" in head:
            thoughts.append(body)
        else:
            content += body
    return ParsedResponse(content, "\n".join(thoughts) if thoughts else None, tuple(calls))


# By a pattern that only a family's chat templates have; the first that is found counts.
_FAMILIES: Mapping[str, Parser] = {
    r"<\|channel\|>": _harmony,
    r"\[TOOL_CALLS\]": _mistral,
    r"\A(?!.*<arg_key>).*<tool_call>": _qwen,
    r'<\|start_header_id\|>.*"parameters": ': _llama,
}


def parser_for(chat_template: str) -> Parser | None:
    """The parser of the family whose tool calls a chat template writes, if it is a known one."""
    found = (mark for mark in _FAMILIES if re.search(mark, chat_template, re.DOTALL))
    return next((_FAMILIES[mark] for mark in found), None)
