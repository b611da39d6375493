"""What is kept, recomputed and sharded."""

import re
from functools import partial

import pytest
import tiny
import torch
from helpers import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from torchrft.config.job_config import Parallel
from torchrft.learn.packing import build
from torchrft.models.policy import PolicyModel
from torchrft.parallel import ParallelDims, deepspeed, parallelize
from torchrft.parallel.tensor_parallel import layer_plan_of
from torchrft.tools import distributed

MATMULS = ("aten.mm.default", "aten.addmm.default")


class CountMatmuls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += str(op) in MATMULS
        return op(*args, **(kwargs or {}))


def matmuls_of_backward(mode):
    model = PolicyModel(tiny.model("llama"))
    parallelize(model, ParallelDims(), Parallel(), gradient_checkpointing=mode)
    batch = tiny.batch([(3, [2, 4]), (5, [1])])
    logprobs, _ = model(build(batch, [0, 1, 2], True))
    with CountMatmuls() as counter:
        logprobs.sum().backward()
    return counter.count


def test_checkpointing_keeps_less():
    """A layer has 7 matmuls; of the 14 all are computed again, or every other one is kept.

    The last ones of a layer need not be: nothing in the backward pass uses their result.
    """
    plain, full, selective = map(matmuls_of_backward, (None, "full", "selective"))
    assert plain == 2 * (14 + 1)  # a gradient each of weight and input, and the head
    assert full - plain in (12, 14)
    assert 4 <= selective - plain <= 8


def dropout_gradients(mode, rates):
    torch.manual_seed(0)
    model = gpt2(n_layer=2, **({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} | rates))
    model.train()
    parallelize(model, ParallelDims(), Parallel(), gradient_checkpointing=mode)
    torch.manual_seed(1)
    logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    logits.log_softmax(-1)[..., 1].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rates", [{"resid_pdrop": 0.3}, {"attn_pdrop": 0.3}])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_draws_the_same_dropout_again(mode, rates):
    plain = dropout_gradients(None, rates)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    torch.testing.assert_close(dropout_gradients(mode, rates), plain, rtol=1e-5, atol=1e-6)


def test_checkpointing_refuses_a_cache():
    model = parallelize(gpt2(), ParallelDims(), Parallel(), gradient_checkpointing="full")
    with pytest.raises(ValueError, match="fill its KV cache twice; call the model with use_cache"):
        model(input_ids=torch.arange(8)[None])
    with torch.no_grad():
        assert model(input_ids=torch.arange(8)[None]).past_key_values.get_seq_length() == 8


def hsdp(rank):
    model = PolicyModel(tiny.model("llama"))
    dims = ParallelDims(dp_replicate=2, dp_shard=2)
    parallelize(model, dims, Parallel(dp_replicate=2))
    whole = tiny.model("llama")
    local = sum(p.to_local().numel() for p in model.parameters())
    return (
        {tuple(p.placements) for p in model.parameters()},
        local / sum(p.numel() for p in whole.parameters()),
    )


def test_replicas_are_sharded_within():
    for placements, share in run_ranks(hsdp, 4):
        assert placements == {(Replicate(), Shard(0))}
        assert share == pytest.approx(0.5)


def gathered(rank, tied, plain):
    """Whether embedding and head are gathered while the last layer runs, forward and backward;
    what the model computes is checked against one process."""
    found, results = [], []
    batch = tiny.batch([(3, [2, 4]), (5, [1])])
    inputs = build(batch, [0, 1, 2], True)
    for sharded in (False, True):
        model = tiny.model("llama", "sdpa" if plain else "torchrft", tie_word_embeddings=tied)
        whole = model if plain else PolicyModel(model)
        if sharded:
            parallelize(whole, ParallelDims(dp_shard=2), Parallel(zero_stage=3))
            parts = model.get_input_embeddings(), model.get_output_embeddings()
            look = partial(lambda parts, *_: found.append(list(map(is_whole, parts))), parts)
            model.model.layers[-1].mlp.register_forward_pre_hook(look)
            model.model.layers[-1].mlp.register_full_backward_pre_hook(look)
        if plain:
            values = whole(inputs.input_ids).logits.log_softmax(-1)[..., 1]
        else:
            values = whole(inputs)[0]
        values.sum().backward()
        gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
        if sharded:
            gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        results.append({"values": values.detach()} | gradients)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    return found


def is_whole(module):
    return not isinstance(module.weight, DTensor)


@pytest.mark.parametrize("plain", [False, True], ids=["policy", "plain"])
def test_embedding_and_head_are_gathered_only_for_their_own_work(plain):
    assert run_ranks(gathered, 2, False, plain) == [[[False, False], [False, False]]] * 2


def test_tied_ones_stay_gathered():
    assert run_ranks(gathered, 2, True, False) == [[[True, True], [True, True]]] * 2


