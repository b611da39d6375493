"""Reward models and judges in vLLM beside transformers, with real vLLM."""

import random

import pytest
import tiny
import tiny_classifiers
import tiny_job
import torch
from test_vllm_trainer import train
from tiny_job import rollout, tiny_config

from torchrft.build.judges import build_judge
from torchrft.build.rollout import judge_engine
from torchrft.config.job_config import Rollout
from torchrft.config.reward_config import Judge as Entry
from torchrft.models.loader import load_tokenizer
from torchrft.rewards.source import RewardRequest
from torchrft.rollout.vllm_scores import VllmScores

SIZES = {"head_dim": 32, "hidden_size": 128}  # vLLM on a CPU knows few head sizes
CPU = torch.device("cpu")


def vllm_scores(folder, **options):
    given = {"rollout_batch_size": 1, "engine_type": "vllm", "max_num_seqs": 16, **options}
    return VllmScores(folder, folder, 64, Rollout.model_validate(given), torch.float32, CPU)


@pytest.mark.parametrize(("family", "pad"), [("qwen2", 0), ("llama", None)])
def test_a_pooling_model_gives_transformers_own_scores(family, pad, tmp_path):
    folder = tiny_classifiers.save(tmp_path, family, pad_token_id=pad, **SIZES)
    rng = random.Random(0)
    samples = [[rng.randrange(2, 56) for _ in range(rng.randint(1, 40))] for _ in range(20)]
    samples += [[5, 6, 0], [7, 0, 8], [0, 0]]
    expected = tiny_classifiers.reference(folder, samples)
    scores = vllm_scores(folder)
    found = scores([samples[:9], samples[9:]])
    assert found == pytest.approx(expected, abs=1e-4)
    assert min(expected) < -0.5  # no activation squeezes them between 0 and 1
    assert max(expected) > 1.5
    assert scores([]) == []


def test_what_cannot_be_a_pooling_model(tmp_path):
    folder = tiny_classifiers.save(tmp_path, **SIZES)
    with pytest.raises(ValueError, match=r'engine_type = "vllm", not "native"; without rm_use_en'):
        vllm_scores(folder, engine_type="native")
    with pytest.raises(ValueError, match="no classification head"):
        vllm_scores(tiny_job.MODEL)
    with pytest.raises(ValueError, match=r"vLLM did not start: .*max_model_len"):
        vllm_scores(folder, vllm={"max_model_len": 10_000})


def test_a_judge_in_vllm_answers_as_transformers_does(tmp_path):
    model = tiny.model("qwen2", "eager", seed=7, architectures=["Qwen2ForCausalLM"], **SIZES)
    model.save_pretrained(tmp_path)
    tiny_classifiers.tokenizer(tmp_path)
    config = tiny_config(engine_type="vllm", max_num_seqs=16)

    def build(**options):
        given = {"pretrain": str(tmp_path), "engine": "vllm", "max_len": 64, "max_new_tokens": 6}
        entry = Entry.model_validate({"template": "{{ response }}", **given, **options})
        engine = judge_engine(entry, 64, None, config, torch.float32, CPU)
        return build_judge(entry, config, lambda *_: engine)

    tokenizer, texts, expected = load_tokenizer(str(tmp_path)), ["2+2=5", "1"], []
    for text in texts:
        ids = tokenizer(f"<|user|>{text}\n<|assistant|>", return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=1)
        expected.append([tokenizer.decode(out[0, ids.shape[1] :]).removesuffix("<eos>")])
    assert build().answers(texts, [[1], [2]]) == expected
    sampled = build(votes=3, temperature=1.0).answers
    one, two = sampled(texts, [[1, 2, 3], [4, 5, 6]]), sampled(texts[:1], [[1, 2, 3]])
    assert one[0] == two[0]
    assert len(set(one[0])) == 3


def test_the_job_trains_with_a_pooling_model(tmp_path):
    """Policy and reward model are two engines of one process."""
    folder = tiny_classifiers.save(tmp_path / "rm", **SIZES)
    options = {
        "reward_pretrain": folder,
        "rm_use_engine": True,
        "functions": None,
        "engine_type": "vllm",
        "max_num_seqs": 16,
    }
    asked = []
    with tiny_job.trainer(tmp_path / "run", **options) as job:
        score = job.collector.scorer.score

        def spy(prompts, completions):
            asked.extend(RewardRequest(prompts[c.prompt_index], c) for c in completions)
            return score(prompts, completions)

        job.collector.scorer.score = spy
        assert job.train() is None
    ids = [[*r.prompt.token_ids, *r.completion.token_ids] for r in asked]
    expected = tiny_classifiers.reference(folder, ids)
    rows = rollout(tmp_path / "run", 1) + rollout(tmp_path / "run", 2)
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert len({row["reward"] for row in rows}) > 8


def test_two_ranks_have_an_engine_each(tmp_path):
    options = {
        "reward_pretrain": tiny_classifiers.save(tmp_path / "rm", **SIZES),
        "rm_use_engine": True,
        "engine_type": "vllm",
        "max_steps": 1,
        "functions": "[]",
    }
    for ngpu in (1, 2):
        train(tmp_path / str(ngpu), ngpu, **options)
    one, two = (rollout(tmp_path / str(ngpu), 1) for ngpu in (1, 2))
    assert [row["response"] for row in one] == [row["response"] for row in two]
    expected = [row["reward"] for row in one]
    assert [row["reward"] for row in two] == pytest.approx(expected, abs=1e-4)
