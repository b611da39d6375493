"""Weights read from files straight into shards."""

import threading
from pathlib import Path

import pytest
import tiny
import tiny_vlm
import torch
from helpers import run_ranks
from safetensors.torch import load_file, save_file

from torchrft.config.job_config import Parallel
from torchrft.learn.batch import make_batch
from torchrft.learn.packing import build
from torchrft.models.heads import ValueModel
from torchrft.models.loader import load_model
from torchrft.models.policy import PolicyModel
from torchrft.models.sharded import ShardedWeights
from torchrft.parallel import ParallelDims, parallelize

LAYOUTS = {
    "dp4": ParallelDims(dp_shard=4),
    "dp2 tp2": ParallelDims(dp_shard=2, tp=2),
    "hsdp": ParallelDims(dp_replicate=2, dp_shard=2),
    "tp2 sp2": ParallelDims(sp=2, tp=2),
}


def filled(folder, wrap, dims):
    weights = ShardedWeights.of(folder)
    assert weights is not None
    model = wrap(weights.model(torch.float32).eval())
    assert any(p.is_meta for p in model.parameters())
    config = Parallel(tp_size=dims.tp, sp_size=dims.sp, dp_replicate=dims.dp_replicate)
    parallelize(model, dims, config)
    weights.fill(model, torch.device("cpu"))
    return model


def whole_weights(rank, folder):
    found = {}
    for name, dims in LAYOUTS.items():
        model = filled(folder, PolicyModel, dims)
        parts = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        values = {key: p.full_tensor().detach() for key, p in model.named_parameters()}
        found[name] = parts[0].weight is parts[1].weight, values
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_every_layout_gets_the_weights_of_the_files(tmp_path, tied):
    model = tiny.model("qwen3", tie_word_embeddings=tied, vocab_size=57)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = dict(PolicyModel(load_model(str(tmp_path))).named_parameters())
    for is_tied, found in run_ranks(whole_weights, 4, str(tmp_path))[0].values():
        assert is_tied == tied
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def critic_weights(rank, folder):
    model = filled(folder, ValueModel, ParallelDims(dp_shard=2, tp=2))
    values = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    assert not values.pop("head.weight").any()
    return values


def test_a_critic_gets_the_decoder(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    expected = dict(ValueModel(load_model(str(tmp_path))).named_parameters())
    found = run_ranks(critic_weights, 4, str(tmp_path))[0]
    assert found.keys() == expected.keys() - {"head.weight"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_files_with_other_names_or_none_are_left_to_the_loader(tmp_path, caplog):
    caplog.set_level("INFO", logger="torchrft")
    assert ShardedWeights.of(str(tmp_path)) is None
    tiny.model("llama").save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    save_file({f"other.{name}": value for name, value in load_file(path).items()}, path)
    assert ShardedWeights.of(str(tmp_path)) is None
    assert "every rank loads the whole model" in caplog.text


def stray(path, name="model.norm.weight"):
    """Other weights, in a file of their own."""
    values = tiny.model("llama", seed=5).state_dict()
    save_file({name: values[name] + 1}, path)


def values_of_two(rank, folder):
    dims = ParallelDims(dp_shard=2)
    found = {}
    for name in ("shards", "single"):
        model = filled(f"{folder}/{name}", PolicyModel, dims)
        found[name] = {key: p.full_tensor().detach() for key, p in model.named_parameters()}
    return found


def test_the_files_are_those_that_transformers_reads(tmp_path):
    """model.safetensors, else those of the index; never what else lies in the folder."""
    for name, seed in (("shards", 1), ("single", 2)):
        tiny.model("llama", seed=seed).save_pretrained(tmp_path / name, max_shard_size="20KB")
        stray(tmp_path / name / "aaa.safetensors")
        stray(tmp_path / name / "zzz.safetensors")
    tiny.model("llama", seed=3).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "single" / "model.safetensors")
    for found in run_ranks(values_of_two, 2, str(tmp_path)):
        for name, values in found.items():
            expected = dict(PolicyModel(load_model(f"{tmp_path}/{name}")).named_parameters())
            assert values.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in values.items())


