"""The native engine on prompts with images."""

import pytest
import tiny_vlm
import torch
from transformers import AutoTokenizer

from torchrft.models.policy import PolicyModel
from torchrft.rollout.native import engine as engine_module
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import SamplingParams

STEPS = 24


def make(family, **options):
    vision, model = tiny_vlm.vision(family), tiny_vlm.model(family)
    tokenizer = AutoTokenizer.from_pretrained("tests/assets/debug_vlm")
    engine = NativeEngine(model.config, tokenizer, (1,), vision=vision, **options)
    engine.update_weights(named_full_tensors(model), version=0)
    return engine, vision, model


def prompts(vision):
    """Ragged: with one image, none, two, and one of equal tokens."""
    picture = tiny_vlm.picture
    return [
        tiny_vlm.prompt(vision, "3 56 I 57 9 10 14 22", picture(16, 16, 1)),
        tiny_vlm.prompt(vision, "3 11 12 13"),
        tiny_vlm.prompt(vision, "56 I 57 4 I 8", picture(24, 16, 3), picture(16, 8, 4)),
        tiny_vlm.prompt(vision, "3 56 I 57 9 10 14 22", picture(16, 16, 2)),
        tiny_vlm.prompt(vision, "5 5"),
    ]


@torch.no_grad()
def greedy(model, vision, prompt):
    """transformers.generate; a sampled image token must not be taken for a placeholder there."""
    inputs = {"input_ids": torch.tensor([prompt.token_ids])}
    if prompt.images:
        made = vision.processor([prompt.text], [image.open() for image in prompt.images])
        inputs |= {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}
        if vision.rope is not None:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny_vlm.IMAGE).int()
    out = model.generate(**inputs, do_sample=False, max_new_tokens=STEPS, eos_token_id=1)
    return out[0, len(prompt.token_ids) :].tolist()


@pytest.mark.parametrize("slots", [256, 2])
@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_greedy_is_that_of_transformers(family, slots):
    engine, vision, model = make(family, max_num_seqs=slots)
    asked = prompts(vision)
    got = engine.generate(asked, SamplingParams(temperature=0.0, max_new_tokens=STEPS))
    for prompt, completion in zip(asked, got, strict=True):
        assert list(completion.token_ids) == greedy(model, vision, prompt)
    assert got[0].token_ids != got[3].token_ids  # equal tokens, another picture
    assert len({token for completion in got for token in completion.token_ids}) > 8


def test_an_image_is_encoded_once_for_all_samples():
    engine, vision, _ = make("qwen2_vl")
    seen = []
    tower = engine.model.model.visual
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    asked = prompts(vision)
    seeds = tuple(tuple(range(10 * i, 10 * i + 5)) for i in range(len(asked)))
    got = engine.generate(asked, SamplingParams(n=5, max_new_tokens=6, seeds=seeds))
    assert seen == [4]
    for completion in got:  # and the engine's log-probs are the trainer's
        prompt = asked[completion.prompt_index]
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        positions, images = vision.see(
            torch.arange(ids.shape[1])[None], [(prompt, 0, ids.shape[1])]
        )
        start = len(prompt.token_ids)
        targets = torch.arange(start - 1, ids.shape[1] - 1)

        class Inputs:
            input_ids, position_ids, layout = ids, positions, None
            labels = torch.tensor(completion.token_ids)
            kept = None

        Inputs.images, Inputs.targets = images, targets
        with torch.no_grad():
            logprobs, _ = PolicyModel(engine.model)(Inputs)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), logprobs, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_the_graph_engine_generates_the_same(family, monkeypatch):
    engine, vision, _ = make(family)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=STEPS)
    asked = prompts(vision)
    wanted = [list(c.token_ids) for c in engine.generate(asked, sampling)]
    monkeypatch.setattr(engine_module, "supports", lambda *_: True)
    for engine.max_num_seqs in (256, 2):
        assert [list(c.token_ids) for c in engine.generate(asked, sampling)] == wanted


def test_images_need_an_engine_that_sees_them():
    engine, vision, _ = make("llava")
    engine.vision = None
    with pytest.raises(ValueError, match="row 0\\) has images, which this engine does not see"):
        engine.generate(prompts(vision), SamplingParams())
