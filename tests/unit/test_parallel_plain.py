"""parallelize on plain transformers models: logits, gradients and clipping as on one process."""

import copy

import pytest
import tiny
import torch
from helpers import run_ranks
from torch import nn
from transformers import AutoModelForSequenceClassification

from torchrft.config.job_config import Parallel
from torchrft.optim.optimizer import clip_gradients
from torchrft.parallel import ParallelDims, parallelize

TWO = {"tp2": ParallelDims(tp=2), "sp2": ParallelDims(sp=2)}
FOUR = {
    "tp2 sp2": ParallelDims(tp=2, sp=2),
    "dp2 sp2": ParallelDims(dp_shard=2, sp=2),
    "dp2 tp2": ParallelDims(dp_shard=2, tp=2),
}
MODELS = {
    "llama": {"family": "llama", "implementation": "sdpa"},
    "llama torchrft": {"family": "llama"},
    "tied qwen2": {"family": "qwen2", "implementation": "sdpa", "tie_word_embeddings": True},
    "mistral": {"family": "mistral", "implementation": "eager"},  # a window of 4 tokens
    "classifier": {"family": "llama", "implementation": "sdpa"},
}
LENGTH = 7  # which neither 2 nor 4 ranks divide
MASKS = {
    "right": [[1] * 7, [1] * 5 + [0] * 2],
    "left": [[1] * 7, [0] * 3 + [1] * 4],
    "numbered": [[1] * 7, [0] + [1] * 3 + [2] * 3],  # which transformers takes as 0 or not
}


def make(name):
    model = tiny.model(**MODELS[name])
    if name == "classifier":
        config = copy.deepcopy(model.config)
        config.num_labels = 3
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    return model


def inputs(kind):
    ids = torch.randint(2, tiny.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if kind in MASKS:
        return {"input_ids": ids, "attention_mask": torch.tensor(MASKS[kind])}
    positions = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    more = {"packed": positions | {"use_cache": False}, "restarted": positions}
    return {"input_ids": ids} | more.get(kind, {})


def results(model, kind):
    """Logits of what is no padding, gradients, and their norm before clipping."""
    batch = inputs(kind)
    logits = model(**batch).logits
    if "attention_mask" in batch and logits.dim() == 3:
        logits = logits * batch["attention_mask"].bool()[:, :, None]
    logits.log_softmax(-1)[..., 1].sum().backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name] = whole.detach().clone()
    return found | {"norm": clip_gradients(model, 1.0)}


# transformers takes restarted positions for packed sequences only if it makes no cache.
KINDS = ["whole", "packed", "restarted", *MASKS]


def cases(layout):
    """The llama in every way, the others in the most telling ones."""
    for name in MODELS:
        few = {"llama": KINDS, "mistral": ["left"], "llama torchrft": ["whole", "right"]}
        kinds = few.get(name, ["whole"])
        for kind in kinds[:1] if layout.startswith("dp") else kinds:
            yield name, kind


def all_results(rank, layouts):
    found = {}
    for layout, dims in layouts.items():
        for name, kind in cases(layout):
            config = Parallel(tp_size=dims.tp, sp_size=dims.sp)
            found[layout, name, kind] = results(parallelize(make(name), dims, config), kind)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [TWO, FOUR], ids=["two ranks", "four ranks"])
def test_plain_models_compute_what_one_process_does(layouts):
    alone = {(n, k): results(make(n), k) for n, k in cases("one")}
    assert all(float(found["norm"]) > 1 for found in alone.values())
    for found in run_ranks(all_results, max(d.world_size for d in layouts.values()), layouts):
        assert found
        for (layout, name, kind), values in found.items():
            expected = alone[name, kind]
            assert values.keys() == expected.keys()
            for key, value in values.items():
                torch.testing.assert_close(
                    value, expected[key], rtol=1e-4, atol=1e-4, msg=f"{layout} {name} {kind} {key}"
                )


def test_models_that_share_a_config_keep_their_attention():
    assert run_ranks(shared_config, 2) == [("sdpa", "torchrft_split")] * 2


def shared_config(rank):
    first = tiny.model("llama", "sdpa")
    second = type(first)._from_config(first.config)
    second.config = second.model.config = first.config
    parallelize(first, ParallelDims(sp=2), Parallel(sp_size=2))
    return second.config._attn_implementation, first.config._attn_implementation


def frozen_gradients(rank):
    found = {}
    for layout, dims in {"one": None, **TWO}.items():
        model = tiny.model("qwen3", "sdpa")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name and "embed" not in name)
        if dims is not None:
            parallelize(model, dims, Parallel(tp_size=dims.tp, sp_size=dims.sp))
        model(**inputs("whole")).logits.log_softmax(-1)[..., 1].sum().backward()
        found[layout] = (
            {n: p.requires_grad for n, p in model.named_parameters()},
            {
                n: (p.grad.full_tensor() if dims else p.grad).detach().clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            },
        )
    return found


def test_frozen_parameters_stay_frozen():
    found = run_ranks(frozen_gradients, 2)[0]
    flags, gradients = found["one"]
    assert sum(not trained for trained in flags.values()) == 2 * 4 + 1 + 1
    for layout in TWO:
        assert found[layout][0] == flags
        torch.testing.assert_close(found[layout][1], gradients, rtol=1e-4, atol=1e-4, msg=layout)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.scale = tiny.model("llama"), nn.Parameter(torch.ones(3))


def encoder():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    return BertModel(BertConfig(vocab_size=8, num_hidden_layers=1, **sizes))


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "ffn_dim": 8, "word_embed_proj_dim": 8}
    return OPTForCausalLM(OPTConfig(vocab_size=56, num_hidden_layers=1, dropout=0.0, **sizes))


def doge():
    return tiny.model("doge", "sdpa")


def mixtral():
    return tiny.model("mixtral", "sdpa", num_local_experts=2)


REFUSED = {
    "OPTForCausalLM has positions that come from the": (opt, ParallelDims(sp=2), {}),
    "DogeAttention uses a mask of its own": (doge, ParallelDims(sp=2), {}),
    "does not go with output_router_logits": (
        mixtral,
        ParallelDims(sp=2),
        {"output_router_logits": True},
    ),
    "tp_size = 2: Scaled has parameters of Scaled outside": (Scaled, ParallelDims(tp=2), None),
    "BertModel has attention that is not causal": (encoder, ParallelDims(sp=2), None),
    "does not go with use_cache": (None, ParallelDims(sp=2), {"use_cache": True}),
    "does not go with output_hidden": (None, ParallelDims(tp=2), {"output_hidden_states": True}),
    "attention_mask must be [B, T]": (
        None,
        ParallelDims(sp=2),
        {"attention_mask": torch.ones(2, 1, 7, 7)},
    ),
    "does not go with token_type_ids": (
        None,
        ParallelDims(tp=2),
        {"token_type_ids": torch.ones(2, 7)},
    ),
}


def refusals(rank):
    found = []
    for make_model, dims, options in REFUSED.values():
        model = make_model() if make_model else tiny.model("llama", "sdpa")
        try:
            parallelize(model, dims, Parallel(tp_size=dims.tp, sp_size=dims.sp))
            model(**inputs("whole"), **options)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_split_is_refused():
    for message, text in zip(REFUSED, run_ranks(refusals, 2)[0], strict=True):
        assert message in text
