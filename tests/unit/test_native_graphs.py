"""The steps that a GPU captures, run one by one on the CPU: the same tokens as `Generation`'s."""

import dataclasses

import pytest
import tiny
import torch
from tiny_job import MODEL

from torchrft.models.loader import load_tokenizer
from torchrft.rollout.native import engine as engine_module
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.native.graphs import GraphGeneration, supports
from torchrft.rollout.native.sampler import draw
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

PROMPTS = [
    Prompt(row=i, text="", token_ids=tuple(2 + (7 * i + k) % 50 for k in range(length)))
    for i, length in enumerate([3, 1, 14, 7, 2, 9])
]
BASE = SamplingParams(n=3, max_new_tokens=40)


def generate(monkeypatch, captured, sampling, family="qwen2", slots=8):
    monkeypatch.setattr(engine_module, "supports", lambda *_: captured)
    model = tiny.model(family, "eager")
    engine = NativeEngine(model.config, load_tokenizer(MODEL), (1,), max_num_seqs=slots)
    engine.update_weights(named_full_tensors(model), version=4)
    return engine.generate(PROMPTS, sampling)


def seeded(**options):
    seeds = tuple(tuple(range(10 * i, 10 * i + 3)) for i in range(len(PROMPTS)))
    return dataclasses.replace(BASE, seeds=seeds, **options)


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
def test_completions_are_those_of_generation(monkeypatch, options, slots):
    """Ended sequences, waiting ones, other slots and fewer slots change nothing."""
    sampling = seeded(**options)
    mine = generate(monkeypatch, True, sampling, slots=slots)
    other = generate(monkeypatch, False, sampling, slots=slots)
    for a, b in zip(mine, other, strict=True):
        assert dataclasses.replace(a, logprobs=()) == dataclasses.replace(b, logprobs=())
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_fewer_slots_as_sequences_end(monkeypatch):
    batches = []
    step = GraphGeneration.step

    def spy(self, batch, *rest):
        batches.append(batch)
        return step(self, batch, *rest)

    monkeypatch.setattr(GraphGeneration, "step", spy)
    sampling = seeded(stop_token_ids=tuple(range(2, 6)), max_new_tokens=200)
    sampling = dataclasses.replace(
        sampling, n=20, seeds=tuple(tuple(range(20 * i, 20 * i + 20)) for i in range(6))
    )
    mine = generate(monkeypatch, True, sampling, slots=64)
    assert {64, 32, 8} <= set(batches) <= {64, 32, 16, 8}
    assert batches == sorted(batches, reverse=True)
    other = generate(monkeypatch, False, sampling, slots=64)
    assert [c.token_ids for c in mine] == [c.token_ids for c in other]


def test_which_models_are_captured(monkeypatch):
    for family in ("qwen2", "mistral"):
        model = tiny.model(family)
        assert not supports(model, False)  # on a CPU


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
