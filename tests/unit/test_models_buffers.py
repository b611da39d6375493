"""Persistent buffers travel wherever parameters do: from files to ranks, engines and exports.

Expected is always transformers' own model of the same files.
"""

import json
from pathlib import Path

import pytest
import tiny
import tiny_buffers
import torch
from helpers import run_ranks
from safetensors.torch import load_file, save_file
from tiny_job import MODEL, tiny_config
from transformers import AutoModelForCausalLM

from torchrft.build.models import ModelBuilder
from torchrft.checkpoint.hf_export import export_hf
from torchrft.checkpoint.state_io import load_state, save_state
from torchrft.learn.packing import build
from torchrft.models.loader import (
    expected_model,
    load_config,
    load_model,
    load_tokenizer,
    persistent_buffers,
)
from torchrft.models.sharded import ShardedWeights
from torchrft.parallel import ParallelDims
from torchrft.rollout import sglang_loader
from torchrft.rollout.canary import WeightSyncError
from torchrft.rollout.fused_weights import Places
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.vllm_model import load
from torchrft.rollout.weight_sync import copy_weights, layout, named_full_tensors
from torchrft.tools.distributed import World
from torchrft.types import Prompt, SamplingParams

GROUPS = [(3, [4, 1, 7]), (6, [2]), (1, [1, 5])]
TOKENIZER = load_tokenizer(MODEL)


@torch.no_grad()
def reference(model, batch):
    """Log-probs of all response tokens, each sample alone."""
    rows = zip(batch.sequences, batch.prompt_lens.tolist(), strict=True)
    logits = [(s, n, model(s[None]).logits[0, n - 1 : -1].float()) for s, n in rows]
    return torch.cat([x.log_softmax(-1).gather(1, s[n:, None])[:, 0] for s, n, x in logits])


def policy(source, dtype=torch.float32, rank=0, world_size=1, **options):
    """As a job builds it."""
    config = tiny_config(world_size, pretrain=source, init="pretrained", **options)
    world = World(rank, world_size, rank, torch.device("cpu"))
    dims = ParallelDims.of(config.parallel, world_size)
    return ModelBuilder(config, world, dims, dtype).policy(source, "pretrained", torch.float32)


@torch.no_grad()
def logprobs(model, packed=True):
    batch = tiny.batch(GROUPS)
    return model(build(batch, list(range(len(batch))), packed))[0]


def exported(model, folder, dtype):
    folder.mkdir()
    export_hf(model, TOKENIZER, folder, dtype)
    return folder


