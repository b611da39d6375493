"""The native engine on a GPU gives what it gives on the CPU."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEBUG_MODEL = Path(__file__).parents[1] / "assets" / "debug_model"
PROMPTS = [
    Prompt(row=i, text="", token_ids=ids)
    for i, ids in enumerate([(7, 8, 9), (20,), (5, 6) * 7, (30, 2, 40, 41, 9, 10, 22)])
]


def generate(device, sampling, family="qwen2", dtype=torch.float32, **options):
    model = tiny.model(family, "eager", **options)
    tokenizer = AutoTokenizer.from_pretrained(DEBUG_MODEL)
    engine = NativeEngine(model.config, tokenizer, (1,), 5, dtype, device)
    engine.update_weights(named_full_tensors(model), version=0)
    engine.sleep()
    engine.wake()
    engine.update_weights(named_full_tensors(model), version=0)
    return engine.generate(PROMPTS, sampling)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}]
)
def test_tokens_are_those_of_the_cpu(family, options):
    """Float32 and equal seeds: every token, and the log-probs to 1e-4."""
    seeds = tuple(tuple(range(10 * i, 10 * i + 4)) for i in range(len(PROMPTS)))
    sampling = SamplingParams(n=4, max_new_tokens=90, seeds=seeds, stop=("zz",), **options)
    gpu, cpu = (generate(device, sampling, family) for device in ("cuda", "cpu"))
    for a, b in zip(gpu, cpu, strict=True):
        assert a.token_ids == b.token_ids
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_bfloat16_log_probs():
    """Near those of the same tokens under float32 weights."""
    sampling = SamplingParams(n=4, max_new_tokens=50)
    got = generate("cuda", sampling, dtype=torch.bfloat16, initializer_range=0.1)
    model = tiny.model("qwen2", "eager", initializer_range=0.1)
    for c in got:
        prompt = PROMPTS[c.prompt_index].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *c.token_ids]])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        assert (torch.tensor(c.logprobs) - wanted).abs().max() < 0.15
