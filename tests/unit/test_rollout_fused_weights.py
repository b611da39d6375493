"""Tensors written where a fused, split model of vLLM's kind holds them, once its own loader has
shown where that is."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from torchrft.rollout.canary import Canary, WeightSyncError
from torchrft.rollout.fused_weights import Places
from torchrft.rollout.vllm_model import load
from torchrft.rollout.weight_sync import named_full_tensors

RANK = 1  # of 2; the model has 4 query and 2 key heads of 8, hidden size 32, MLP 48, 56 tokens


class Layer(torch.nn.Module):
    """Known by the names of its classes and by its attributes, as in vLLM."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=torch.bfloat16))
        self.tp_rank, self.tp_size = RANK, 2


class ColumnParallelLinear(Layer):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    output_partition_sizes, num_kv_head_replicas = (16, 8, 8), 1


class MergedColumnParallelLinear(ColumnParallelLinear):
    output_partition_sizes = (24, 24)


class RowParallelLinear(Layer):
    @property
    def input_size_per_partition(self):
        return self.weight.shape[1]


class VocabParallelEmbedding(Layer):
    shard_indices = SimpleNamespace(org_vocab_start_index=28, org_vocab_end_index=56)


def names(**modules):
    whole = torch.nn.Module()
    for name, module in modules.items():
        whole.add_module(name, module)
    return whole


class Split(torch.nn.Module):
    """Rank 1 of 2 of a tied Llama of one layer, and how many tensors its loader has loaded."""

    def __init__(self):
        super().__init__()
        self.config, self.loaded = SimpleNamespace(tie_word_embeddings=True), 0
        attention = names(qkv_proj=QKVParallelLinear(32, 32), o_proj=RowParallelLinear(32, 16))
        mlp = names(
            gate_up_proj=MergedColumnParallelLinear(48, 32), down_proj=RowParallelLinear(32, 24)
        )
        layer = names(
            self_attn=attention,
            mlp=mlp,
            input_layernorm=Layer(32),
            post_attention_layernorm=Layer(32),
        )
        embed = VocabParallelEmbedding(32, 32)  # four rows are padding
        self.model = names(embed_tokens=embed, layers=torch.nn.ModuleList([layer]), norm=Layer(32))
        self.lm_head = embed

    @torch.no_grad()
    def load_weights(self, pairs):
        def half(tensor, dim=0):
            return tensor.chunk(2, dim)[RANK]

        layer = self.model.layers[0]
        for name, tensor in pairs:
            self.loaded += 1
            match name.split(".")[-2]:
                case "qkv_proj":
                    parts = [half(part) for part in tensor.split([32, 16, 16])]
                    layer.self_attn.qkv_proj.weight.copy_(torch.cat(parts))
                case "gate_up_proj":
                    parts = [half(part) for part in tensor.chunk(2)]
                    layer.mlp.gate_up_proj.weight.copy_(torch.cat(parts))
                case "q_proj":
                    layer.self_attn.qkv_proj.weight[:16] = half(tensor)
                case "k_proj":
                    layer.self_attn.qkv_proj.weight[16:24] = half(tensor)
                case "v_proj":
                    layer.self_attn.qkv_proj.weight[24:] = half(tensor)
                case "o_proj":
                    layer.self_attn.o_proj.weight.copy_(half(tensor, 1))
                case "gate_proj":
                    layer.mlp.gate_up_proj.weight[:24] = half(tensor)
                case "up_proj":
                    layer.mlp.gate_up_proj.weight[24:] = half(tensor)
                case "down_proj":
                    layer.mlp.down_proj.weight.copy_(half(tensor, 1))
                case "embed_tokens":
                    self.model.embed_tokens.weight[:28] = half(tensor)
                    self.model.embed_tokens.weight[28:] = 0
                case _:
                    self.get_parameter(name).copy_(tensor)


def trained(seed, family="llama"):
    return tiny.model(family, seed=seed, num_hidden_layers=1, tie_word_embeddings=True)


