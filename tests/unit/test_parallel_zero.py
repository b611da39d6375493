"""Two ranks by gloo against one process: loss, gradient norm and weights of the first step."""

from dataclasses import replace

import pytest
import torch
from helpers import run_ranks
from tiny_policy import full_weights, make_learner, make_samples, with_advantages
from torch.distributed.tensor import DTensor

import torchrft.learn.optimizer_step as optimizer_step
from torchrft.config.job_config import Parallel
from torchrft.learn.packing import plan
from torchrft.parallel.zero import sharding

LAYOUTS = {
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"fsdp": True},
}
PACKED = {"packing_samples": True, "max_tokens_per_microbatch": 20, "max_len": 20}
PADDED = {"packing_samples": False, "micro_train_batch_size": 4}
KL = {"init_kl_coef": 0.5, "kl_estimator": "k3"}


def lopsided_batch():
    """Rank 0 of two gets samples about three times as long as rank 1."""
    samples = make_samples()
    short = [
        replace(
            sample,
            completion=replace(
                sample.completion,
                token_ids=sample.completion.token_ids[:2],
                logprobs=sample.completion.logprobs[:2],
            ),
        )
        for sample in samples
    ]
    return with_advantages(
        [s if s.group % 2 == 0 else t for s, t in zip(samples, short, strict=True)]
    )


def rows_of(batch, rank, world_size):
    return [row for row in range(len(batch)) if int(batch.group[row]) % world_size == rank]


def train_one_step(rank, world_size, options):
    """Metrics and full weights after one step, and what was seen of the sharding on the way."""
    batch = lopsided_batch()
    learner = make_learner(reference_seed=1, world_size=world_size, **KL, **options)
    layer = learner.policy.model.model.get_decoder().layers[0]
    seen = {"sync": [], "gradients": [], "gathered_after_forward": []}
    original = optimizer_step.set_gradient_sync

    def spy(model, sync):
        seen["sync"].append(sync)
        seen["gradients"].append(any(p.grad is not None for p in model.parameters()))
        original(model, sync)

    def after_forward(module, args, output):
        if torch.is_grad_enabled():
            gathered = not any(isinstance(p, DTensor) for p in layer.parameters())
            seen["gathered_after_forward"].append(gathered)

    learner.policy.model.register_forward_hook(after_forward)
    optimizer_step.set_gradient_sync = spy
    try:
        metrics = learner.update(
            learner.compute_logprobs(batch.select(rows_of(batch, rank, world_size)))
        )
    finally:
        optimizer_step.set_gradient_sync = original
    seen["sharded"] = [isinstance(p, DTensor) for p in learner.policy.model.parameters()]
    return metrics, full_weights(learner), seen


def all_layouts(rank):
    torch.set_num_threads(1)
    results = {}
    for name, layout in LAYOUTS.items():
        for form, options in (("packed", PACKED), ("padded", PADDED)):
            results[name, form] = train_one_step(rank, 2, layout | options)
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(all_layouts, 2)


@pytest.fixture(scope="module")
def alone():
    return train_one_step(0, 1, {"micro_train_batch_size": 16})


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_take_the_step_of_one(two_ranks, alone, layout, form):
    assert alone[0]["grad_norm"] > 0.05
    assert abs(alone[0]["policy/loss"]) > 1e-3
    assert alone[0]["policy/kl"] > 1e-3
    assert not any(alone[2]["sharded"])
    for results in two_ranks:  # the same on both
        metrics, weights, seen = results[layout, form]
        assert all(seen["sharded"])
        assert metrics["update/skipped_steps"] == 0
        for name, value in alone[0].items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name, value in alone[1].items():
            assert torch.allclose(weights[name], value, atol=1e-5, rtol=0), name


def test_ranks_with_unequal_numbers_of_micro_batches_do_not_hang(two_ranks):
    batch = lopsided_batch()
    counts = [len(plan(batch, rows_of(batch, rank, 2), True, 4, 20)) for rank in (0, 1)]
    assert counts[0] > counts[1] > 0
    for results in two_ranks:
        assert len(results["zero2", "packed"][2]["sync"]) == counts[0]
    assert len(two_ranks[0]["zero2", "padded"][2]["sync"]) == 2  # 8 samples, 4 at a time


def test_stages_shard_differently_and_train_alike(two_ranks):
    for form in ("packed", "padded"):
        seen = {name: two_ranks[0][name, form][2] for name in LAYOUTS}
        count = len(seen["zero2"]["sync"])
        assert count > 1
        # Stage 1 reduces gradients once, after the last micro-batch; until then there are none.
        assert seen["zero1"]["sync"] == [False] * (count - 1) + [True]
        assert not any(seen["zero1"]["gradients"])
        # Stages 2 and 3 reduce and shard after each.
        for name in ("zero2", "zero3"):
            assert seen[name]["sync"] == [True] * count
            assert seen[name]["gradients"] == [False] + [True] * (count - 1)
        # Only stage 3 gives the gathered parameters back between forward and backward.
        assert all(seen["zero1"]["gathered_after_forward"])
        assert all(seen["zero2"]["gathered_after_forward"])
        assert not any(seen["zero3"]["gathered_after_forward"])


def test_fsdp_shards_fully(two_ranks):
    for form in ("packed", "padded"):
        fsdp, third = (two_ranks[0][name, form][2] for name in ("fsdp", "zero3"))
        assert fsdp == third
        assert not any(fsdp["gathered_after_forward"])
    assert sharding(Parallel(fsdp=True)) == sharding(Parallel(zero_stage=3))
    assert sharding(Parallel()) == sharding(Parallel(zero_stage=2))
    stages = [sharding(Parallel(zero_stage=stage)) for stage in (1, 2, 3)]
    assert len(set(stages)) == 3


def skip_on_one_rank(rank):
    """A NaN on rank 1 alone, then a good step."""
    torch.set_num_threads(1)
    batch = lopsided_batch()
    mine = batch.select(rows_of(batch, rank, 2))
    learner = make_learner(world_size=2, **PADDED)
    before = full_weights(learner)
    bad = mine.advantages.clone()
    if rank == 1:
        bad[0, 0] = float("nan")
    empty = torch.zeros_like(mine.mask)
    skipped = [
        learner.update(replace(mine, advantages=bad)),
        learner.update(replace(mine, mask=empty)),
    ]
    unchanged = all(torch.equal(v, before[k]) for k, v in full_weights(learner).items())
    # One rank has no response token at all: the step is that of the other's samples.
    half = learner.update(replace(mine, mask=empty if rank == 1 else mine.mask))
    return skipped, unchanged, half, full_weights(learner)


def test_all_ranks_skip_a_step_together():
    results = run_ranks(skip_on_one_rank, 2)
    for skipped, unchanged, half, _ in results:
        assert [metrics["update/skipped_steps"] for metrics in skipped] == [1, 1]
        assert unchanged
        assert half["update/skipped_steps"] == 0
        assert half["grad_norm"] == results[0][2]["grad_norm"] > 0
    batch = lopsided_batch()
    single = make_learner(micro_train_batch_size=8)
    expected = single.update(batch.select(rows_of(batch, 0, 2)))
    assert results[0][2]["policy/loss"] == pytest.approx(expected["policy/loss"], rel=1e-5)
    for name, value in full_weights(single).items():
        assert torch.allclose(results[1][3][name], value, atol=1e-5), name
