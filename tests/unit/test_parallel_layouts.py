"""Every layout of four ranks against one process: three steps of GRPO, to 1e-5."""

from functools import partial

import pytest
import torch
from helpers import run_ranks
from tiny_policy import full_weights, make_learner, make_samples, with_advantages

from torchrft import parallel

PACKED = {"packing_samples": True, "max_tokens_per_microbatch": 30, "max_len": 20}
PADDED = {"packing_samples": False, "micro_train_batch_size": 2}
FUSED = {"fused_linear_logprob": True, "chunk_size": 5}
TP, SP = {"tp_size": 2}, {"sp_size": 2}
LAYOUTS = {
    "dp4": {},  # zero_stage = 2, by default
    "dp2 tp2": TP,
    "dp2 sp2": SP,
    "tp2 sp2": TP | SP,
    "sp4": {"sp_size": 4},  # two key heads for four ranks
    "hsdp 2x2": {"dp_replicate": 2, "zero_stage": 3},
    "zero1": {"zero_stage": 1},
    "zero1 tp2": {"zero_stage": 1} | TP,
    "zero3": {"zero_stage": 3},
    "fsdp": {"fsdp": True},
    "offload": {"fsdp_cpu_offload": True, "fsdp": True},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing tp2 sp2": {"gradient_checkpointing": True} | TP | SP,
    "selective": {"gradient_checkpointing": True, "checkpointing_mode": "selective"},
    "fused dp4": FUSED,
    "fused tp2 sp2": FUSED | TP | SP,
    "padded dp4": PADDED,
    "padded tp2 sp2": PADDED | TP | SP | FUSED,
}
# Where tied weights and a vocabulary that ranks cannot share equally matter.
SPLIT = ("dp4", "tp2 sp2", "sp4", "hsdp 2x2", "zero1 tp2", "fsdp", "checkpointing tp2 sp2")
SPLIT += ("fused tp2 sp2", "padded tp2 sp2")
COMPILED = {
    "compile tp2 sp2": {"compile": True, "gradient_checkpointing": True} | TP | SP,
}  # with inductor: test_parallel_compile.py
FAMILIES = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "vocab_size": 57},  # parts of the vocabulary are not equal
}
MORE = {
    "mistral": {"family": "mistral"},
    "gemma": {"family": "gemma", "num_key_value_heads": 2},
    "gemma3": {"family": "gemma3_text", "tie_word_embeddings": True},
}
OPTIONS = {"init_kl_coef": 0.1, "entropy_coef": 0.05, "train_batch_size": 16}


def three_steps(rank, world_size, family, options):
    """Losses, gradient norms and the weights at the end, of three rollouts of 16 samples."""
    learner = make_learner(1, world_size=world_size, family=family, **OPTIONS, **(PACKED | options))
    ranks, found = learner.policy.ranks, []
    for seed in range(3):
        batch = with_advantages(make_samples(seed))
        mine = [row for row in range(16) if int(batch.group[row]) % ranks.size == ranks.rank]
        metrics = learner.update(learner.compute_logprobs(batch.select(mine)))
        found.append({name: metrics[name] for name in ("policy/loss", "grad_norm", "policy/kl")})
    return found, full_weights(learner)


def all_layouts(rank, family, layouts):
    return {name: three_steps(rank, 4, family, options) for name, options in layouts.items()}


def assert_equal(found, expected, what):
    for step, (mine, theirs) in enumerate(zip(found[0], expected[0], strict=True)):
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (what, step, name)
    assert found[1].keys() == expected[1].keys()
    for name, weight in found[1].items():
        wanted = expected[1][name]
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-5, msg=f"{what}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_takes_the_same_steps(name):
    family = FAMILIES[name]
    alone = three_steps(0, 1, family, {})
    assert all(step["grad_norm"] > 0.1 for step in alone[0])
    start = full_weights(make_learner(family=family))
    assert all((weight - start[key]).abs().max() > 1e-3 for key, weight in alone[1].items())
    names = LAYOUTS if name == "llama" else SPLIT
    layouts = {layout: LAYOUTS[layout] for layout in names}
    for ranks in run_ranks(all_layouts, 4, family, layouts, timeout=400):
        for layout, found in ranks.items():
            assert_equal(found, alone, layout)


def compiled_layouts(rank, family):
    parallel.apply_compile = partial(parallel.apply_compile, backend="aot_eager")
    return all_layouts(rank, family, COMPILED)


@pytest.mark.slow
def test_compiled_layers_take_the_same_steps():
    alone = three_steps(0, 1, FAMILIES["qwen2"], {})
    for layout, found in run_ranks(compiled_layouts, 4, FAMILIES["qwen2"], timeout=300)[0].items():
        assert_equal(found, alone, layout)


def more_families(rank):
    layouts = {"tp2 sp2": TP | SP}
    return {name: all_layouts(rank, family, layouts) for name, family in MORE.items()}


@pytest.mark.slow
def test_more_families():
    found = run_ranks(more_families, 4, timeout=200)[0]
    for name, layouts in found.items():
        alone = three_steps(0, 1, MORE[name], {})
        for layout, result in layouts.items():
            assert_equal(result, alone, (name, layout))
