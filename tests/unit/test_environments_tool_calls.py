"""Thinking, text and tool calls of a sampled reply, family by family, and what is wrong with it."""

import json

import chat_families
import pytest
from chat_families import TOOLS

from torchrft.environments.renderer import ChatRenderer
from torchrft.environments.tool_calls import misfit, parse, parser_for, split_thinking

ROME = {"place": "Rome"}


def read(family, text, tools=TOOLS, thinks=False):
    return parse(text, parser_for(chat_families.chat_template(family)), tools, thinks)


def calls(parsed):
    return [(each["function"]["name"], each["function"]["arguments"]) for each in parsed.tool_calls]


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=place>\nRome\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n<parameter=hours>\n[1, 2.5]\n</parameter>\n"
    "</function>\n</tool_call>"
)
LLAMA = '{"name": "weather", "parameters": {"place": "Rome"}}'
NEMO = '[TOOL_CALLS][{"name": "weather", "arguments": {"place": "Rome"}, "id": "abcdefghi"}]'
HARMONY = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
ROLE_FIRST = ' to=functions.weather<|channel|>commentary json<|message|>{"place": "Rome"}<|call|>'


@pytest.mark.parametrize(
    ("family", "text", "content", "expected"),
    [
        ("qwen2_5", HERMES, "", [ROME]),
        ("qwen2_5", f"I look.\n{HERMES}\n{HERMES}", "I look.", [ROME, ROME]),
        ("qwen2_5", f"{HERMES} So.", " So.", [ROME]),
        (
            "qwen2_5",
            '<tool_call>{"name": "weather", "arguments": {"place": "</tool_call>"}}</tool_call>',
            "",
            [{"place": "</tool_call>"}],
        ),
        ("qwen3_5", CODER, "", [{"place": "Rome", "days": 3, "hours": [1, 2.5]}]),
        (
            "qwen3_5",
            CODER.replace("Rome", "12\n13").replace("days>\n3", "days>\n 3 "),
            "",
            [{"place": "12\n13", "days": 3, "hours": [1, 2.5]}],
        ),
        ("llama3", LLAMA, "", [ROME]),
        ("llama3", f"<|python_tag|>{LLAMA}", "", [ROME]),
        ("llama3", '{"temperature": 20}', '{"temperature": 20}', []),
        ("llama3", f"It is {LLAMA}", f"It is {LLAMA}", []),
        ("mistral", NEMO, "", [ROME]),
        ("mistral", f"Wait.{NEMO[:-1]}, {NEMO[13:]}", "Wait.", [ROME, ROME]),
        ("mistral", '[TOOL_CALLS]weather[ARGS]{"place": "Rome"}' * 2, "", [ROME, ROME]),
        ("mistral", '[TOOL_CALLS]weather[CALL_ID]a1[ARGS]{"place": "Rome"}', "", [ROME]),
        ("gpt_oss", HARMONY + '{"place": "Rome"}', "", [ROME]),
        ("gpt_oss", ROLE_FIRST, "", [ROME]),
        ("gpt_oss", "<|channel|>final<|message|>Sunny.", "Sunny.", []),
        ("chatml", HERMES, HERMES, []),
        ("qwen2_5", "Sunny.", "Sunny.", []),
    ],
)
def test_calls_of_the_families(family, text, content, expected):
    parsed = read(family, text)
    assert parsed.fault is None
    assert parsed.content == content
    assert calls(parsed) == [("weather", arguments) for arguments in expected]


def test_a_call_is_as_templates_take_it():
    (call,) = read("mistral", NEMO).tool_calls
    function = {"name": "weather", "arguments": ROME}
    assert call == {"type": "function", "id": "abcdefghi", "function": function}


def test_calls_without_ids_get_nine_letters_that_follow_from_the_call():
    first, second = (each["id"] for each in read("qwen2_5", HERMES * 2).tool_calls)
    assert first.isalnum()
    assert len(first) == len(second) == 9
    assert first != second
    assert first == read("qwen2_5", HERMES).tool_calls[0]["id"]


