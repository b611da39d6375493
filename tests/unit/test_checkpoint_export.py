import json
from pathlib import Path

import pytest
import torch
from helpers import run_ranks
from safetensors import safe_open
from tiny_job import ASSETS, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from torchrft.checkpoint.hf_export import (
    export_hf,
    files_beside_weights,
    named_tensors,
    strip_wrappers,
)
from torchrft.models.loader import load_model
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer


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


GENERATION = (
    '{"eos_token_id": [1, 7, 9],\n "temperature": 0.6, "top_p": 0.95, "do_sample": false}\n'
)
# Beside weights: arbitrary bytes, which no loader would write again as they are.
OTHERS = {
    "generation_config.json": GENERATION.encode(),
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}\r\n",
    "preprocessor_config.json": b'{"image_processor_type":   "X"}',
    "tokenizer.model": bytes(range(256)),
    "modeling_custom.py": b"CLASS = 1  \n",
    "__init__.py": b"",
    "vocab.txt": b"a\nb",
    "LICENSE": b"terms\n",
    "README.md": b"# Model\n",
}
NOT_COPIED = (
    *("stray.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"),
    *("model.gguf", "optimizer.pt", "rng_state.pth", "original/consolidated.00.pth"),
    *("original/params.json", "checkpoint-5/config.json", "checkpoint-5/model.safetensors"),
    *(".git/HEAD", ".gitattributes", "__pycache__/x.pyc", "onnx/Model.ONNX", "onnx/config.json"),
    "adapter_config.json",
)


def source(folder, tied=True, **options):
    """A published model: weights, config, tokenizer and much else."""
    make_model(tied, vocab_size=56, eos_token_id=1, pad_token_id=1, **options).save_pretrained(
        folder
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((ASSETS / "debug_model" / name).read_bytes())
    for name, content in OTHERS.items() | {(name, b"0") for name in NOT_COPIED}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_copied(export, folder):
    """All but the weights and what training decides, and nothing else."""
    found, given = contents(export), contents(folder)
    expected = {name: given[name] for name in given.keys() - {*NOT_COPIED}}
    assert found.keys() == expected.keys()
    for name in found.keys() - {"config.json", "model.safetensors"}:
        assert found[name] == expected[name], name


def train(rank, folder, save_path, world_size, init, options):
    torch.set_num_threads(1)
    config = tiny_config(
        world_size, pretrain=folder, init=init, save_path=save_path, max_steps=1, **options
    )
    job = Trainer(config, World(rank, world_size, rank, torch.device("cpu")))
    stops = job.engine.stop_token_ids
    job.train()
    return stops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "init"), [(1, "pretrained"), (1, "random"), (2, "pretrained"), (2, "random")]
)
def test_what_lies_beside_the_weights_arrives_unchanged(tmp_path, ranks, init):
    folder = source(tmp_path / "source")
    stops = run_ranks(train, ranks, folder, str(tmp_path / "run"), ranks, init, {})
    assert stops == [(1, 7, 9)] * ranks  # what ends a rollout
    export = tmp_path / "run" / "hf" / "step-1"
    assert_copied(export, folder)
    before, after = (json.loads((p / "config.json").read_text()) for p in (Path(folder), export))
    assert before == after  # float32 is the dtype that this job computes in
    loaded = load(export)
    assert loaded.generation_config.eos_token_id == [1, 7, 9]
    with torch.no_grad():  # a head that always prefers the second end of turn
        loaded.lm_head.weight = torch.nn.Parameter(torch.zeros(56, 32))
        loaded.lm_head.weight[7] = loaded(IDS[:1], output_hidden_states=True).hidden_states[-1][
            0, -1
        ]
    assert loaded.generate(IDS[:1], max_new_tokens=9)[0, IDS.shape[1] :].tolist() == [7]
    ids = AutoTokenizer.from_pretrained(export)("3141=").input_ids
    assert ids == AutoTokenizer.from_pretrained(folder)("3141=").input_ids


def test_the_source_may_be_gone_when_the_export_is_due(tmp_path):
    folder = source(tmp_path / "source")
    config = tiny_config(1, pretrain=folder, init="pretrained", save_path=str(tmp_path / "run"))
    job = Trainer(config, World(0, 1, 0, torch.device("cpu")))
    given = tmp_path / "moved"
    Path(folder).rename(given)
    job.train()
    assert_copied(tmp_path / "run" / "hf" / "step-2", given)


def test_an_old_config_with_sampling_defaults_does_not_break_the_export(tmp_path):
    """save_pretrained would refuse it: `temperature` belongs into the generation config."""
    folder = Path(source(tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 0.5, "mine": [1, {}]}))
    model = load_model(str(folder))
    (tmp_path / "hf").mkdir()
    export_hf(model, AutoTokenizer.from_pretrained(folder), tmp_path / "hf", torch.float32)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["mine"] == [1, {}]
    assert_copied(tmp_path / "hf", folder)


def test_a_model_of_the_hub_brings_what_its_cache_holds(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    source(snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    files = files_beside_weights("some/model")
    assert files == {k: v for k, v in contents(snapshot).items() if k in {*OTHERS, *files}}
    assert files.keys() > OTHERS.keys()
    assert not files.keys() & {*NOT_COPIED, "model.safetensors"}
    assert files_beside_weights("some/other") == files_beside_weights(None) == {}
    assert files_beside_weights("") == {}  # and not what lies in the working directory


def test_what_is_large_or_unreadable_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torchrft.checkpoint.hf_export._MAX_OTHER_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"a" * 700)
    (tmp_path / "Data").mkdir()  # before the others in their order, but small files go first
    for number in range(4):
        (tmp_path / "Data" / f"{number}.jsonl").write_bytes(b"d" * 200)
    (tmp_path / "z.txt").write_bytes(b"z" * 300)
    assert files_beside_weights(str(tmp_path)).keys() == {"a.txt", "z.txt"}
    assert f"{tmp_path}/Data has 0 MB: too large to copy into exports" in caplog.text
    for method in ("read_bytes", "iterdir"):  # a file, and a folder
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, lambda path: (_ for _ in ()).throw(OSError(13, "no")))
            with pytest.raises(ValueError, match=r"copy all but the weights .*; make it readable"):
                files_beside_weights(str(tmp_path))


def test_a_tokenizer_from_elsewhere_is_written(tmp_path):
    folder = source(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "debug_vlm")
    (tmp_path / "hf").mkdir()
    export_hf(load_model(folder), tokenizer, tmp_path / "hf", torch.float32)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (tmp_path / "hf" / "generation_config.json").read_text() == GENERATION
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
