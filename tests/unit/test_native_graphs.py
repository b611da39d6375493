"""The steps that a GPU captures, run one by one on the CPU: the same tokens as one step by one."""

import dataclasses
from functools import partial

import pytest
import tiny
import torch
from tiny_job import MODEL

from torchrft.models import attention
from torchrft.models.loader import load_tokenizer
from torchrft.rollout.native import engine as engine_module
from torchrft.rollout.native import step as step_module
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.native.graphs import merged, supports
from torchrft.rollout.native.sampler import draw
from torchrft.rollout.native.step import Step
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

PROMPTS = [
    Prompt(row=i, text="", token_ids=tuple(2 + (7 * i + k) % 50 for k in range(length)))
    for i, length in enumerate([3, 1, 14, 7, 2, 9])
]
BASE = SamplingParams(n=3, max_new_tokens=40)


def generate(monkeypatch, captured, sampling, family="qwen2", slots=8, compiled=False):
    monkeypatch.setattr(engine_module, "supports", lambda *_: captured)
    model = tiny.model(family, "eager")
    engine = NativeEngine(model.config, load_tokenizer(MODEL), (1,), max_num_seqs=slots)
    engine.compiled = compiled
    if compiled:  # layers run by themselves, as on a GPU
        monkeypatch.setattr(step_module, "is_plain", lambda _: False)
        engine.model.get_decoder().set_attn_implementation(attention.TRACED)
    for module in engine.model.modules() if compiled else []:  # as the engine does on a GPU
        if hasattr(module, "layer_idx"):
            module.register_buffer("layer_index", None, persistent=False)
    engine.update_weights(named_full_tensors(model), version=4)
    return engine.generate(PROMPTS, sampling)


def seeded(**options):
    seeds = tuple(tuple(range(10 * i, 10 * i + 3)) for i in range(len(PROMPTS)))
    return dataclasses.replace(BASE, seeds=seeds, **options)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 5, 8, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 9},
        {"stop_token_ids": tuple(range(2, 12))},
        {"stop_token_ids": tuple(range(2, 30)), "min_new_tokens": 6},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_total_tokens": 20},
        {"first_token_temperature": 5.0},
    ],
    ids=str,
)
def test_completions_are_those_of_single_steps(monkeypatch, options, slots):
    """Ended sequences, waiting ones, other slots and fewer slots change nothing."""
    sampling = seeded(**options)
    mine = generate(monkeypatch, True, sampling, slots=slots)
    other = generate(monkeypatch, False, sampling, slots=slots)
    for a, b in zip(mine, other, strict=True):
        assert dataclasses.replace(a, logprobs=()) == dataclasses.replace(b, logprobs=())
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_step_is_compiled_as_a_whole(monkeypatch):
    """Its end, from the logits on: one graph, which changes nothing."""
    sampling = seeded(temperature=0.9, stop_token_ids=tuple(range(2, 12)), min_new_tokens=2)
    other = generate(monkeypatch, False, sampling)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mine = generate(monkeypatch, True, sampling, compiled=True)
    counters = torch._dynamo.utils.counters
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] >= 1
    for a, b in zip(mine, other, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_fewer_slots_as_sequences_end(monkeypatch):
    batches = []
    step = Step.__call__

    def spy(self, layout):
        batches.append(len(layout.places))
        step(self, layout)

    monkeypatch.setattr(Step, "__call__", spy)
    sampling = seeded(stop_token_ids=tuple(range(2, 6)), max_new_tokens=200)
    sampling = dataclasses.replace(
        sampling, n=20, seeds=tuple(tuple(range(20 * i, 20 * i + 20)) for i in range(6))
    )
    mine = generate(monkeypatch, True, sampling, slots=64)
    assert {64, 32, 8} <= set(batches) <= {64, 32, 16, 8}
    assert batches == sorted(batches, reverse=True)
    other = generate(monkeypatch, False, sampling, slots=64)
    assert [c.token_ids for c in mine] == [c.token_ids for c in other]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_attention_to_parts_of_the_keys_is_attention_to_all(parts):
    """What a GPU computes with flash attention for each part, here written out in float64."""
    batch, kv_heads, group, dim, size = 3, 2, 4, 8, 6
    draw = torch.Generator().manual_seed(parts)
    query = torch.randn(batch, kv_heads, group, dim, generator=draw, dtype=torch.float64)
    keys, values = torch.randn(
        2, batch, kv_heads, parts * size, dim, generator=draw, dtype=torch.float64
    )
    lengths = torch.tensor([1, size, parts * size - 1])  # the other parts are empty
    used = (lengths[:, None] - torch.arange(parts) * size).clamp(0, size)
    outside = torch.arange(parts * size) >= lengths[:, None]
    scores = (query @ keys.mT).masked_fill(outside[:, None, None], -torch.inf)
    lse = scores.unflatten(-1, (parts, size)).logsumexp(-1)  # [B, Hkv, G, parts]
    weights = scores.unflatten(-1, (parts, size)).softmax(-1).nan_to_num()
    out = torch.einsum("bhgpk,bhpkd->bpghd", weights, values.unflatten(2, (parts, size)))
    lse = lse.where(used[:, None, None] > 0, torch.inf)  # as flash attention has it
    found = merged(
        out.reshape(-1, kv_heads, dim), lse.permute(1, 0, 3, 2).reshape(kv_heads, -1), used, parts
    )
    torch.testing.assert_close(found, scores.softmax(-1) @ values, rtol=1e-12, atol=1e-12)


def test_which_models_are_captured(monkeypatch):
    for family in ("qwen2", "mistral"):
        model = tiny.model(family)
        assert not supports(model, BASE)  # on a CPU


@pytest.mark.parametrize("vocabulary", [56, 128, 1000, 151936, 7])
def test_draw_is_the_inverse_of_the_cumulative_sum(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    probs = torch.rand(40, vocabulary, generator=generator)
    probs[probs < 0.5] = 0.0
    probs[:, 3] = 0.25
    points = torch.rand(40, generator=generator, dtype=torch.float64)
    points[:3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5])
    tokens = draw(probs, points)
    cumulative = probs.double().cumsum(-1)
    target = points * cumulative[:, -1]
    rows = torch.arange(40)
    assert bool((probs[rows, tokens] > 0).all())
    upper = cumulative[rows, tokens]
    assert bool((upper >= target - 1e-9 * cumulative[:, -1]).all())
    assert bool((upper - probs[rows, tokens] <= target + 1e-9 * cumulative[:, -1]).all())
