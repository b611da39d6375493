"""Episodes in the learner: each is one sequence of its sampled tokens, whatever its branches."""

import math

import pytest
import torch
from helpers import run_ranks
from test_learner import SAMPLES, assert_same_step, step
from test_parallel_layouts import OPTIONS, PACKED, SP, TP, assert_equal
from tiny_policy import full_weights, make_episodes, make_learner, with_advantages

from torchrft.learn.packing import build


@pytest.fixture(scope="module")
def whole_episodes():
    options = {"train_batch_size": 16, "micro_train_batch_size": 16, "packing_samples": False}
    options["loss_aggregation"] = "seq_mean_token_mean"
    return step(with_advantages(make_episodes()), **options)


def test_episodes_against_autograd_on_each_branch(whole_episodes):
    """An episode is one sequence of its sampled tokens, each predicted in its own branch."""
    learner, samples = make_learner(), make_episodes()
    batch = with_advantages(samples)
    model = learner.policy.model.model
    total = torch.zeros(())
    for row, sample in enumerate(samples):
        logprobs = []
        for one in sample.completion.branches:
            ids = torch.tensor([one.prompt + one.token_ids])
            logits = model(input_ids=ids).logits.log_softmax(-1)[0]
            for t, own in enumerate(one.sampled):
                if own:
                    logprobs.append(logits[len(one.prompt) + t - 1, one.token_ids[t]])
        logprobs = torch.stack(logprobs)
        assert len(logprobs) == int(batch.mask[row].sum())
        advantages = batch.advantages[row, : len(logprobs)]
        total = total - ((logprobs - logprobs.detach()).exp() * advantages).mean() / len(samples)
    total.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert whole_episodes[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    scale = min(1.0, 1.0 / norm)
    for name, parameter in learner.policy.model.named_parameters():
        expected = parameter.detach() - scale * parameter.grad
        assert torch.allclose(whole_episodes[1][name], expected, atol=1e-6, rtol=0), name


@pytest.mark.parametrize("budget", [64, 1000])
@pytest.mark.parametrize("packed", [True, False])
def test_episodes_take_the_same_step_however_they_are_cut(whole_episodes, packed, budget):
    result = step(
        with_advantages(make_episodes()),
        loss_aggregation="seq_mean_token_mean",
        train_batch_size=16,
        micro_train_batch_size=2,
        packing_samples=packed,
        max_tokens_per_microbatch=budget,
    )
    assert sum(result[2]) == SAMPLES
    assert_same_step(result, whole_episodes)


def test_what_branches_share_is_computed_once():
    """The packed row holds each beginning of the branches of a group once, and nothing else."""
    batch = with_advantages(make_episodes())
    rows = list(range(SAMPLES))
    beginnings, whole = set(), 0
    for row in rows:
        for branch in batch.branches[row]:
            ids = (branch.prompt + branch.token_ids)[:-1]  # the last one is a label alone
            beginnings |= {(int(batch.group[row]), ids[:end]) for end in range(1, len(ids) + 1)}
            whole += len(ids)
    assert build(batch, rows, packed=True).input_ids.numel() == len(beginnings) < 0.6 * whole


LAYOUTS = {"dp2": {}, "tp2": TP, "sp2": SP, "padded sp2": {"packing_samples": False} | SP}
LLAMA = {"family": "llama"}


def two_steps(rank, world_size, options):
    """Losses, gradient norms and the weights at the end, of two rollouts of 16 episodes."""
    options = OPTIONS | PACKED | {"max_len": 64, "max_tokens_per_microbatch": 100} | options
    learner = make_learner(1, world_size=world_size, family=LLAMA, **options)
    ranks, found = learner.policy.ranks, []
    for seed in range(2):
        batch = with_advantages(make_episodes(seed))
        mine = [row for row in range(16) if int(batch.group[row]) % ranks.size == ranks.rank]
        metrics = learner.update(learner.compute_logprobs(batch.select(mine)))
        found.append({name: metrics[name] for name in ("policy/loss", "grad_norm", "policy/kl")})
    return found, full_weights(learner)


def all_layouts(rank, world_size, layouts):
    return {name: two_steps(rank, world_size, options) for name, options in layouts.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layouts"), [(2, LAYOUTS), (4, {"dp4": {}, "tp2 sp2": TP | SP})]
)
def test_layouts_take_the_same_steps(world_size, layouts):
    alone = two_steps(0, 1, {})
    assert all(found["grad_norm"] > 0.1 for found in alone[0])
    for ranks in run_ranks(all_layouts, world_size, world_size, layouts):
        for layout, found in ranks.items():
            assert_equal(found, alone, layout)