def test_an_index_that_does_not_fit_is_left_to_the_loader(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert ShardedWeights.of(str(tmp_path)) is not None
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for wrong in ("{", "{}", "[]", text.replace("00001-of", "00009-of")):
        index.write_text(wrong)
        assert ShardedWeights.of(str(tmp_path)) is None
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    index.write_text(text)
    save_file({k: v for f in tmp_path.glob("*-0000[12]-*") for k, v in load_file(f).items()}, first)
    assert ShardedWeights.of(str(tmp_path)) is None  # which of the two would be anybody's guess


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_differ_are_left_to_the_loader(tmp_path, same, caplog):
    caplog.set_level("INFO", logger="torchrft")
    tiny.model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    values = load_file(path)
    head = values["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0 if same else 1
    save_file(values | {"lm_head.weight": head}, path, {"format": "pt"})
    loaded = load_model(str(tmp_path))
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == same  # what one rank does
    assert (ShardedWeights.of(str(tmp_path)) is not None) == same
    assert ("different lm_head.weight and model.embed_tokens.weight" in caplog.text) != same


def anonymous_bytes():
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_growth(rank, folder, sharded):
    """The most memory that loading took, and the bytes of this rank's shards."""
    filled(f"{folder}/small", PolicyModel, ParallelDims(dp_shard=4))  # imports, groups
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    if sharded:
        model = filled(f"{folder}/large", PolicyModel, ParallelDims(dp_shard=4))
    else:
        model = PolicyModel(load_model(f"{folder}/large"))
        parallelize(model, ParallelDims(dp_shard=4), Parallel())
    done.set()
    thread.join()
    return peak - before, sum(p.to_local().nbytes for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_no_rank_ever_holds_the_whole_model(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "small")
    large = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
    model = tiny.model("llama", **large)
    whole = sum(p.nbytes for p in model.parameters())
    assert whole > 80e6
    # In bfloat16, so that float32 weights need memory: equal ones would be views of the file.
    model.bfloat16().save_pretrained(tmp_path / "large")
    for growth, share in run_ranks(peak_growth, 4, str(tmp_path), True):
        assert share == pytest.approx(whole / 4, rel=0.01)
        assert growth < 0.5 * whole
    for growth, _ in run_ranks(peak_growth, 4, str(tmp_path), False):
        assert growth > 0.9 * whole  # so the measurement would show it


def image_logprobs(rank, folder):
    """Of two ranks' shards, for prompts with images."""
    found = {}
    for name in tiny_vlm.FAMILIES:
        policy = filled(f"{folder}/{name}", PolicyModel, ParallelDims(dp_shard=2))
        sees = tiny_vlm.vision(name)
        batch = make_batch(tiny_vlm.samples(sees))
        micro = build(batch, list(range(len(batch))), True, sees)
        with torch.no_grad():
            found[name] = micro.scatter(policy(micro)[0])
    return found


def test_a_vision_language_model_is_read_into_shards(tmp_path):
    """Its files name the weights as they are published, not as its modules do."""
    for name in tiny_vlm.FAMILIES:
        tiny_vlm.model(name).save_pretrained(tmp_path / name, max_shard_size="20KB")
    results = run_ranks(image_logprobs, 2, str(tmp_path))
    for name in tiny_vlm.FAMILIES:
        sees = tiny_vlm.vision(name)
        with torch.no_grad():
            expected = tiny_vlm.reference(tiny_vlm.model(name), sees, tiny_vlm.samples(sees))
        for found in results:
            for row, part in enumerate(expected):
                own = found[name][row, : len(part)]
                torch.testing.assert_close(own, part, atol=1e-5, rtol=1e-5)
