"""What a template writes behind a reply, without a sampled token that is encoded again."""

import os
import random

import chat_families
import pytest
from chat_families import TOOLS

from torchrft.environments.renderer import ChatRenderer

FAMILIES = list(chat_families.SPECIAL)
WITH_TOOLS = [family for family in FAMILIES if family != "chatml"]
EXAMPLES = int(os.environ.get("RENDERER_EXAMPLES", "150"))
ASKED = {"role": "user", "content": "Weather in Rome?"}
NEXT = {"role": "user", "content": "And in Oslo?"}
FOUND = {"role": "tool", "content": "20 °C"}


@pytest.fixture(scope="module")
def renderers():
    return {family: ChatRenderer(chat_families.tokenizer(family)) for family in FAMILIES}


def call(**arguments):
    function = {"name": "weather", "arguments": arguments}
    return {"type": "function", "id": "abcdefghi", "function": function}


def written(renderer, messages, reply, tools):
    """The ids of a reply as the template writes it, with its stop token, behind the prompt."""
    before = renderer._text(messages, tools, prompt=True)
    whole = renderer._text([*messages, reply], tools)
    if not whole.startswith(before):
        return None
    ids = renderer.tokenizer(whole[len(before) :], add_special_tokens=False).input_ids
    stops = renderer.get_stop_token_ids()
    return ids[: max(place for place, token in enumerate(ids) if token in stops) + 1]


class Conversation:
    """A conversation that a random policy and a random environment hold."""

    def __init__(self, renderer, family, chance):
        self.renderer, self.family, self.chance = renderer, family, chance
        self.tools = TOOLS if family != "chatml" and chance.random() < 0.7 else None
        self.messages = [{"role": "system", "content": "Be brief."}] * (chance.random() < 0.4)
        self.messages.append({"role": "user", "content": self.text()})
        self.prompt = self.rendered()

    def rendered(self):
        return self.renderer.render_ids(self.messages, tools=self.tools, add_generation_prompt=True)

    def text(self):
        pieces = [
            "a",
            "in",
            " the",
            "\n",
            "é",
            "漢字",
            "😀",
            "{",
            '"',
            "\\",
            " ",
            "1",
            "</",
            "[",
            "]",
        ]
        return "w" + "".join(self.chance.choices(pieces, k=self.chance.randrange(8))) + "x"

    def canonical(self):
        """A message as its family would say it, and its ids."""
        chance = self.chance
        message = {"role": "assistant", "content": self.text()}
        if chance.random() < 0.5 and self.family in ("qwen3", "qwen3_5", "gpt_oss"):
            message["reasoning_content"] = self.text()
        if self.tools and chance.random() < 0.6:
            single = self.family in ("llama3", "gpt_oss")
            calls = [call(place=self.text()) for _ in range(1 if single else chance.randint(1, 2))]
            message["tool_calls"] = calls
            if self.family in ("llama3", "gpt_oss", "mistral") or chance.random() < 0.5:
                message["content"] = ""
        return message, written(self.renderer, self.messages, message, self.tools)

    def noise(self):
        """Ids that no tokenizer would make of a text, and calls that go wrong."""
        chance, encode = self.chance, self.renderer.tokenizer.encode
        stops = set(self.renderer.get_stop_token_ids())
        size = len(self.renderer.tokenizer)
        some = [id for id in range(size) if id not in stops]
        tags = ["<tool_call>", "[TOOL_CALLS]", '{"name": "weather"', "</tool_call>", "<think>"]
        tags += ["</think>", "<|channel|>analysis<|message|>", "<|start|>", "<|python_tag|>"]
        tags += [
            '{"name": "weather", "arguments": {"place": "\\ud800"}}',
            "[ARGS]",
            "{}",
            "[[[" * 9,
        ]
        tags += ["<function=weather>", "\n", "<|im_start|>user\n", " to=functions.weather"]
        ids = []
        for _ in range(chance.randrange(6)):
            odd = chance.random() < 0.5
            ids += chance.choices(some, k=4) if odd else encode(chance.choice(tags))
        return [id for id in ids if id not in stops]

    def sampled(self):
        """The message if it is canonical, and the ids with or without one of the stop tokens."""
        message, ids = self.canonical()
        if ids is None or self.chance.random() < 0.4:
            message, ids = None, self.noise()
            ids += self.chance.choice([[], *([id] for id in self.renderer.get_stop_token_ids())])
        elif self.chance.random() < 0.2:
            message, ids = None, ids[: self.chance.randrange(len(ids))]
        return message, ids

    def answer(self, parsed):
        if parsed.tool_calls:
            return [{"role": "tool", "content": self.text()} for _ in parsed.tool_calls]
        as_tool = self.family.startswith("qwen") and self.chance.random() < 0.3
        return [{"role": "tool" if as_tool else "user", "content": self.text()}]

    def turn(self):
        """One turn's checks; whether the prompt went on."""
        renderer, tools = self.renderer, self.tools
        message, ids = self.sampled()
        parsed = renderer.parse_response(ids, tools=tools, prompt_ids=self.prompt)
        before = renderer._text(self.messages, tools, prompt=True)
        self.messages.append(parsed.message())
        new = self.answer(parsed)
        bridged = renderer.bridge_to_next_turn(
            self.prompt, ids, new, tools=tools, messages=self.messages
        )
        self.messages += new
        if message is not None:
            assert parsed.fault is None
            assert parsed.content.strip() == message["content"].strip()
            calls = [each["function"] for each in message.get("tool_calls", ())]
            assert [each["function"] for each in parsed.tool_calls] == calls
            text = renderer._text(self.messages, tools, prompt=True)
            sampled = before + renderer.tokenizer.decode(ids)
            assert (bridged is not None) == text.startswith(sampled)
            if bridged is not None:
                added = renderer.tokenizer.decode(bridged[len(self.prompt) + len(ids) :])
                assert sampled + added == text
        if bridged is None:
            self.prompt = self.rendered()
            return False
        assert bridged[: len(self.prompt) + len(ids)] == [*self.prompt, *ids]
        assert len(bridged) > len(self.prompt) + len(ids)
        self.prompt = bridged
        return True


@pytest.mark.parametrize("family", FAMILIES)
def test_random_conversations(renderers, family):
    chance = random.Random(family)
    went_on = branched = 0
    for _ in range(EXAMPLES):
        conversation = Conversation(renderers[family], family, chance)
        for _ in range(chance.randint(1, 4)):
            if conversation.turn():
                went_on += 1
            else:
                branched += 1
    assert went_on > EXAMPLES / 10
    assert (branched > EXAMPLES / 10) == (family in ("qwen3", "mistral", "gpt_oss"))