@pytest.mark.parametrize(
    ("family", "text", "fault"),
    [
        ("qwen2_5", '<tool_call>{"name": "weather"', "not valid JSON"),
        ("qwen2_5", HERMES.removesuffix("</tool_call>"), "not followed by </tool_call>"),
        ("qwen2_5", "<tool_call>[1]</tool_call>", "not a JSON object"),
        ("qwen2_5", "<tool_call>{}</tool_call>", "There is no tool null; there are: weather."),
        (
            "qwen2_5",
            HERMES.replace("weather", "fly"),
            'There is no tool "fly"; there are: weather.',
        ),
        ("qwen2_5", HERMES.replace('{"place": "Rome"}', '"Rome"'), "of the type object"),
        ("qwen2_5", HERMES.replace("place", "city"), "place is missing"),
        ("qwen2_5", HERMES.replace('"Rome"', "3"), "place must be of the type string, but is 3"),
        ("qwen2_5", HERMES.replace('"Rome"', '"Rome", "to": 1'), '"to" is unknown'),
        ("qwen2_5", HERMES.replace('"Rome"', '"Rome", "days": true'), "of the type integer"),
        ("qwen2_5", HERMES.replace('"Rome"', '"Rome", "units": "K"'), 'must be one of ["C", "F"]'),
        ("qwen2_5", HERMES.replace('"Rome"', '"Rome", "hours": [1, "2"]'), "a part of hours"),
        ("qwen2_5", HERMES.replace('"Rome"', '"Rome", "hours": [1e999]'), "not JSON compliant"),
        ("qwen2_5", f"<tool_call>{'[' * 100_000}", "recursion"),
        ("qwen3_5", CODER.replace("<parameter=place>", "<place>"), "beside <parameter=...>"),
        ("qwen3_5", CODER.replace("3\n</p", "three\n</p"), "not valid JSON"),
        ("qwen3_5", CODER.removesuffix("</tool_call>"), "not followed by </tool_call>"),
        ("llama3", f"{LLAMA}; {LLAMA}", "text behind"),
        ("llama3", '<|python_tag|>search.call(query="x")', "not valid JSON"),
        ("mistral", "[TOOL_CALLS]weather(Rome)", "not valid JSON"),
        ("mistral", f"{NEMO} Sunny.", "text behind"),
        ("gpt_oss", HARMONY + '{"place": ', "not valid JSON"),
        ("gpt_oss", "Sunny.", "not in the form <|channel|>"),
        (
            "gpt_oss",
            "<|channel|>final<|message|>a<|end|><|start|>user<|message|>b",
            "not in the form",
        ),
    ],
)
def test_faults(family, text, fault):
    parsed = read(family, text)
    assert fault in parsed.fault
    assert parsed.tool_calls == ()
    assert parsed.content == text


def test_families_that_are_not_known():
    for text in ("<tool_call>name\n<arg_key>", "<TOOLCALL>", '{"name": "", "parameters": ', ""):
        assert parser_for(text) is None
    assert parser_for("<tool_call>\n{}</tool_call>") is not None


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3_5", "mistral", "llama3"])
def test_without_tools_a_call_is_text(family):
    text = {"qwen2_5": HERMES, "qwen3_5": CODER, "mistral": NEMO, "llama3": LLAMA}[family]
    parsed = read(family, text, tools=None)
    assert (parsed.content, parsed.tool_calls, parsed.fault) == (text, (), None)


def test_thinking():
    assert split_thinking("<think>\na\n</think>\n\nb") == ("a", "b")
    assert split_thinking("\n<think>a</think>b") == ("a", "b")
    assert split_thinking("a\n</think>\n\nb", thinks=True) == ("a", "b")
    assert split_thinking("a</think>b") == (None, "a</think>b")
    assert split_thinking("<think>a") == ("a", "")
    assert split_thinking("a", thinks=True) == ("a", "")
    parsed = read("qwen3", f"<think>\nHm.\n</think>\n\n{HERMES}")
    assert (parsed.reasoning_content, calls(parsed)) == ("Hm.", [("weather", ROME)])
    parsed = read("qwen3", "<think>Hm.</think><tool_call>")
    assert (parsed.reasoning_content, parsed.content) == ("Hm.", "<tool_call>")
    assert parsed.fault
    # A call inside the thinking is a thought.
    assert read("qwen3", f"<think>{HERMES}").tool_calls == ()


def test_channels():
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    parsed = read("gpt_oss", text + HARMONY + json.dumps(ROME))
    assert (parsed.reasoning_content, parsed.content) == ("Hm.", "")
    assert calls(parsed) == [("weather", ROME)]
    parsed = read("gpt_oss", text * 2 + "<|channel|>final<|message|>Sunny.", tools=None)
    assert (parsed.reasoning_content, parsed.content) == ("Hm.\nHm.", "Sunny.")


def test_misfits():
    schema = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert misfit(None, schema) is None
    assert misfit("a", schema, "x") == 'x must be of the type integer, but is "a"'
    assert misfit("a", {"type": ["string", "null"]}) is None
    assert misfit(1, {"type": "number"}) is None
    assert misfit(True, {"type": ["number", "string"]}, "x").startswith("x must be")
    assert misfit(True, {"type": "boolean"}) is None
    assert misfit({"a": 1}, {"type": "object"}) is None
    nested = {"properties": {"a": {"properties": {"b": {"type": "string"}}}}}
    assert misfit({"a": {"b": 1}}, nested) == "b must be of the type string, but is 1"
    assert misfit(1, {"type": "of another schema"}) is None


def test_the_tokenizers_own_response_template():
    tokenizer = chat_families.tokenizer("qwen2_5")
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "[[", "close": "]]", "content": "text"},
            "tool_calls": {
                "open": "<<",
                "close": ">>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>", "content": "text"},
        },
    }
    renderer = ChatRenderer(tokenizer)

    def parsed(text):
        return renderer.parse_response(tokenizer.encode(text), tools=TOOLS)

    reply = parsed(
        '[[Hm.]]I look.<<{"name": "weather", "arguments": {"place": "Rome"}}>><|im_end|>'
    )
    assert (reply.content, reply.reasoning_content) == ("I look.", "Hm.")
    assert calls(reply) == [("weather", ROME)]
    assert parsed("Sunny.<|im_end|>").content == "Sunny."
    assert "cannot be read" in parsed('<<{"name": ]>><|im_end|>').fault
    assert "no tool" in parsed('<<{"name": "fly", "arguments": {}}>><|im_end|>').fault
