"""vLLM and SGLang on a GPU, whichever is installed: `pytest tests/gpu/test_engines_cuda.py`."""

import importlib.util
import shutil

import pytest
import tiny
import tiny_job
import torch

from torchrft.config.job_config import Rollout
from torchrft.rollout import build_engine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [Prompt(0, "", (7, 8, 9)), Prompt(1, "", (20,)), Prompt(2, "", tuple(range(30, 47)))]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=16, max_total_tokens=64)
OPTIONS = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.15}
SGLANG = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_flashinfer_autotune": True,
}
GIB = 2**30


def weights(seed, tied):
    model = tiny.model("qwen2", "eager", seed=seed, tie_word_embeddings=tied, **OPTIONS)
    return model.to("cuda", torch.bfloat16)


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def engine(request, tmp_path_factory):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny.config("qwen2", **OPTIONS, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tiny_job.MODEL}/{name}", folder)
    given = {"rollout_batch_size": 1, "engine_type": request.param, "max_num_seqs": 32}
    given |= {"engine_mem_util": 0.3} | ({"sglang": SGLANG} if request.param == "sglang" else {})
    before = torch.cuda.mem_get_info()[0]
    engine = build_engine(
        Rollout.model_validate(given),
        str(folder),
        torch.bfloat16,
        "cuda",
        load_weights=False,
        max_len=64,
    )
    engine.taken = (before - torch.cuda.mem_get_info()[0]) / GIB
    yield engine
    engine.close()


def test_memory_of_the_engine(engine):
    """The share that engine_mem_util names; sleep gives it back."""
    total = torch.cuda.mem_get_info()[1] / GIB
    assert 0.2 * total < engine.taken < 0.4 * total
    engine.update_weights(named_full_tensors(weights(0, False)), 0)
    before = torch.cuda.mem_get_info()[0]
    engine.sleep()
    freed = (torch.cuda.mem_get_info()[0] - before) / GIB
    assert freed > 0.15 * total
    engine.wake()
    engine.update_weights(named_full_tensors(weights(0, False)), 1)
    assert {c.policy_version for c in engine.generate(PROMPTS, GREEDY)} == {1}


@torch.no_grad()
def test_log_probs_are_the_trainers_after_every_update(engine):
    for version in range(5):
        model = weights(version, False)
        engine.update_weights(named_full_tensors(model), version)
        sampling = SamplingParams(
            n=4, temperature=0.7, top_p=0.9, max_new_tokens=16, max_total_tokens=64
        )
        errors = []
        for c in engine.generate(PROMPTS, sampling):
            prompt = PROMPTS[c.prompt_index].token_ids
            ids = torch.tensor([prompt + c.token_ids], device="cuda")
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / 0.7
            expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
            errors.append((expected.cpu() - torch.tensor(c.logprobs)).abs())
        assert torch.cat(errors).mean() < 0.05
        engine.sleep()
        engine.wake()