@pytest.mark.parametrize("family", ["llama", "phi3"])  # whose projections are fused already
def test_proven_places_are_written_directly(family):
    """The second time the loader loads nothing, and the memory is what it would have been."""
    expected, split = trained(0, family), Split()
    places = Places(split)
    for seed in (1, 2):
        load(places, expected, named_full_tensors(trained(seed, family)), None)
    assert split.loaded == len(list(expected.parameters()))
    reference = Split()
    reference.load_weights(named_full_tensors(trained(2, family)))
    for (name, a), (_, b) in zip(
        split.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.isfinite().all(), name


def swapped(parameter):
    parameter.data = torch.zeros_like(parameter)


def turned(parameter):
    """Another layout of the same memory."""
    parameter.data = parameter.data.zero_().view(parameter.shape[::-1]).t()


@pytest.mark.parametrize("change", ["replaced", swapped, turned])
def test_memory_that_has_moved_is_found_again(change):
    """An engine may put other parameters, or other memory, in the place of those it had."""
    expected, split = trained(0), Split()
    places = Places(split)
    load(places, expected, named_full_tensors(trained(1)), None)
    for module in list(split.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if change == "replaced":
                setattr(module, name, torch.nn.Parameter(torch.zeros_like(parameter)))
            elif parameter.dim() > 1 or change is swapped:
                change(parameter)
    load(places, expected, named_full_tensors(trained(2)), None)
    reference = Split()
    reference.load_weights(named_full_tensors(trained(2)))
    for (name, a), (_, b) in zip(
        split.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    split.model.norm.weight.data = torch.ones(32, dtype=torch.bfloat16)  # the canary looks there
    assert torch.equal(places("model.norm.weight")[0].read(), torch.ones(32).bfloat16())


FAULTS = {
    "permuted": lambda t: t.flip(0),
    "stale": lambda t: t + 0.1,
    "dropped": lambda t: None,
    "wrong at the end": lambda t: torch.cat([t[:-1], t[-1:] + 0.1]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "wrong"),
    [(f, name) for f in ("llama", "phi3") for name, _ in trained(0, f).named_parameters()],
)
@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_direct_write_is_named(family, wrong, change, monkeypatch):
    split, watch = Split(), Canary.watch
    places, expected, sent = Places(split), trained(0, family), trained(1, family)
    for parameter in sent.parameters():  # norms of ones are the same in any order
        parameter.requires_grad_(False).add_(torch.randn_like(parameter))
    load(places, expected, named_full_tensors(trained(0, family)), None)

    def faulty(self, pairs):
        for name, tensor in watch(self, pairs):
            tensor = change(tensor) if name == wrong else tensor
            if tensor is not None:
                yield name, tensor

    monkeypatch.setattr(Canary, "watch", faulty)
    with pytest.raises(WeightSyncError, match=f'does not hold "{wrong}"'):
        load(places, expected, named_full_tensors(sent), None)


def test_a_place_that_is_not_the_loaders_stops_the_first_hand_over():
    split = Split()
    split.model.layers[0].self_attn.qkv_proj.num_kv_head_replicas = 2
    with pytest.raises(WeightSyncError, match=r'"model.layers.0.self_attn.k_proj.weight".*2 of'):
        load(Places(split), trained(0), named_full_tensors(trained(1)), None)


def test_what_lies_partly_elsewhere_is_left_to_the_loader():
    split = Split()
    split.model.layers[0].mlp.gate_up_proj.output_partition_sizes = (24,)
    places = Places(split)
    for seed in (1, 2):
        load(places, trained(0, "phi3"), named_full_tensors(trained(seed, "phi3")), None)
    assert places.loaded == places.proven
    assert "model.layers.0.mlp.gate_up_proj.weight" not in places.proven
    assert split.loaded == len(list(trained(0, "phi3").parameters())) + 1


def test_another_shape_in_memory_is_written_too():
    """As a convolution over patches that an engine computes as a matrix product."""
    model = names(patches=torch.nn.Linear(12, 3, bias=False))
    model.config = SimpleNamespace(tie_word_embeddings=False)
    model.load_weights = lambda pairs: [
        model.patches.weight.data.copy_(tensor.view(3, 12)) for _, tensor in pairs
    ]
    expected = names(patches=torch.nn.Conv2d(3, 3, 2, bias=False))
    expected.config = tiny.config("llama")
    places = Places(model)
    for seed in (1, 2):
        sent = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        load(places, expected, [("patches.weight", sent)], None)
        assert torch.equal(model.patches.weight.view(3, 3, 2, 2), sent)
    assert places.proven == {"patches.weight"}
