"""Text and tokens: what rewards see of a response, in every engine, and how texts are encoded."""

from types import SimpleNamespace

import pytest
from tiny_job import MODEL
from transformers import AutoTokenizer, LlamaTokenizer

from torchrft.models.tokenizer import decode, encode, render_chat, template_variables
from torchrft.rollout.engine import texts
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.native.scheduler import Request, Sample
from torchrft.rollout.remote import RemoteVllmEngine
from torchrft.rollout.sglang import SglangEngine
from torchrft.rollout.vllm import VllmEngine, sampling_options
from torchrft.types import Prompt, SamplingParams

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def byte_level(special):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_tokens(TAGS, special_tokens=special)
    return tokenizer


def sentencepiece(**options):
    """Llama 2's kind: its decoder takes the space in front of a text away."""
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "1", "▁a", "▁b", ".", "▁."]
    vocab = {word: place for place, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    merges = [("▁", "a"), ("▁", "b"), ("▁", ".")]
    return LlamaTokenizer(vocab=vocab, merges=merges, **options)


def made(kind, tokenizer, ids, sampling):
    """The engine's completion of sampled ids, its end-of-sequence token being the tokenizer's."""
    engine = kind.__new__(kind)
    engine.tokenizer, engine.version = tokenizer, 0
    engine.stop_token_ids = (tokenizer.eos_token_id,)
    logprobs = [-0.5] * len(ids)
    if kind is NativeEngine:
        request = Request(0, Prompt(0, "", (1,)), seeds=[0], budget=len(ids))
        return engine.completion(Sample(request, 0, list(ids), logprobs, True), sampling)
    if kind is SglangEngine:
        rows = [(logprob, token, None) for logprob, token in zip(logprobs, ids, strict=True)]
        return engine._completion(0, 0, (rows, {"type": "stop"}), sampling)
    if kind is VllmEngine:
        inner = SimpleNamespace(logprobs=logprobs)
        output = SimpleNamespace(index=0, token_ids=ids, logprobs=inner, finish_reason="stop")
        whole = SimpleNamespace(outputs=[output])
        return engine.completions(0, Prompt(0, "", (1,)), whole, sampling)[0]
    content = {"content": [{"logprob": logprob} for logprob in logprobs]}
    choice = {"index": 0, "token_ids": ids, "finish_reason": "stop", "logprobs": content}
    engine.run_id, engine.newest = "run", 0
    tag = engine._tag(0, sampling.temperature or 1.0)
    choice |= {"weight_versions": [{"version": tag}]}
    return engine._completion(0, choice, sampling, oldest=0)


ENGINES = [NativeEngine, VllmEngine, RemoteVllmEngine, SglangEngine]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("special", [False, True])
def test_a_responses_text_is_what_was_sampled(kind, special):
    """Tags and other special tokens stay; the stop token goes, and it alone."""
    tokenizer = byte_level(special)
    said = "<think>12</think><answer>4</answer>"
    ids = tokenizer.encode(said, add_special_tokens=False)
    assert len(ids) == 7
    for sampled, sampling, text in (
        ([*ids, 1], SamplingParams(), said),
        (ids, SamplingParams(), said),  # cut off
        ([*ids, 0, 0, 1], SamplingParams(), said + "<pad><pad>"),
        ([*ids, 1, 1], SamplingParams(), said + "<eos>"),
        ([1], SamplingParams(), ""),
        ([*ids, 4], SamplingParams(stop_token_ids=(4,)), said),  # a token of the call ends it too
        ([*ids, 4], SamplingParams(), said + "<|user|>"),
        (ids, SamplingParams(stop=("</answer>",)), said.removesuffix("</answer>")),
        (ids, SamplingParams(stop=("</answer>", "2")), "<think>1"),
        ([*ids, 4], SamplingParams(stop=("<|user|>",)), said),
    ):
        completion = made(kind, tokenizer, sampled, sampling)
        assert completion.text == text
        assert completion.token_ids == tuple(sampled)


@pytest.mark.parametrize("kind", ENGINES)
def test_spaces_and_bytes(kind):
    """A space in front stays, since the response goes on from a prompt, as do spaces before dots;
    half a character becomes one mark."""
    tokenizer = sentencepiece(clean_up_tokenization_spaces=True)
    byte = tokenizer.convert_tokens_to_ids("<0xE4>")
    for ids, text in (
        ([7, 8, 2], " a b"),
        ([4, 8, 10, 2], "a b ."),
        ([3, 3, 7], "   a"),
        ([7, 1, 8, 2], " a<s> b"),
        ([byte, byte - 0xE4 + 0xBD, byte - 0xE4 + 0xA0, 2], "你"),
        ([4, byte, 2], "a\N{REPLACEMENT CHARACTER}"),
        ([2], ""),
    ):
        assert made(kind, tokenizer, ids, SamplingParams()).text == text, ids


def test_servers_look_for_stop_strings_in_the_same_text():
    sampling = SamplingParams(stop=("</answer>",))
    options = sampling_options(0, Prompt(0, "", (7,)), sampling, (1,))
    assert options["stop"] == ["</answer>"]
    assert options["skip_special_tokens"] is options["spaces_between_special_tokens"] is False


def test_the_end_of_sequence_token_is_no_text():
    assert texts(byte_level(True), [[9, 1], [9], []], ()) == ["1", "1", ""]
    assert decode(byte_level(True), [9, 1]) == "1<eos>"


@pytest.mark.parametrize("end", [False, True])
def test_no_second_bos(end):
    tokenizer = sentencepiece(add_bos_token=True, add_eos_token=end)
    tail = [2] if end else []
    given = ["a", "<s>a", "<s>", "a<s>", "<s><s>a", ""]
    ids = [[1, 7], [1, 4], [1], [1, 7, 1], [1, 1, 4], [1]]
    assert encode(tokenizer, given, special=True) == [[*row, *tail] for row in ids]
    bare = [[7], [1, 4], [1], [7, 1], [1, 1, 4], []]
    assert encode(tokenizer, given, special=False) == bare
    plain = sentencepiece(add_bos_token=False, add_eos_token=end)
    assert encode(plain, given, special=True) == [[*row, *tail] for row in bare]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users') }}", "row 3: the chat template refuses it: only users"),
        ("{{ messages[0].content + 1 }}", "row 3: the chat template refuses it: TypeError: "),
        (
            "{{ messages[0].nothing.more }}",
            "row 3: the chat template refuses it: 'dict object' has",
        ),
        ("{{ 1 / 0 }}", "row 3: the chat template refuses it: ZeroDivisionError: "),
        ("{{ '%d' | format('x') }}", "row 3: the chat template refuses it: TypeError: "),
        ("{{ messages.append(1) }}", "row 3: the chat template refuses it: "),
        ("{{ ''.__class__.mro() }}", "row 3: the chat template refuses it: "),
        ("{{ strftime_now(3) }}", "row 3: the chat template refuses it: TypeError: "),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "row 3: the chat template refuses it: Rec",
        ),
        ("{{ messages[0].content }", "row 3: the chat template refuses it: "),
        ("{{ '\\ud800' }}", "row 3: the chat template refuses it: UnicodeEncodeError: "),
    ],
)
def test_templates_that_raise_anything(template, message):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template") as caught:
        render_chat(tokenizer, [{"role": "user", "content": "1"}], "row 3")
    assert str(caught.value).startswith(message)


def test_variables_of_a_template():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert template_variables(tokenizer) == set()
    tokenizer.chat_template = (
        "{{ bos_token }}{% set ns = namespace(x=1) %}{% if tools %}{% endif %}"
        "{% set date = date | default('today') %}{% for m in messages %}{% if m %}{% continue %}"
        "{% endif %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}"
        "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{{ range(2) }}"
    )
    assert template_variables(tokenizer) == {"enable_thinking", "date"}
    text = tokenizer.chat_template
    tokenizer.chat_template = {"default": text, "rag": "{{ other }}"}
    assert template_variables(tokenizer) == {"enable_thinking", "date"}
    tokenizer.chat_template = "{{ "
    with pytest.raises(ValueError, match="the chat template does not parse: unexpected"):
        template_variables(tokenizer)
