"""The default job learned by a family that is not conventional, with the native engine."""

import pytest
import tiny_classifiers
from test_runs import environment, launch
from tiny_job import records
from transformers import AutoConfig

GPT_OSS = {  # sinks, alternating windows and experts
    "vocab_size": 56,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.mark.slow
def test_sinks_windows_and_experts_learn(tmp_path):
    """0.925 of the held-out questions after 41 steps, where a constant answer earns 1/6."""
    AutoConfig.for_model("gpt_oss", **GPT_OSS).save_pretrained(tmp_path / "model")
    tiny_classifiers.tokenizer(tmp_path / "model")
    words = ["--pretrain", f"{tmp_path}/model", "--save_path", f"{tmp_path}/run"]
    options = ["--seed", "0", "--max_steps", "41", "--eval_steps", "20", "--plot_every", "1000"]
    done = launch([*words, *options], environment(1))
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "run")[-1]["eval/reward/mean"] > 0.5
