"""What a template writes behind a reply, without a sampled token that is encoded again."""

import os
import random
from types import SimpleNamespace

import chat_families
import pytest
from chat_families import TOOLS
from transformers import LlamaTokenizer

from torchrft.environments.renderer import ChatRenderer, PackageRenderer

FAMILIES = list(chat_families.SPECIAL)
WITH_TOOLS = [family for family in FAMILIES if family != "chatml"]
EXAMPLES = int(os.environ.get("RENDERER_EXAMPLES", "40"))
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


def bridged(renderer, text, new, tools=None, messages=(ASKED,)):
    """The text of the next prompt behind the sampled ids of `text`, or None."""
    prompt = renderer.render_ids(messages, tools=tools, add_generation_prompt=True)
    ids = renderer.tokenizer.encode(text, add_special_tokens=False)
    reply = renderer.parse_response(ids, tools=tools, prompt_ids=prompt).message()
    told = [*messages, reply]
    following = renderer.bridge_to_next_turn(prompt, ids, new, tools=tools, messages=told)
    if following is None:
        return None
    assert following[: len(prompt) + len(ids)] == prompt + ids
    return renderer.tokenizer.decode(following[len(prompt) + len(ids) :])


CHATML_NEXT = "\n<|im_start|>user\nAnd in Oslo?<|im_end|>\n<|im_start|>assistant\n"
CHATML_FOUND = (
    "\n<|im_start|>user\n<tool_response>\n20 °C\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
)
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
NEMO = '[TOOL_CALLS][{"name": "weather", "arguments": {"place": "Rome"}}]'
LLAMA = '{"name": "weather", "parameters": {"place": "Rome"}}'
LLAMA_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
HARMONY = ' to=functions.weather<|channel|>commentary json<|message|>{"place": "Rome"}<|call|>'


def test_stop_tokens_are_those_that_the_template_writes_and_the_tokenizers_and_the_engines():
    def stops(family, *own):
        renderer = ChatRenderer(chat_families.tokenizer(family), own)
        return renderer.tokenizer.convert_ids_to_tokens(renderer.get_stop_token_ids())

    assert stops("chatml") == ["<|im_end|>"]
    assert stops("qwen2_5", 263) == ["<|im_end|>", "<|endoftext|>"]
    assert stops("qwen3_5") == ["<|im_end|>"]
    assert stops("llama3") == ["<|eot_id|>"]
    assert stops("mistral") == ["</s>"]
    assert stops("gpt_oss") == ["<|return|>", "<|call|>"]
    # The last token that is written is what ends a reply.
    template = "{{ messages[-1].content }}<|im_start|><|im_end|>"
    renderer = ChatRenderer(chat_families.tokenizer("chatml", template))
    assert renderer.tokenizer.decode(renderer.get_stop_token_ids()) == "<|im_end|>"


def test_a_template_that_writes_nothing_behind_a_reply():
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content | trim + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    renderer = ChatRenderer(chat_families.tokenizer("chatml", template))
    prompt = renderer.render_ids([ASKED], add_generation_prompt=True)
    # The text of the stop token, letter by letter, and a space that the template takes away.
    ids = [id for letter in " <|im_end|>b" for id in renderer.tokenizer.encode(letter)]
    told = [ASKED, renderer.parse_response(ids).message()]
    following = renderer.bridge_to_next_turn(prompt, ids, [NEXT], messages=told)
    assert renderer.tokenizer.decode(following[len(prompt) + len(ids) :]) == "u:And in Oslo?\na:"


