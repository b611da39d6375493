"""Trained constants beside the parameters, in real vLLM, which begins with random numbers there."""

import shutil

import pytest
import tiny_buffers
import tiny_job
import torch

from torchrft.config.job_config import Rollout
from torchrft.rollout import build_engine
from torchrft.rollout.canary import Canary, WeightSyncError
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

PROMPTS = [Prompt(0, "", (7, 8, 9)), Prompt(1, "", (20,)), Prompt(2, "", tuple(range(30, 47)))]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, max_total_tokens=64)
SIZES = {"head_dim": 32, "hidden_size": 128, "tie_word_embeddings": False}
GEMMA = {"global_head_dim": 32, "tie_word_embeddings": True, "hidden_size_per_layer_input": 32}
OPTIONS = {"apertus": SIZES, "gemma4_text": SIZES | GEMMA}


@torch.no_grad()
def weights(family, seed=0):
    model = tiny_buffers.model(family, seed=seed, **OPTIONS[family])
    for name, tensor in model.state_dict().items():
        if "act_fn" in name:  # vLLM holds these in bfloat16, whatever it computes in
            tensor.copy_(tensor.bfloat16())
    return model


def make(folder, family, dtype=torch.float32):
    model = weights(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tiny_job.MODEL}/{name}", folder)
    settings = {"rollout_batch_size": 1, "engine_type": "vllm", "max_num_seqs": 32}
    rollout = Rollout.model_validate(settings)
    return build_engine(rollout, str(folder), dtype, load_weights=False, max_len=64)


# vLLM computes the slopes of Apertus' activation in bfloat16, also in a float32 model.
@pytest.mark.parametrize(("family", "tolerance"), [("apertus", 0.01), ("gemma4_text", 1e-4)])
def test_every_update_gives_transformers_tokens_and_log_probs(family, tolerance, tmp_path):
    engine = make(tmp_path, family)
    for version in range(3):
        model = weights(family, version)
        engine.update_weights(named_full_tensors(model), version)
        for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
            start = len(prompt.token_ids)
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
            with torch.no_grad():
                log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            best = log_p.max(-1)
            assert list(completion.token_ids) == best.indices.tolist()
            assert completion.logprobs == pytest.approx(best.values.tolist(), abs=tolerance)


def test_one_that_does_not_arrive_is_named(tmp_path, monkeypatch):
    engine, watch = make(tmp_path, "gemma4_text"), Canary.watch
    name = "model.layers.1.layer_scalar"

    def dropped(self, pairs):
        yield from (pair for pair in watch(self, pairs) if pair[0] != name)

    engine.update_weights(named_full_tensors(weights("gemma4_text")), 0)
    monkeypatch.setattr(Canary, "watch", dropped)
    with pytest.raises(WeightSyncError, match=name):
        engine.update_weights(named_full_tensors(weights("gemma4_text", 1)), 1)