def files_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in tiny_buffers.FAMILIES if name[:4] != "deep"])
def test_engine_and_policy_compute_what_transformers_does(tmp_path, family):
    whole = tiny_buffers.save(family, tmp_path / "model")
    fresh = tiny.model(family, "eager", **tiny_buffers.FAMILIES[family])
    batch = tiny.batch(GROUPS)
    wanted = reference(whole, batch)
    assert (reference(fresh, batch) - wanted).abs().max() > 1e-2  # the buffers matter
    made = policy(str(tmp_path / "model"))
    for packed in (True, False):
        torch.testing.assert_close(logprobs(made, packed), wanted, rtol=1e-4, atol=3e-5)
    engine = NativeEngine(load_config(str(tmp_path / "model")), TOKENIZER, (1,))
    engine.update_weights(named_full_tensors(made.model), 0)
    prompt = Prompt(0, "", (9, 10, 11, 18))
    options = SamplingParams(n=3, max_new_tokens=8, seeds=((1, 2, 3),))
    for completion in engine.generate([prompt], options):
        ids = torch.tensor([*prompt.token_ids, *completion.token_ids])
        with torch.no_grad():
            log_p = whole(ids[None]).logits[0, 3:-1].log_softmax(-1)
        expected = log_p.gather(1, ids[4:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny_buffers.FAMILIES)
def test_dtypes_are_those_of_transformers(tmp_path, family, dtype):
    """A router's correction stays float32 in most bfloat16 models; a layer's scale does not."""
    source = str(tmp_path / "model")
    tiny_buffers.save(family, source)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    whole.save_pretrained(tmp_path / "expected")
    wanted = dict(persistent_buffers(whole))
    engine = NativeEngine(load_config(source), TOKENIZER, (1,), dtype=dtype)
    sent = load_model(source)
    engine.update_weights(named_full_tensors(sent), 0)
    assert_equal(dict(persistent_buffers(engine.model)), wanted)
    found = files_of(exported(sent, tmp_path / "hf", dtype))
    assert_equal(found, files_of(tmp_path / "expected"))
    expected = {k: v.dtype for k, v in expected_model(sent.config, dtype).state_dict().items()}
    assert expected == {name: value.dtype for name, value in whole.state_dict().items()}


def two_ranks(rank, folder, families, options, dtype):
    results = {}
    for family in families:
        made = policy(f"{folder}/{family}", dtype, rank, 2, **options)
        sent = {name: value.clone() for name, value in named_full_tensors(made.model)}
        export_hf(made.model, TOKENIZER, Path(folder, f"{family}-hf"), dtype)
        results[family] = logprobs(made), sent
    return results


def run_two(folder, families, options, dtype=torch.float32):
    wholes = {}
    for family in families:
        wholes[family] = tiny_buffers.save(family, folder / family)
        (folder / f"{family}-hf").mkdir()
    return wholes, run_ranks(two_ranks, 2, str(folder), families, options, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("families", "options"),
    [
        (["gemma4_text", "apertus", "glm4_moe", "dots1", "minimax_m2", "lfm2_moe"], {}),
        (["gemma4_text", "apertus"], {"gradient_checkpointing": True, "sp_size": 2}),
    ],
    ids=["fsdp", "sp"],
)
def test_two_ranks_hold_send_and_export_them(tmp_path, families, options):
    wholes, results = run_two(tmp_path, families, options)
    for family, whole in wholes.items():
        unique = {id(p): name for name, p in reversed([*whole.named_parameters()])}
        wanted = {name: whole.get_parameter(name).detach() for name in unique.values()}
        wanted |= persistent_buffers(whole)
        for found, sent in (result[family] for result in results):
            expected = reference(whole, tiny.batch(GROUPS))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)
            assert_equal(sent, wanted)
        assert_equal(files_of(tmp_path / f"{family}-hf"), files_of(tmp_path / family))
        _, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{family}-hf", output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_two_ranks_in_bfloat16(tmp_path):
    families = ["gemma4_text", "apertus", "glm4_moe"]
    _, results = run_two(tmp_path, families, {}, torch.bfloat16)
    for family in families:
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
        whole.save_pretrained(tmp_path / "expected")
        assert_equal(files_of(tmp_path / f"{family}-hf"), files_of(tmp_path / "expected"))
        for _, sent in (result[family] for result in results):
            buffers = dict(persistent_buffers(whole))
            assert_equal({name: sent[name] for name in buffers}, buffers)


def split_by_tensors(rank, folder):
    with pytest.raises(ValueError) as caught:
        policy(folder, torch.float32, rank, 2, tp_size=2)
    return str(caught.value)


def test_weights_inside_an_activation_refuse_tensor_parallelism(tmp_path):
    tiny_buffers.save("apertus", tmp_path)
    expected = "tp_size = 2: layers.0.mlp.act_fn of ApertusModel has weights that are not in its"
    assert all(text.startswith(expected) for text in run_ranks(split_by_tensors, 2, str(tmp_path)))


def test_dense_families_go_straight_into_shards(tmp_path):
    for family in tiny_buffers.DENSE:
        tiny_buffers.save(family, tmp_path / family)
        weights = ShardedWeights.of(str(tmp_path / family))
        assert weights is not None
        names = dict(persistent_buffers(weights.model(torch.float32))).keys()
        assert names
        assert names <= weights.names.keys()