def test_qwen3_drops_thinking_when_a_user_speaks_and_keeps_it_when_a_tool_answers(renderers):
    qwen = renderers["qwen3"]
    thinking = f"<think>\nHm.\n</think>\n\n{HERMES}<|im_end|>"
    assert bridged(qwen, thinking, [NEXT], TOOLS) is None
    assert bridged(qwen, thinking, [FOUND], TOOLS) == CHATML_FOUND
    assert bridged(qwen, f"{HERMES}<|im_end|>", [FOUND], TOOLS) == CHATML_FOUND
    assert bridged(qwen, "Sunny.<|im_end|>", [NEXT]) == CHATML_NEXT
    # An earlier turn's thinking goes, too, when a user speaks behind a reply without thinking.
    call_message = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    earlier = (ASKED, {**call_message, "tool_calls": [call(place="Rome")]}, FOUND)
    assert bridged(qwen, "Sunny.<|im_end|>", [FOUND], TOOLS, earlier) == CHATML_FOUND
    assert bridged(qwen, "Sunny.<|im_end|>", [NEXT], TOOLS, earlier) is None


def test_variables_of_the_template():
    """Qwen3's prompt without thinking has an empty one, which its history has not."""
    qwen = ChatRenderer(chat_families.tokenizer("qwen3"), enable_thinking=False)
    prompt = qwen.render_ids([ASKED], add_generation_prompt=True)
    assert qwen.tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert bridged(qwen, "Sunny.<|im_end|>", [NEXT]) is None


def test_thinking_that_a_template_never_writes_stays_in_the_tokens(renderers):
    thinking = "<think>Hm.</think>Sunny.<|im_end|>"
    assert bridged(renderers["qwen2_5"], thinking, [NEXT]) == CHATML_NEXT


def test_a_prompt_that_opens_the_thinking(renderers):
    qwen = renderers["qwen3_5"]
    assert bridged(qwen, "Hm.\n</think>\n\nSunny.<|im_end|>", [NEXT]) == (CHATML_NEXT + "<think>\n")
    # Cut off in the middle of it: the template closes thinking and reply, unsampled.
    assert bridged(qwen, "Hm", [NEXT]) == ("\n</think>\n\n<|im_end|>" + CHATML_NEXT + "<think>\n")
    # Ended in the middle of it: nothing goes between the thinking and the stop token.
    assert bridged(qwen, "Hm<|im_end|>", [NEXT]) == CHATML_NEXT + "<think>\n"
    ids = qwen.tokenizer.encode("a</think>b")
    assert qwen.parse_response(ids).reasoning_content == "a"
    assert qwen.parse_response(ids, prompt_ids=[1]).reasoning_content is None


def test_replies_that_end_otherwise():
    qwen = ChatRenderer(chat_families.tokenizer("qwen2_5"), [263])
    assert bridged(qwen, "Sunny.<|im_end|>", [NEXT]) == CHATML_NEXT
    assert bridged(qwen, "Sunny.", [NEXT]) == "<|im_end|>" + CHATML_NEXT
    assert bridged(qwen, "Sunny.<|endoftext|>", [NEXT]) == "<|im_end|>" + CHATML_NEXT
    assert bridged(qwen, "", [NEXT]) == "<|im_end|>" + CHATML_NEXT
    # The text of a stop token, sampled letter by letter, ends nothing.
    spelled = [id for letter in "<|im_end|>" for id in qwen.tokenizer.encode(letter)]
    prompt = qwen.render_ids([ASKED], add_generation_prompt=True)
    told = [ASKED, qwen.parse_response([*spelled, 263]).message()]
    following = qwen.bridge_to_next_turn(prompt, [*spelled, 263], [NEXT], messages=told)
    assert qwen.tokenizer.decode(following[len(prompt) :]) == (
        "<|im_end|><|endoftext|><|im_end|>" + CHATML_NEXT
    )


def test_calls_in_other_words_than_the_templates(renderers):
    loose = HERMES.replace("\n", "").replace(": ", ":")
    for ending, before in (("<|im_end|>", ""), ("", "<|im_end|>")):
        found = bridged(renderers["qwen2_5"], loose + ending, [FOUND], TOOLS)
        assert found == before + CHATML_FOUND
        thinking = f"<think>Hm.</think>{loose}{ending}"
        assert bridged(renderers["qwen3"], thinking, [FOUND], TOOLS) == before + CHATML_FOUND
        # Qwen3 writes empty thinking into a last reply that has none, and takes it out again.
        assert bridged(renderers["qwen3"], loose + ending, [FOUND], TOOLS) is None


