import json
from pathlib import Path

import pytest
import torch
from helpers import run_ranks
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from torchrft.checkpoint.hf_export import export_hf, named_tensors, strip_wrappers


class FakeTokenizer:
    """Stands for a tokenizer: all that the export needs is `save_pretrained`."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def make_model(tied: bool, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    options = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        **changes,
    }
    return Qwen2ForCausalLM(Qwen2Config(**options)).eval()


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_and_gives_identical_logits(tmp_path, tied):
    model = make_model(tied)
    export_hf(model, FakeTokenizer(), tmp_path, torch.float32)
    loaded = load(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert ("lm_head.weight" in names) is (not tied)
    assert "model.embed_tokens.weight" in names
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    generated = loaded.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False))


def test_config_names_dtype_and_architecture_but_not_our_attention(tmp_path):
    model = make_model(tied=True)
    model.config._attn_implementation = "torchrft"
    export_hf(model, FakeTokenizer(), tmp_path, torch.bfloat16)
    text = (tmp_path / "config.json").read_text()
    config = json.loads(text)
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert "torchrft" not in text
    assert model.config._attn_implementation == "torchrft"  # the live model's config is untouched
    weight = load(tmp_path).model.norm.weight
    assert weight.dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_the_debug_model_with_its_tokenizer(tmp_path):
    assets = Path(__file__).resolve().parents[1] / "assets" / "debug_model"
    tokenizer = AutoTokenizer.from_pretrained(assets)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets)).eval()
    export_hf(model, tokenizer, tmp_path, torch.float32)
    loaded, loaded_tokenizer = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("3141=", return_tensors="pt").input_ids
    assert torch.equal(loaded_tokenizer("3141=", return_tensors="pt").input_ids, ids)
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    for file in assets.iterdir():
        if file.name != "config.json":
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*tokens)


def test_large_models_are_split_into_shards_of_bounded_size(tmp_path):
    model = make_model(tied=False)
    limit = 20_000
    export_hf(model, FakeTokenizer(), tmp_path, torch.float32, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    count = len(files)
    assert count > 2
    assert files[0].name == f"model-00001-of-{count:05d}.safetensors"
    assert not (tmp_path / "model.safetensors").exists()
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for file in files:
        with safe_open(file, "pt") as content:
            assert sum(content.get_tensor(key).nbytes for key in content.keys()) <= limit  # noqa: SIM118
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


def test_names_lose_wrappers_and_persistent_buffers_stay():
    assert strip_wrappers("_orig_mod.model.layers.0._checkpoint_wrapped_module.w") == (
        "model.layers.0.w"
    )
    model = make_model(tied=True)
    model.model.register_buffer("kept", torch.ones(2))
    model.model.register_buffer("scratch", torch.ones(2), persistent=False)
    names = named_tensors(torch.compile(model))
    assert set(names) == set(model.state_dict()) - {"lm_head.weight"}
    assert "model.kept" in names
    assert "model.scratch" not in names


def test_an_odd_published_generation_config_does_not_break_the_export(tmp_path):
    model = make_model(tied=True)
    model.generation_config.temperature = 0.7  # without do_sample: save_pretrained refuses it
    export_hf(model, FakeTokenizer(), tmp_path, torch.float32)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.7


def _export_sharded(rank: int, folder: str, tied: bool, blocked: bool) -> str:
    model = make_model(tied)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if blocked:  # rank 0 cannot write
        Path(folder, "model.safetensors").mkdir(exist_ok=True)
    try:
        export_hf(model, FakeTokenizer(), Path(folder), torch.float32)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return type(model).__name__


@pytest.mark.parametrize("tied", [True, False])
def test_export_of_a_model_sharded_over_two_ranks(tmp_path, tied):
    names = run_ranks(_export_sharded, 2, str(tmp_path), tied, False)
    assert names == ["FSDPQwen2ForCausalLM"] * 2
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "Qwen2ForCausalLM"
    ]
    assert torch.equal(load(tmp_path)(IDS).logits, make_model(tied)(IDS).logits)


def test_a_write_failure_reaches_every_rank(tmp_path):
    first, second = run_ranks(_export_sharded, 2, str(tmp_path), True, True)
    assert "Error" in first
    assert not first.startswith("RankError: rank 0")
    assert second.startswith("RankError: rank 0 failed in phase 'write export'")
