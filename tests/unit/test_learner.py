import math
from dataclasses import replace

import pytest
import torch
from tiny_policy import full_weights, make_learner, make_samples, with_advantages

import torchrft.learn.optimizer_step as module
from torchrft.algorithms.aggregation import Denominators
from torchrft.algorithms.kl import kl_divergence
from torchrft.algorithms.losses import policy_loss
from torchrft.algorithms.selection import high_entropy_mask
from torchrft.learn.packing import build

SAMPLES = 16


@pytest.fixture(scope="module")
def batch():
    return with_advantages(make_samples())


def step(batch, **options):
    """Metrics, weights and the number of forward passes of one `run`."""
    learner = make_learner(**options)
    passes = forwards(learner.policy.model)
    metrics = learner.update(learner.compute_logprobs(batch))
    return metrics, full_weights(learner), passes


def forwards(model) -> list[int]:
    """Grows by the number of samples of every forward pass of `model`, as it happens."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].rows)))
    return seen


def assert_same_step(one, other, tolerance=1e-6):
    for name in ("policy/loss", "grad_norm", "policy/entropy", "policy/kl", "mismatch/kl"):
        assert one[0][name] == pytest.approx(other[0][name], abs=tolerance, rel=tolerance), name
    for name, value in one[1].items():
        assert torch.allclose(value, other[1][name], atol=tolerance, rtol=0), name


def assert_unchanged(learner, before):
    for name, value in full_weights(learner).items():
        assert torch.equal(value, before[name]), name


def changed(learner, before) -> bool:
    return any(not torch.equal(v, before[name]) for name, v in full_weights(learner).items())


# ------------------------------------------------------- one step, however it is cut


@pytest.fixture(scope="module")
def whole(batch):
    """All 16 samples in one padded forward pass."""
    result = step(batch, train_batch_size=16, micro_train_batch_size=16, packing_samples=False)
    assert result[2] == [16]
    assert result[0]["grad_norm"] > 0.05
    assert abs(result[0]["policy/loss"]) > 1e-3
    return result


def test_the_step_against_autograd_on_each_sample(batch, whole):
    learner = make_learner()
    logprobs = torch.zeros_like(batch.rollout_logprobs)
    for row in range(SAMPLES):  # a forward pass of its own for each sample
        micro = build(batch, [row], False)
        logprobs = logprobs.index_copy(
            0, torch.tensor([row]), micro.scatter(learner.policy.model(micro)[0])
        )
    loss, _ = policy_loss(
        *("ppo_clip", logprobs, logprobs.detach(), batch.advantages, batch.mask),
        loss_aggregation="token_mean",
    )
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in learner.policy.model.parameters()))
    assert whole[0]["policy/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert whole[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert whole[0]["lr"] == 1.0
    drift = (logprobs.detach() - batch.rollout_logprobs).abs()[batch.mask]
    assert whole[0]["mismatch/logprob_abs_mean"] == pytest.approx(float(drift.mean()), rel=1e-5)
    assert whole[0]["mismatch/logprob_abs_max"] == pytest.approx(float(drift.max()), rel=1e-5)
    scale = min(1.0, 1.0 / norm)
    for name, parameter in learner.policy.model.named_parameters():
        expected = parameter.detach() - scale * parameter.grad
        assert torch.allclose(whole[1][name], expected, atol=1e-6, rtol=0), name


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_do_not_change_the_step(batch, whole, size, aggregation):
    options = {"loss_aggregation": aggregation, "packing_samples": False}
    if aggregation != "token_mean":
        whole = step(batch, micro_train_batch_size=16, **options)
    result = step(batch, micro_train_batch_size=size, **options)
    assert result[2] == [size] * (SAMPLES // size)
    assert_same_step(result, whole)


@pytest.mark.parametrize("budget", [20, 40, 1000])
def test_packing_does_not_change_the_step(batch, whole, budget):
    result = step(batch, packing_samples=True, max_tokens_per_microbatch=budget, max_len=20)
    assert sorted(result[2], reverse=True)[0] > 1
    assert sum(result[2]) == SAMPLES
    assert (len(result[2]) == 1) == (budget == 1000)
    assert_same_step(result, whole)


def test_the_budget_of_a_packed_micro_batch_defaults_to_its_padded_size(batch):
    # 2 samples x 15 tokens = 30
    learner = make_learner(packing_samples=True, micro_train_batch_size=2, max_len=15)
    same = make_learner(packing_samples=True, max_tokens_per_microbatch=30, max_len=15)
    seen, expected = forwards(learner.policy.model), forwards(same.policy.model)
    learner.update(batch)
    same.update(batch)
    assert seen == expected
    assert len(seen) > 1


def test_fused_log_probs_do_not_change_the_step(batch, whole):
    result = step(batch, fused_linear_logprob=True, chunk_size=7, micro_train_batch_size=4)
    assert_same_step(result, whole)


def test_the_order_of_samples_does_not_change_the_step(batch, whole):
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    result = step(batch.select(order), micro_train_batch_size=2)
    assert_same_step(result, whole)


# ------------------------------------------------------- steps on a rollout


def test_optimizer_steps_per_rollout(batch):
    learner = make_learner(train_batch_size=8, micro_train_batch_size=8)
    metrics = learner.update(learner.compute_logprobs(batch))
    assert metrics["update/optimizer_steps"] == 2
    by_hand = make_learner(train_batch_size=8, micro_train_batch_size=8)
    old = by_hand.logprobs(by_hand.policy.model, batch)
    parts = [
        by_hand.update(replace(batch, old_logprobs=old).select(list(range(start, start + 8))))
        for start in (0, 8)
    ]
    for name, value in full_weights(by_hand).items():
        assert torch.equal(value, full_weights(learner)[name])
    for name in ("policy/loss", "grad_norm", "policy/approx_kl", "lr"):
        mean = (parts[0][name] + parts[1][name]) / 2
        assert metrics[name] == pytest.approx(mean, abs=1e-7), name
    largest = max(part["mismatch/logprob_abs_max"] for part in parts)
    assert metrics["mismatch/logprob_abs_max"] == largest
    # The second step is off-policy: the first has moved the policy.
    assert parts[0]["policy/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert parts[1]["policy/approx_kl"] > 1e-4


def test_max_epochs(batch):
    learner = make_learner(max_epochs=3)
    old = learner.logprobs(learner.policy.model, batch)
    metrics = learner.update(learner.compute_logprobs(batch))
    assert metrics["update/optimizer_steps"] == 3
    by_hand = make_learner(max_epochs=1)
    for _ in range(3):
        by_hand.update(replace(batch, old_logprobs=old))  # always those of the policy that sampled
    for name, value in full_weights(by_hand).items():
        assert torch.equal(value, full_weights(learner)[name])
    assert learner.policy.scheduler.last_epoch == 3


def test_what_is_left_over_makes_a_smaller_step(batch):
    # The end of a run whose rollouts do not fill train_batch_size: 10 of 16.
    part = batch.select(list(range(10)))
    learner = make_learner(train_batch_size=16, micro_train_batch_size=16)
    seen = forwards(learner.policy.model)
    metrics = learner.update(learner.compute_logprobs(part))
    assert seen == [10]
    assert metrics["update/optimizer_steps"] == 1
    exact = make_learner(
        rollout_batch_size=5, n_samples_per_prompt=2, train_batch_size=10, micro_train_batch_size=5
    )
    exact.update(part)
    for name, value in full_weights(exact).items():
        assert torch.allclose(value, full_weights(learner)[name], atol=1e-6)
    two = make_learner(train_batch_size=8, micro_train_batch_size=8)
    seen = forwards(two.policy.model)
    two.update(replace(part, old_logprobs=two.logprobs(two.policy.model, part)))
    assert seen[-2:] == [8, 2]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),  # the one step's own log-probs are the old ones
        ({"max_epochs": 2}, True),
        ({"train_batch_size": 8}, True),
    ],
)
def test_old_log_probs_are_computed_only_where_needed(batch, options, needed):
    learner = make_learner(micro_rollout_batch_size=16, **options)
    seen = forwards(learner.policy.model)
    result = learner.compute_logprobs(batch)
    assert (result.old_logprobs is not None) == needed
    assert seen == ([16] if needed else [])
    assert result.ref_logprobs is None
    if needed:
        assert (result.old_logprobs[~batch.mask] == 0).all()
        assert not result.old_logprobs.requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_micro_rollout_batch_size(batch, packed):
    learner = make_learner(micro_rollout_batch_size=16, packing_samples=packed)
    whole = learner.logprobs(learner.policy.model, batch)
    for size in (1, 2, 4):
        part = make_learner(
            micro_rollout_batch_size=size, packing_samples=packed, max_len=20, max_epochs=2
        )
        seen = forwards(part.policy.model)
        got = part.compute_logprobs(batch).old_logprobs
        if packed:  # size x max_len tokens
            assert len(seen) > 1
            tokens = 20 * size
            assert len(seen) == len(module.plan(batch, list(range(16)), True, size, tokens))
        else:
            assert seen == [size] * (SAMPLES // size)
        assert torch.allclose(got, whole, atol=1e-5)


# ------------------------------------------------------- KL and other options


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_coefficient(batch, estimator):
    options = {"init_kl_coef": 0.5, "kl_estimator": estimator}
    learner = make_learner(reference_seed=1, **options)
    own = learner.logprobs(learner.policy.model, batch)
    ref = learner.logprobs(learner.reference, batch)
    assert not torch.equal(own, ref)
    with_ref = learner.compute_logprobs(batch)
    assert torch.equal(with_ref.ref_logprobs, ref)
    with_kl = learner.update(with_ref)
    kl = kl_divergence(own, ref, estimator)[batch.mask].mean()
    assert abs(float(kl)) > 1e-3
    assert with_kl["policy/kl"] == pytest.approx(float(kl), rel=1e-4)
    without = make_learner().update(batch)
    assert without["policy/kl"] == 0.0
    assert with_kl["policy/loss"] == pytest.approx(
        without["policy/loss"] + 0.5 * float(kl), rel=1e-4
    )


def test_the_reference_is_not_trained(batch):
    learner = make_learner(reference_seed=1, init_kl_coef=0.5)
    before = [p.clone() for p in learner.reference.parameters()]
    learner.update(learner.compute_logprobs(batch))
    assert all(p.grad is None for p in learner.reference.parameters())
    for old, new in zip(before, learner.reference.parameters(), strict=True):
        assert torch.equal(old, new)


def expected_loss(learner, batch, **options):
    """policy_loss called by hand on the whole batch."""
    values = learner.logprobs(learner.policy.model, batch)
    local = Denominators.of(batch.mask)
    loss, _ = policy_loss(
        *("ppo_clip", values, batch.old_logprobs, batch.advantages, batch.mask),
        denominators=replace(local, max_response_length=learner.policy.max_response_length),
        **options,
    )
    return loss.item()


@pytest.mark.parametrize(
    "options",
    [
        {"clip_range": 0.05},
        {"clip_range_higher": 0.05},
        {"loss_aggregation": "seq_mean_token_mean"},
        {"loss_aggregation": "seq_mean_token_sum_norm"},
    ],
    ids=str,
)
def test_options_reach_the_loss(batch, options):
    learner = make_learner(**options)
    noise = 0.3 * torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    old = learner.logprobs(learner.policy.model, batch) + noise.where(batch.mask, 0.0)
    shifted = replace(batch, old_logprobs=old)
    defaults = {"loss_aggregation": "token_mean", "clip_range": 0.2, "clip_range_higher": 0.3}
    expected = expected_loss(learner, shifted, **(defaults | options))
    other = expected_loss(learner, shifted, **defaults)
    assert abs(expected - other) > 1e-4
    assert learner.update(shifted)["policy/loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 16])
def test_the_loss_of_high_entropy_tokens_is_divided_by_all_tokens(batch, size):
    learner = make_learner(high_entropy_token_ratio=0.2, micro_train_batch_size=size)
    ready = learner.compute_logprobs(batch)
    keep = high_entropy_mask(ready.entropy, ready.mask, 0.2)
    tokens = int(ready.mask.sum())
    assert 0.2 * tokens <= int(keep.sum()) < 0.3 * tokens  # equal ones are kept with the last
    advantages = [
        float(ready.advantages[i, t])
        for i in range(SAMPLES)
        for t in range(keep.shape[1])
        if keep[i, t]
    ]
    # On-policy, a token's loss is minus its advantage.
    expected = -sum(advantages) / tokens
    assert abs(expected) > 1e-3
    assert learner.update(ready)["policy/loss"] == pytest.approx(expected, abs=1e-6)


def test_max_norm_clips_the_step(batch):
    free, held = make_learner(max_norm=1e6), make_learner(max_norm=0.01)
    before = full_weights(free)
    norm = free.update(batch)["grad_norm"]
    assert held.update(batch)["grad_norm"] == norm  # the norm before clipping is reported
    assert norm > 0.02
    for name, value in full_weights(free).items():
        step = (full_weights(held)[name] - before[name]) / 0.01 * norm
        assert torch.allclose(step, value - before[name], atol=1e-4)


# ------------------------------------------------------- steps that must not happen


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("micro", [1, 16])
def test_a_loss_that_is_not_finite_skips_the_step(batch, bad, micro):
    learner = make_learner(micro_train_batch_size=micro)
    before = full_weights(learner)
    advantages = batch.advantages.clone()
    advantages[3, 0] = bad
    metrics = learner.update(replace(batch, advantages=advantages))
    assert (metrics["update/optimizer_steps"], metrics["update/skipped_steps"]) == (1, 1)
    assert not math.isfinite(metrics["policy/loss"])
    assert_unchanged(learner, before)
    assert all(p.grad is None for p in learner.policy.model.parameters())
    after = learner.update(batch)
    assert after["update/skipped_steps"] == 0
    fresh = make_learner().update(batch)
    assert after["policy/loss"] == pytest.approx(fresh["policy/loss"], abs=1e-6)
    assert changed(learner, before)


def test_a_gradient_that_is_not_finite_skips_the_step(batch):
    learner = make_learner()
    before = full_weights(learner)
    parameter = next(learner.policy.model.parameters())
    handle = parameter.register_hook(lambda grad: grad * math.inf)
    metrics = learner.update(batch)
    handle.remove()
    assert math.isfinite(metrics["policy/loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert metrics["update/skipped_steps"] == 1
    assert_unchanged(learner, before)
    assert learner.update(batch)["update/skipped_steps"] == 0
    assert changed(learner, before)


def test_only_the_bad_step_of_a_rollout_is_skipped(batch):
    learner = make_learner(train_batch_size=8, micro_train_batch_size=8)
    old = learner.logprobs(learner.policy.model, batch)
    advantages = batch.advantages.clone()
    advantages[0, 0] = math.nan  # in the first of two steps
    metrics = learner.update(replace(batch, advantages=advantages, old_logprobs=old))
    assert (metrics["update/optimizer_steps"], metrics["update/skipped_steps"]) == (2, 1)
    second = make_learner(train_batch_size=8, micro_train_batch_size=8)
    second.update(replace(batch, old_logprobs=old).select(list(range(8, 16))))
    for name, value in full_weights(second).items():
        assert torch.equal(value, full_weights(learner)[name])


def test_a_step_without_an_unmasked_token_is_skipped(batch):
    # With AdamW: a zero gradient would still move weights that have momentum or decay.
    learner = make_learner()
    learner.policy.optimizer = torch.optim.AdamW(
        learner.policy.model.parameters(), lr=0.1, weight_decay=0.5
    )
    learner.update(batch)
    before = full_weights(learner)
    metrics = learner.update(replace(batch, mask=torch.zeros_like(batch.mask)))
    assert (metrics["update/skipped_steps"], metrics["policy/loss"]) == (1, 0.0)
    assert_unchanged(learner, before)


def test_a_skipped_step_still_advances_the_schedule(batch):
    learner = make_learner(lr_warmup_ratio=1.0)  # 1/100, 2/100, ...
    nothing = replace(batch, mask=torch.zeros_like(batch.mask))
    assert [learner.update(each)["lr"] for each in (batch, nothing, batch)] == pytest.approx(
        [0.01, 0.02, 0.03]
    )