def test_half_a_character(renderers):
    qwen = renderers["qwen2_5"]
    (stop,) = qwen.get_stop_token_ids()
    for ids in (qwen.tokenizer.encode("é漢")[:-1], [*qwen.tokenizer.encode("漢")[:1], stop]):
        prompt = qwen.render_ids([ASKED], add_generation_prompt=True)
        reply = qwen.parse_response(ids)
        assert reply.content.endswith("\ufffd")
        told = [ASKED, reply.message()]
        following = qwen.bridge_to_next_turn(prompt, ids, [NEXT], messages=told)
        assert following[: len(prompt) + len(ids)] == prompt + ids


def test_llama(renderers):
    llama = renderers["llama3"]
    prompt = LLAMA_HEAD.format("assistant")
    tool = LLAMA_HEAD.format("ipython") + '"20 °C"<|eot_id|>' + prompt
    assert bridged(llama, f"{LLAMA}<|eot_id|>", [FOUND], TOOLS) == tool
    assert bridged(llama, f"<|python_tag|>{LLAMA}<|eot_id|>", [FOUND], TOOLS) == tool
    user = LLAMA_HEAD.format("user") + "And in Oslo?<|eot_id|>" + prompt
    # The template trims replies.
    assert bridged(llama, " Sunny. \n<|eot_id|>", [NEXT], TOOLS) == user


def test_mistral_moves_tools_and_system_message_to_the_last_user_message(renderers):
    mistral = renderers["mistral"]
    system = {"role": "system", "content": "Be brief."}
    assert bridged(mistral, "Sunny.</s>", [NEXT]) == "[INST]And in Oslo?[/INST]"
    assert bridged(mistral, "Sunny.</s>", [NEXT], TOOLS) is None
    assert bridged(mistral, "Sunny.</s>", [NEXT], messages=(system, ASKED)) is None
    found = bridged(mistral, f"{NEMO}</s>", [FOUND], TOOLS)
    assert found.startswith('[TOOL_RESULTS]{"content": 20 °C, "call_id": "')
    assert bridged(mistral, f"{NEMO}</s>", [FOUND], TOOLS, (system, ASKED)) is None


def test_gpt_oss_drops_thinking_and_the_return_token_of_final_messages(renderers):
    gpt = renderers["gpt_oss"]
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for before in ("", thought):
        assert bridged(gpt, before + HARMONY, [FOUND], TOOLS) == (
            '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"20 °C"<|end|>'
            "<|start|>assistant"
        )
        final = "<|channel|>final<|message|>Sunny.<|return|>"
        assert bridged(gpt, before + final, [NEXT], TOOLS) is None
    # The template's key for thinking is its own.
    thinking = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    told = [ASKED, {**thinking, "tool_calls": [call(place="Rome")]}, FOUND]
    assert "analysis<|message|>Hm.<|end|>" in gpt.tokenizer.decode(gpt.render_ids(told))
    # Cut off: the template's own closing.
    assert bridged(gpt, "<|channel|>final<|message|>Sunny", [NEXT]) == (
        "<|end|><|start|>user<|message|>And in Oslo?<|end|><|start|>assistant"
    )


def test_replies_that_the_template_refuses_are_faulty(renderers):
    def read(family, text):
        ids = renderers[family].tokenizer.encode(text, add_special_tokens=False)
        return renderers[family].parse_response(ids, tools=TOOLS)

    lone = read("qwen2_5", HERMES.replace("Rome", "\\ud800"))
    assert lone.fault.startswith("The reply does not fit: ")
    assert lone.tool_calls == ()
    both = read("gpt_oss", f"<|channel|>final<|message|>a<|end|><|start|>assistant{HARMONY}")
    assert both.fault is None
    tags = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
    cut = read("gpt_oss", tags)
    assert cut.fault.startswith("The reply is not in the form ")
    assert cut.content == "analysisHm.assistantfinal"