def test_a_buffer_that_files_lack_is_transformers_own(tmp_path, caplog):
    source = tmp_path / "model"
    tiny_buffers.save("gemma4_text", source)
    path = source / "model.safetensors"
    values = load_file(path)
    name = "model.layers.1.layer_scalar"
    save_file({k: v for k, v in values.items() if k != name}, path, {"format": "pt"})
    model = load_model(str(source))
    assert f"lacks buffers of the model: {name}" in caplog.text
    buffers = dict(persistent_buffers(model))
    assert buffers.pop(name).item() == 1.0
    assert all(torch.equal(value, values[key]) for key, value in buffers.items())
    assert ShardedWeights.of(str(source)) is None  # the loader of whole models says so
    del values["model.norm.weight"]
    save_file(values, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of the model: model\.norm\.weight"):
        load_model(str(source))


def test_constants_that_files_need_not_hold_do_not_travel(tmp_path):
    """Rotary tables are computed, also where an old file holds one of that name."""
    tiny.model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.rotary_emb.inv_freq": torch.full((4,), 7.0)}, path)
    assert "model.rotary_emb.inv_freq" not in ShardedWeights.of(str(tmp_path)).names
    assert not dict(persistent_buffers(tiny.model("llama")))
    sent = dict(named_full_tensors(tiny.model("llama")))
    assert sent.keys() == dict(tiny.model("llama").named_parameters()).keys()


@pytest.mark.parametrize("family", ["gemma4_text", "glm4_moe"])
def test_the_canary_watches_them(family):
    sent = dict(named_full_tensors(tiny_buffers.model(family, seed=1)))
    name = next(name for name, _ in persistent_buffers(tiny_buffers.model(family)))
    target = tiny_buffers.model(family, seed=2)
    copy_weights(target, sent.items())
    assert torch.equal(target.get_buffer(name), sent[name])
    with pytest.raises(ValueError, match=f'no value came for "{name}"'):
        copy_weights(target, [(key, value) for key, value in sent.items() if key != name])
    with pytest.raises(ValueError, match=f'"{name}" is \\(9,\\) in the trainer'):
        copy_weights(target, (sent | {name: torch.zeros(9)}).items())

    class Stuck(torch.Tensor):
        """Memory that keeps what it held."""

        def copy_(self, *args, **kwargs):
            return self

    module, leaf = target.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    module._buffers[leaf] = module._buffers[leaf].as_subclass(Stuck)
    with pytest.raises(WeightSyncError, match=f'does not hold "{name}"'):
        copy_weights(target, (sent | {name: sent[name] + 1}).items())
    plain = layout(target)
    target.register_buffer("another", torch.ones(1))
    assert layout(target) != plain  # which servers compare


class Engine(torch.nn.Module):
    """Of vLLM's kind: its own loader takes every tensor by its name."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head, self.config, self.names = model.model, model.lm_head, None, []

    @torch.no_grad()
    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.names.append(name)
            self.state_dict(keep_vars=True)[name].copy_(tensor)


@pytest.mark.parametrize("family", tiny_buffers.DENSE)
def test_engines_that_began_with_random_numbers_are_filled(family):
    """Also those of no dimension; the second time they are written where they lie."""
    engine = Engine(tiny.model(family, **tiny_buffers.FAMILIES[family]))
    engine.config = tiny.config(family, **tiny_buffers.FAMILIES[family])
    for value in engine.state_dict().values():
        value.fill_(torch.nan)
    places = Places(engine)
    for seed in (1, 2):
        sent = tiny_buffers.model(family, seed=seed)
        load(places, expected_model(engine.config, torch.float32), named_full_tensors(sent), None)
        assert_equal(dict(persistent_buffers(engine)), dict(persistent_buffers(sent)))
    assert len(engine.names) == len([*named_full_tensors(sent)])


def test_tensors_of_several_dtypes_share_a_bucket():
    """Odd numbers of bfloat16 numbers before float32 and int64 ones."""
    bucket = [
        ("a", torch.randn(3, dtype=torch.bfloat16)),
        ("b", torch.tensor(2.5)),
        ("c", torch.randn(1, dtype=torch.bfloat16)),
        ("d", torch.tensor([2**40, -1])),
        ("e", torch.randn(5, 3)),
    ]
    payload = dict(sglang_loader.pack(bucket, torch.full((1,), -1, dtype=torch.int32)))
    received = [(name, tensor) for name, tensor, _ in sglang_loader.unpack(payload)]
    assert_equal(dict(received), dict(bucket))
    assert len(received) == len(bucket)


def test_checkpoints_hold_them(tmp_path):
    tiny_buffers.save("gemma4_text", tmp_path / "model")
    saved = load_model(str(tmp_path / "model"))
    save_state(tmp_path / "step-1", {"policy": saved.state_dict()})
    other = tiny_buffers.model("gemma4_text", seed=3)
    load_state(tmp_path / "step-1", {"policy": other.state_dict()})
    assert_equal(dict(persistent_buffers(other)), dict(persistent_buffers(saved)))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
