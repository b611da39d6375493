"""Whole runs on images with real vLLM on the CPU."""

import json
import shutil

import pytest
import tiny_vlm
from test_vllm_trainer import train, values
from test_vllm_vision import weights
from tiny_job import ASSETS, ROOT, SPREAD, records, rollout

RECIPE = ROOT / "train_configs" / "debug_vlm.toml"
# So that both engines sample the same tokens and yet learn: they have generators of their own.
GREEDY = {"top_k": 1, "n_samples_per_prompt": 2, "advantage_estimator": "reinforce"}


@pytest.mark.slow
def test_the_recipe_takes_the_native_engines_steps(tmp_path):
    """Rollouts, losses, gradients and evaluation of the first steps of debug_vlm.toml, from weights
    by which pictures have different answers."""
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "debug_vlm", folder)
    weights(str(folder), seed=1).save_pretrained(folder)
    options = {"train_batch_size": 96, "micro_train_batch_size": 32, "max_new_tokens": 4}
    options |= GREEDY | {"max_steps": 3, "eval_steps": 1, "functions": SPREAD}
    options |= {"pretrain": folder, "init": "pretrained"}
    for engine in ("native", "vllm"):
        train(tmp_path / engine, config=RECIPE, engine_type=engine, **options)
    found, wanted = values(tmp_path / "vllm"), values(tmp_path / "native")
    seen = []
    for step, (mine, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        ours, others = rollout(tmp_path / "vllm", step), rollout(tmp_path / "native", step)
        assert [row["response"] for row in ours] == [row["response"] for row in others]
        seen.append(len({row["response"] for row in ours}))
        for metrics in (mine, theirs):
            assert max(v for k, v in metrics.items() if k.startswith("mismatch/logprob")) < 2e-4
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-4)
        assert mine["grad_norm"] > 0.01
    assert seen[0] > 10  # different answers
    assert min(seen) > 2


def test_the_guides_vision_command_runs(tmp_path):
    """With a tiny model that has room for its 4,096 tokens, on two ranks with one engine."""
    folder, prompts = tmp_path / "model", tmp_path / "mixed.jsonl"
    shutil.copytree(ASSETS / "debug_vlm", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    lines = (ASSETS / "color" / "train.jsonl").read_text().splitlines()[:32]
    rows = [json.loads(line) for line in lines]
    for row in rows[1::2]:
        del row["images"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "nothing.toml").touch()
    options = {"pretrain": folder, "init": "random", "prompt_data": prompts, "max_steps": 1}
    options |= {"engine_type": "vllm", "engine_tp_size": 2, "engine_mem_util": 0.6}
    options |= {"functions": "exact_match", "apply_chat_template": "true", "max_new_tokens": 4}
    words, run = tiny_vlm.GUIDE.split(), tmp_path / "run"
    train(run, 2, *words, config=tmp_path / "nothing.toml", **options)
    (line,) = records(run)
    assert line["update/optimizer_steps"] == 2
    assert line["mismatch/logprob_abs_mean"] < 0.05  # bfloat16
    assert len(rollout(run, 1)) == 128
    assert (run / "hf" / "step-1" / "processor_config.json").exists()
