"""The vLLM engine beside transformers and the native engine, with real vLLM."""

import dataclasses
import shutil

import pytest
import tiny
import tiny_job
import torch

from torchrft.config.job_config import Rollout
from torchrft.models.loader import load_config, load_tokenizer
from torchrft.rollout import build_engine
from torchrft.rollout.canary import Canary, WeightSyncError
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

PROMPTS = [Prompt(0, "", (7, 8, 9)), Prompt(1, "", (20,)), Prompt(2, "", tuple(range(30, 47)))]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=16, max_total_tokens=64)


def options(family, tied):
    return {
        "head_dim": 32,
        "hidden_size": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }


def make(tmp_path, family="qwen2", tied=False, dtype=torch.float32, **given):
    """A folder of a tiny model without weights, and its vLLM engine."""
    tiny.config(
        family, **options(family, tied), architectures=[tiny.model(family).__class__.__name__]
    ).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tiny_job.MODEL}/{name}", tmp_path)
    rollout = Rollout.model_validate(
        {"rollout_batch_size": 1, "engine_type": "vllm", "max_num_seqs": 32, **given}
    )
    return build_engine(rollout, str(tmp_path), dtype, load_weights=False, max_len=64)


def weights(family, tied, seed):
    return tiny.model(family, "eager", seed=seed, **options(family, tied))


def generated(model, prompt):
    ids = torch.tensor([prompt.token_ids])
    out = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=1)
    return out[0, ids.shape[1] :].tolist()


@torch.no_grad()
def exact(model, prompt, completion, temperature):
    """Log-probs of one full forward pass."""
    ids = torch.tensor([prompt.token_ids + completion.token_ids])
    logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt.token_ids) :, None]).squeeze(-1)


@pytest.mark.parametrize(
    ("family", "tied"), [("qwen2", True), ("qwen2", False), ("llama", False), ("qwen3", True)]
)
def test_twenty_updates(family, tied, tmp_path):
    """Greedy tokens equal transformers' and the native engine's after every update."""
    engine = make(tmp_path, family, tied)
    native = NativeEngine(load_config(str(tmp_path)), load_tokenizer(str(tmp_path)), (1,))
    different = set()
    for version in range(21):
        model = weights(family, tied, seed=version)
        for one in (engine, native):
            one.update_weights(named_full_tensors(model), version)
        completions = engine.generate(PROMPTS, GREEDY)
        assert [c.policy_version for c in completions] == [version] * 3
        for prompt, mine, other in zip(
            PROMPTS, completions, native.generate(PROMPTS, GREEDY), strict=True
        ):
            assert list(mine.token_ids) == generated(model, prompt) == list(other.token_ids)
            assert mine.finish_reason == other.finish_reason
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert mine.text == other.text
        different.add(completions[0].token_ids)
        engine.sleep()
        engine.wake()
    assert len(different) > 15


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_canary(tied, dtype, step, tmp_path, monkeypatch):
    """A tensor that is stale by one small step, permuted, dropped, or wrong in two places, is
    named, whatever vLLM has packed it into."""
    engine = make(tmp_path, "qwen2", tied, dtype=dtype)
    model = weights("qwen2", tied, seed=1)
    # Weights all differ: an RMS norm of ones would be the same in any order.
    generator = torch.Generator().manual_seed(0)
    watch, fault = Canary.watch, {}

    def faulty(self, pairs):
        for name, tensor in watch(self, pairs):
            if name != fault.get("name"):
                yield name, tensor
            elif fault["kind"] == "swapped":
                tensor = tensor.clone()
                tensor.view(-1)[[3, 5]] = tensor.view(-1)[[5, 3]]
                yield name, tensor
            elif fault["kind"] != "dropped":
                yield name, fault["old"] if fault["kind"] == "stale" else tensor.flip(0)

    monkeypatch.setattr(Canary, "watch", faulty)
    engine.update_weights(named_full_tensors(model), 0)
    for kind in ("stale", "permuted", "dropped", "swapped"):
        for name, parameter in model.named_parameters():
            fault.update(name=name, kind=kind, old=parameter.detach().clone())
            with torch.no_grad():
                for each in model.parameters():
                    each.add_(step * torch.randn(each.shape, generator=generator))
            with pytest.raises(WeightSyncError, match=f'does not hold "{name}" as the trainer'):
                engine.update_weights(named_full_tensors(model), 1)
            with pytest.raises(ValueError, match="no weights"):
                engine.generate(PROMPTS, GREEDY)