def test_what_is_refused():
    tokenizer = chat_families.tokenizer("chatml")
    with pytest.raises(ValueError, match="takes no tools: describe them in a message"):
        ChatRenderer(tokenizer).render_ids([ASKED], tools=TOOLS)
    tokenizer.chat_template = "{{ tools | tojson }}{{ messages | tojson }}"
    with pytest.raises(ValueError, match="unknown form of tool calls: give the tokenizer a resp"):
        ChatRenderer(tokenizer).render_ids([ASKED], tools=TOOLS)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"needs a chat template .* lay chat_template\.jinja"):
        ChatRenderer(tokenizer)
    both = {"role": "assistant", "content": "a", "thinking": "b", "tool_calls": [call()]}
    template = (chat_families.FOLDER / "gpt_oss.jinja").read_text()
    gpt = ChatRenderer(chat_families.tokenizer("gpt_oss", template))
    with pytest.raises(ValueError, match="refuses it: both"):
        gpt.render_ids([both])


def test_a_tokenizer_that_puts_a_space_in_front_of_a_text():
    words = ["<unk>", "<s>", "</s>", "▁", *"abcdu:\n", "▁a"]
    vocab = {word: place for place, word in enumerate(words)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[("▁", "a")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    renderer = ChatRenderer(tokenizer)
    user = {"role": "user", "content": "b"}
    prompt, reply = renderer.render_ids([user], add_generation_prompt=True), vocab["c"]
    told = [user, renderer.parse_response([reply]).message()]
    following = renderer.bridge_to_next_turn(prompt, [reply], [user], messages=told)
    told = [user, renderer.parse_response([reply, 2]).message()]
    assert following == renderer.bridge_to_next_turn(prompt, [reply, 2], [user], messages=told)
    behind = following[len(prompt) :]
    assert tokenizer.convert_ids_to_tokens(behind) == ["c", "</s>", *"u:ba:"]


def test_a_renderer_of_the_package():
    """Its records have the names of renderers 0.1.12."""

    def parsed(**call):
        status = {"status": "ok", "raw": "{", "token_span": None, "id": None}
        calls = [SimpleNamespace(**{**status, **call})]
        return SimpleNamespace(content="a", reasoning_content="b", tool_calls=calls)

    inner = SimpleNamespace(
        render_ids=None,
        get_stop_token_ids=lambda: [7],
        parse_response=lambda ids, *, tools, prompt_ids: parsed(name="weather", arguments=ids[0]),
        bridge_to_next_turn=lambda prompt, ids, new, *, tools: SimpleNamespace(
            token_ids=[*prompt, *ids, len(new)]
        ),
    )
    renderer = PackageRenderer(inner)
    assert renderer.get_stop_token_ids() == [7]
    reply = renderer.parse_response([{"place": "Rome"}], tools=TOOLS)
    assert (reply.content, reply.reasoning_content, reply.fault) == ("a", "b", None)
    assert reply.tool_calls[0]["function"] == call(place="Rome")["function"]
    assert "place is missing" in renderer.parse_response([{}], tools=TOOLS).fault
    inner.parse_response = lambda ids, *, tools, prompt_ids: parsed(status="invalid_json")
    reply = renderer.parse_response((1,), tools=TOOLS)
    assert (reply.fault, reply.tool_calls) == ("The tool call is faulty (invalid_json): {", ())
    assert reply.reasoning_content == "b"

    def bridge():
        return renderer.bridge_to_next_turn((1,), (2,), [NEXT], tools=None, messages=[ASKED])

    assert bridge() == [1, 2, 1]
    inner.bridge_to_next_turn = lambda *_, tools: SimpleNamespace(token_ids=[1, 3, 1])
    assert bridge() is None
    inner.bridge_to_next_turn = lambda *_, tools: None
    assert bridge() is None