def offloaded(rank):
    model = PolicyModel(tiny.model("llama"))
    config = Parallel(fsdp=True, fsdp_cpu_offload=True)
    parallelize(model, ParallelDims(dp_shard=2), config)
    groups = [
        module._get_fsdp_state()._fsdp_param_group
        for module in model.modules()
        if hasattr(module, "_get_fsdp_state")
    ]
    return [
        all(parameter.offload_to_cpu for parameter in group.fsdp_params)
        for group in groups
        if group is not None
    ]


def test_cpu_offload_keeps_shards_on_the_host():
    """On a CPU only FSDP2's own switch shows it; tests/gpu has the devices."""
    assert run_ranks(offloaded, 2) == [[True] * 5] * 2  # 2 layers, embedding, head, the rest


@pytest.mark.parametrize(
    ("family", "tp", "message"),
    [
        ({"family": "llama"}, 4, "tp_size = 4 must divide num_key_value_heads = 2 of LlamaModel"),
        (
            {"family": "llama", "intermediate_size": 49},
            2,
            "tp_size = 2 must divide out_features = 49 of layers.0.mlp.gate_proj in LlamaModel: "
            "49 % 2 = 1; use a divisor of 49, or dp_shard instead",
        ),
        ({"family": "gpt2"}, 2, "GPT2Model has no base_model_tp_plan"),
    ],
)
def test_models_that_tensor_parallelism_refuses(family, tp, message):
    for text in run_ranks(refusal, tp, family):
        assert message in text


def test_only_layers_are_taken_from_the_plan():
    """Some versions of transformers plan tied embeddings as well."""
    model = tiny.model("qwen2", tie_word_embeddings=True)
    rowwise = {"layers.*.mlp.down_proj": "rowwise"}
    model.config.base_model_tp_plan = rowwise | {"embed_tokens": "embedding_rowwise"}
    assert layer_plan_of(model.get_decoder()) == rowwise


def refusal(rank, family):
    world_size = torch.distributed.get_world_size()
    model = tiny.model(**family) if family["family"] != "gpt2" else gpt2()
    try:
        parallelize(model, ParallelDims(tp=world_size), Parallel(tp_size=world_size))
    except ValueError as error:
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            {"gradient_checkpointing": "fulll"},
            'gradient_checkpointing = "fulll" must be "full", "selective" or None',
        ),
        (
            lambda: nn.Linear(2, 2),
            {"compile": True, "dims": ParallelDims(tp=2)},
            "compile with tp_size = 2 needs gradient_checkpointing",
        ),
        (
            lambda: nn.Linear(2, 2),
            {"gradient_checkpointing": "full"},
            "gradient_checkpointing works on repeated layers, of which Linear has none",
        ),
        (lambda: nn.Linear(2, 2), {"compile": True}, "compile works on repeated layers, of which"),
        (
            lambda: tiny.model("llama"),
            {"dtype": torch.bfloat16},
            "torch.bfloat16 needs FSDP2 and a process group: call torchrft.tools.distributed.setup",
        ),
    ],
)
def test_options_that_are_refused(make, options, message):
    options = {"dims": ParallelDims(), "config": Parallel()} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        parallelize(make(), **options)


def test_another_number_of_ranks_is_refused():
    distributed.setup()
    try:
        with pytest.raises(ValueError, match="is for 2 ranks, but the process group has 1; use"):
            parallelize(nn.Linear(2, 2), ParallelDims(tp=2), Parallel())
    finally:
        distributed.teardown()


def one_rank_of_two(rank):
    with pytest.raises(ValueError, match="is for 1 ranks, but the process group has 2; use"):
        parallelize(nn.Linear(2, 2), ParallelDims(), Parallel())


def test_several_ranks_are_not_left_unsharded():
    run_ranks(one_rank_of_two, 2)


class Scalar(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.scale = nn.Parameter(torch.ones(()))


def unshardable(rank):
    """Scalars, and a second time: the messages, and whether the model was left alone."""
    scalar, twice = Scalar(), nn.Linear(2, 2)
    parallelize(twice, ParallelDims(dp_shard=2), Parallel())
    config = {"train_batch_size": 2}
    found = []
    for model in (scalar, twice):
        for start in (
            lambda m: parallelize(m, ParallelDims(dp_shard=2), Parallel()),
            lambda m: deepspeed.initialize(model=m, config=config),
        ):
            with pytest.raises(ValueError) as caught:
                start(model)
            found.append(str(caught.value))
    return found, [type(p) is nn.Parameter for p in scalar.parameters()]


def test_scalars_and_sharded_models_are_refused():
    parallelize(Scalar(), ParallelDims(), Parallel())  # where nothing is sharded
    for found, plain in run_ranks(unshardable, 2):
        assert plain == [True] * 3
        assert all("scale of Scalar is a scalar, which has no shards" in x for x in found[:2])
        assert all("FSDPLinear is sharded already" in x for x in found[2:])


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes | options))