def test_what_cannot_be_generated_is_refused(tmp_path):
    """One sentence each; vLLM itself would cut the response, ignore the string or never return."""
    engine = make(tmp_path)
    model = weights("qwen2", False, seed=1)
    engine.update_weights(named_full_tensors(model), 0)
    for prompt, sampling, message in (
        ((7,) * 60, SamplingParams(max_new_tokens=9), "may have 69 tokens, more than the 64"),
        ((7, 10**6), GREEDY, "has the token id 1000000, but the model knows 56 tokens"),
        ((7,), dataclasses.replace(GREEDY, stop=("5",)), r"does not stop at \['5'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([Prompt(0, "", prompt)], sampling)
    assert len(engine.generate(PROMPTS, GREEDY)) == 3
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 4] = torch.nan
    with pytest.raises(WeightSyncError, match=r'"model.layers.1.mlp.down_proj.weight" holds NaN'):
        engine.update_weights(named_full_tensors(model), 1)


def test_a_call_that_was_broken_off_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither its requests nor, after an update, what the old weights computed for its prompt."""
    engine, prompt = make(tmp_path), Prompt(0, "", tuple(3 + i % 50 for i in range(40)))
    engine.update_weights(named_full_tensors(weights("qwen2", False, seed=1)), 1)
    step, calls = engine.llm.llm_engine.step, []

    def interrupted():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine.llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt, *PROMPTS], dataclasses.replace(GREEDY, n=3, temperature=1.0))
    for version in (1, 2):
        model = weights("qwen2", False, seed=version)
        engine.update_weights(named_full_tensors(model), version)
        completions = engine.generate([prompt, *PROMPTS], GREEDY)
        assert [c.policy_version for c in completions] == [version] * 4
        for given, c in zip([prompt, *PROMPTS], completions, strict=True):
            assert list(c.token_ids) == generated(model, given)


def test_log_probs_are_those_of_the_temperature_before_top_p(tmp_path):
    engine = make(tmp_path)
    model = weights("qwen2", False, seed=3)
    engine.update_weights(named_full_tensors(model), 0)
    for temperature, top_p, top_k in ((0.7, 1.0, 0), (1.3, 0.6, 0), (1.0, 0.9, 5), (0.5, 0.8, 7)):
        sampling = SamplingParams(
            n=4,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=12,
            max_total_tokens=64,
            seeds=tuple(tuple(100 * i + j for j in range(4)) for i in range(3)),
        )
        completions = engine.generate(PROMPTS, sampling)
        places = [(c.prompt_index, c.sample_index) for c in completions]
        assert places == [(i, j) for i in range(3) for j in range(4)]
        for completion in completions:
            expected = exact(model, PROMPTS[completion.prompt_index], completion, temperature)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert len({c.token_ids for c in completions}) > 6
        # Equal seeds give equal tokens, whatever else is in the batch.
        alone = dataclasses.replace(sampling, seeds=sampling.seeds[2:])
        again = engine.generate(PROMPTS[2:], alone)
        assert [c.token_ids for c in again] == [c.token_ids for c in completions[8:]]


def test_stops_and_budgets(tmp_path):
    engine = make(tmp_path, stop=["5"])
    model = weights("qwen2", False, seed=4)
    engine.update_weights(named_full_tensors(model), 0)
    native = NativeEngine(load_config(str(tmp_path)), load_tokenizer(str(tmp_path)), (1,))
    native.update_weights(named_full_tensors(model), 0)
    cases = [
        GREEDY,
        dataclasses.replace(GREEDY, max_new_tokens=None, max_total_tokens=20),
        dataclasses.replace(GREEDY, stop_token_ids=tuple(range(2, 40))),
        dataclasses.replace(GREEDY, stop_token_ids=tuple(range(2, 40)), min_new_tokens=5),
        dataclasses.replace(GREEDY, stop=tuple("0123456789")),
    ]
    reasons = set()
    for sampling in cases:
        mine, other = engine.generate(PROMPTS, sampling), native.generate(PROMPTS, sampling)
        for a, b in zip(mine, other, strict=True):
            assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
        reasons |= {c.finish_reason for c in mine}
    assert reasons == {"stop", "length"}


def test_stop_strings_that_are_special_tokens(tmp_path):
    """vLLM ends where the tag was sampled, and the text is all before it, special tokens too."""
    engine = make(tmp_path, stop=["<|user|>"])
    engine.update_weights(named_full_tensors(weights("qwen2", False, seed=5)), 0)
    base = SamplingParams(
        n=24,
        temperature=2.0,
        max_new_tokens=30,
        max_total_tokens=64,
        seeds=tuple(tuple(100 * i + j for j in range(24)) for i in range(3)),
    )
    tokenizer, user = load_tokenizer(str(tmp_path)), 4
    free = engine.generate(PROMPTS, base)
    cut = engine.generate(PROMPTS, dataclasses.replace(base, stop=("<|user|>",)))
    hits = 0
    for a, b in zip(free, cut, strict=True):
        end = a.token_ids.index(user) + 1 if user in a.token_ids else len(a.token_ids)
        assert b.token_ids == a.token_ids[:end]
        assert b.text == a.text.partition("<|user|>")[0]
        body = a.token_ids[:-1] if a.finish_reason == "stop" else a.token_ids
        assert a.text == tokenizer.decode(body)
        hits += b.token_ids[-1] == user
        assert b.finish_reason == "stop" or b.token_ids == a.token_ids
    assert hits > 5
    assert any("<|assistant|>" in c.text for c in cut)


def test_wrong_use(tmp_path):
    engine = make(tmp_path)
    with pytest.raises(ValueError, match="the engine has no weights: call update_weights"):
        engine.generate(PROMPTS, GREEDY)
    pairs = list(named_full_tensors(weights("qwen2", False, seed=1)))
    with pytest.raises(ValueError, match=r'no value came for "lm_head\.weight"'):
        engine.update_weights(pairs[:-1], 0)
    with pytest.raises(ValueError, match='has no parameter "nonsense"'):
        engine.update_weights([*pairs, ("nonsense", torch.zeros(1))], 0)
    engine.update_weights(pairs, 0)
    long = Prompt(5, "", tuple([3] * 64))
    with pytest.raises(ValueError, match=r"prompt 0 \(row 5\) has 64 tokens, which leaves no room"):
        engine.generate([long], GREEDY)
    fire = dataclasses.replace(GREEDY, first_token_temperature=2.0)
    with pytest.raises(ValueError, match="vLLM has no first_token_temperature"):
        engine.generate(PROMPTS, fire)
    assert engine.generate([], GREEDY) == []
    engine.sleep()
    with pytest.raises(ValueError, match="the engine sleeps: call wake"):
        engine.update_weights(pairs, 1)


def test_what_vllm_refuses_is_one_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"\[rollout.vllm\] holds an argument that vLLM does not know.*'nonsense'"
    ):
        make(tmp_path, vllm={"nonsense": 1})
    with pytest.raises(ValueError, match="vLLM did not start: "):
        make(tmp_path, vllm={"kv_cache_memory_bytes": 1})
