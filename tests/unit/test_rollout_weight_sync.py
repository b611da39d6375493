"""Weights by name, whole, each once."""

import helpers
import pytest
import tiny
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchrft.rollout.weight_sync import copy_weights, named_full_tensors


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values(tied):
    model = tiny.model("qwen2", tie_word_embeddings=tied)
    tensors = dict(named_full_tensors(model))
    assert len(list(named_full_tensors(model))) == len(tensors)
    assert ("lm_head.weight" in tensors) is not tied
    assert "model.embed_tokens.weight" in tensors
    assert tensors.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter)
        assert not tensors[name].requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_copy(tied):
    source = tiny.model("qwen2", seed=1, tie_word_embeddings=tied)
    target = tiny.model("qwen2", seed=2, tie_word_embeddings=tied).to(torch.bfloat16)
    copy_weights(target, named_full_tensors(source))
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name).to(torch.bfloat16))
    assert (target.lm_head.weight is target.model.embed_tokens.weight) is tied


def test_either_name_of_a_tied_weight_will_do():
    source = tiny.model("qwen2", seed=1, tie_word_embeddings=True)
    target = tiny.model("qwen2", seed=2, tie_word_embeddings=True)
    tensors = dict(named_full_tensors(source))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    copy_weights(target, tensors.items())
    assert torch.equal(target.model.embed_tokens.weight, source.lm_head.weight)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({"2.weight": torch.zeros(1)}), 'has no parameter "2.weight"'),
        (lambda t: t.pop("1.bias"), 'no value came for "1.bias"'),
        (
            lambda t: t.update({"0.weight": torch.zeros(4, 5)}),
            r'"0.weight" is \(4, 5\) in the trainer and \(4, 3\) in the engine',
        ),
        (lambda t: t.update({"0.bias": torch.zeros(1)}), r'"0.bias" is \(1,\)'),  # no broadcast
    ],
)
def test_copy_errors(change, match):
    tensors = dict(named_full_tensors(layers()))
    change(tensors)
    with pytest.raises(ValueError, match=match):
        copy_weights(layers(), tensors.items())


def gathered(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = layers()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fully_shard(model, mesh=mesh)
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    got = dict(named_full_tensors(model))
    return got.keys() == whole.keys() and all(torch.equal(got[n], whole[n]) for n in whole)


def test_sharded_parameters_are_gathered():
    assert helpers.run_ranks(gathered, 2) == [True, True]
