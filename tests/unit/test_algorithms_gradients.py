"""Gradients in expectation: every outcome of a small policy is listed, so that means are exact.

A policy over 3 tokens and 2 positions has 9 responses. The mean of a loss's gradient over them, in
float64, is compared with the gradient of what the loss is meant to descend.
"""

import math

import pytest
import torch
from torch import tensor

from torchrft.algorithms import advantages
from torchrft.algorithms.aggregation import Denominators
from torchrft.algorithms.kl import ESTIMATORS, kl_divergence
from torchrft.algorithms.losses import LOSSES, policy_loss

V = 3
RESPONSES = [(a, b) for a in range(V) for b in range(V)]
REWARDS = torch.linspace(-1.0, 2.0, V * V, dtype=torch.float64).sin()
BOTH = torch.ones(len(RESPONSES), 2, dtype=torch.bool)
# Sums over the tokens of one response: the gradient of its log-prob is the sum of its tokens'.
SUMS = {
    "loss_aggregation": "seq_mean_token_sum_norm",
    "denominators": Denominators(tokens=2.0, sequences=1.0, max_response_length=1.0),
}


def policy(seed: int, near: float = 1.0, to: int = 0) -> list[torch.Tensor]:
    """Logits of the first token [V] and of the second one given the first [V, V]."""
    shapes = [(V,), (V, V)]
    draws = [torch.Generator().manual_seed(n) for n in (seed, to)]
    new, base = ([torch.randn(s, dtype=torch.float64, generator=g) for s in shapes] for g in draws)
    logits = [b + near * (n - b) for n, b in zip(new, base, strict=True)]
    return [z.requires_grad_() for z in logits]


def token_logprobs(logits) -> torch.Tensor:
    """Log-probs [9, 2] of both tokens of every response."""
    first, second = (z.log_softmax(-1) for z in logits)
    rows = [torch.stack([first[a], second[a, b]]) for a, b in RESPONSES]
    return torch.stack(rows)


def gradient(value, logits) -> torch.Tensor:
    parts = torch.autograd.grad(value, logits, retain_graph=True)
    return torch.cat([g.flatten() for g in parts])


def mean_gradient(losses, sampled_from, logits) -> torch.Tensor:
    """The mean of the losses' gradients over responses of `sampled_from` [9, 2]."""
    weights = sampled_from.detach().sum(-1).exp()
    assert float(weights.sum()) == pytest.approx(1.0)
    return gradient((weights * torch.stack(losses)).sum(), logits)


def each_loss(name, logprobs, old, values, **options) -> list[torch.Tensor]:
    """The loss of every response alone; `values` [9] are the advantages."""
    rows = [slice(i, i + 1) for i in range(len(RESPONSES))]
    spread = values[:, None].expand(-1, logprobs.shape[1])
    extra = dict(options)
    ref = extra.pop("ref_logprobs", None)
    return [
        policy_loss(
            *(name, logprobs[row], old[row], spread[row], BOTH[row, : logprobs.shape[1]]),
            ref_logprobs=None if ref is None else ref[row],
            **extra,
        )[0]
        for row in rows
    ]


def divergence(left, right, contexts):
    """Sum over both positions of KL(left || right), contexts drawn from `contexts`."""
    total = 0.0
    for a, weight in [(None, 1.0), *enumerate(contexts[0].softmax(-1).tolist())]:
        p, q = (z[0] if a is None else z[1][a] for z in (left, right))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        total = total + weight * (p.exp() * (p - q)).sum()
    return total


@pytest.mark.parametrize("name", LOSSES.names())
def test_on_policy_every_loss_climbs_the_expected_reward(name):
    logits = policy(1)
    logprobs = token_logprobs(logits)
    losses = each_loss(name, logprobs, logprobs.detach(), REWARDS, **SUMS)
    exact = gradient(-(logprobs.sum(-1).exp() * REWARDS).sum(), logits)
    assert torch.allclose(mean_gradient(losses, logprobs, logits), exact, atol=1e-12, rtol=0)
    assert exact.abs().max() > 0.05


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gmpo", "cispo"])
def test_off_policy_losses_with_a_ratio_climb_it_too_while_nothing_is_clipped(name):
    """One token, sampled by the old policy; clips are so wide that they hold nothing."""
    logits, old = policy(2), token_logprobs(policy(3)).detach()[::V, :1]
    logprobs = token_logprobs(logits)[::V, :1]  # the first tokens: 3 outcomes
    wide = {"clip_range": 0.99 if name == "ppo_clip" else 20.0, "clip_range_higher": 1e4}
    rows = [slice(i, i + 1) for i in range(V)]
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses = [
        policy_loss(name, logprobs[i], old[i], REWARDS[i][:, None], mask, **wide)[0] for i in rows
    ]
    weights = old.exp().flatten()
    assert float(weights.sum()) == pytest.approx(1.0)
    got = gradient((weights * torch.stack(losses)).sum(), logits[:1])
    exact = gradient(-(logprobs.flatten().exp() * REWARDS[:V]).sum(), logits[:1])
    assert torch.allclose(got, exact, atol=1e-12, rtol=0)


def test_the_drift_of_cpgd_pulls_to_the_old_policy():
    logits, old = policy(2), policy(3)
    logprobs, from_old = token_logprobs(logits), token_logprobs(old).detach()
    zero = torch.zeros_like(REWARDS)
    losses = each_loss("cpgd", logprobs, from_old, zero, cpgd_drift_coef=1.0, **SUMS)
    exact = gradient(divergence([z.detach() for z in old], logits, old), logits)
    assert torch.allclose(mean_gradient(losses, from_old, logits), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("near", [1.0, 0.1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_term_of_the_loss(estimator, near):
    """k1 and k2 descend KL(policy || reference), k3 KL(reference || policy), token by token."""
    logits, ref = policy(4, near, to=5), [z.detach() for z in policy(5)]
    logprobs, ref_logprobs = token_logprobs(logits), token_logprobs(ref)
    options = {"ref_logprobs": ref_logprobs, "kl_estimator": estimator, "init_kl_coef": 1.0}
    zero = torch.zeros_like(REWARDS)
    losses = each_loss("ppo_clip", logprobs, logprobs.detach(), zero, **options, **SUMS)
    got = mean_gradient(losses, logprobs, logits)
    to_ref, from_ref = (
        gradient(divergence(*pair, logits), logits) for pair in ((logits, ref), (ref, logits))
    )
    assert torch.allclose(got, from_ref if estimator == "k3" else to_ref, atol=1e-12, rtol=0)
    assert got.norm() > 0.2 * near
    # A step along it comes nearer to the reference, by either divergence.
    moved = [z - 0.01 * g.view_as(z) for z, g in zip(logits, got.split([V, V * V]), strict=True)]
    assert divergence(moved, ref, logits) < divergence(logits, ref, logits)
    # The value: k1 and k3 are KL(policy || reference) in the mean.
    weights = logprobs.detach().sum(-1).exp()
    value = float((weights * torch.stack(losses)).detach().sum())
    if estimator != "k2":
        assert value == pytest.approx(float(divergence(logits, ref, logits)), abs=1e-12)


def test_the_gradient_of_k1_depends_on_the_reference():
    logprobs = tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    for ref, expected in ((-9.0, [8.0, 7.0, 8.5]), (-0.25, [-0.75, -1.75, -0.25])):
        kl = kl_divergence(logprobs, torch.full((1, 3), ref), "k1")
        assert kl.tolist()[0] == pytest.approx(expected)  # the value is d
        (got,) = torch.autograd.grad(kl.sum(), logprobs)
        assert got.tolist()[0] == pytest.approx(expected)  # d grad(logprob), as of k2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tokens_far_from_the_reference_are_pulled_back(estimator):
    """Beyond +-20 the value stays, but not at a gradient of zero."""
    logprobs = tensor([-0.1, -0.1, -60.0, -0.1], requires_grad=True)
    kl = kl_divergence(logprobs, tensor([-20.05, -60.0, -0.1, -math.inf]), estimator)
    (got,) = torch.autograd.grad(kl.sum(), logprobs)
    up, down = {"k1": (20, -20), "k2": (20, -20), "k3": (1, 1 - math.exp(20))}[estimator]
    assert got[1:3].tolist() == pytest.approx([up, down], rel=1e-6)
    assert float(got[0]) == pytest.approx(up, rel=3e-3)
    assert kl.isfinite().all()
    assert got.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_penalty_of_the_reward(estimator):
    """With k1 the return's policy gradient is that of E[R] - coef KL of whole responses."""
    logits, ref = policy(4, 0.1, to=5), [z.detach() for z in policy(5)]
    logprobs, ref_logprobs = token_logprobs(logits), token_logprobs(ref)
    result = advantages.compute(
        *("reinforce", REWARDS, torch.arange(len(RESPONSES)), BOTH),
        old_logprobs=logprobs.detach(),
        ref_logprobs=ref_logprobs,
        init_kl_coef=2.0,
        **({} if estimator == "k1" else {"kl_estimator": estimator}),  # k1 is the default here
    )
    weights = logprobs.detach().sum(-1).exp()
    got = gradient((weights[:, None] * result.advantages.double() * logprobs).sum(), logits)
    probs = logprobs.sum(-1).exp()
    reward = gradient((probs * REWARDS).sum(), logits)
    pull = gradient(-2.0 * (probs * (logprobs - ref_logprobs).sum(-1)).sum(), logits)
    assert pull.norm() > 0.05
    if estimator == "k1":
        assert torch.allclose(got, reward + pull, atol=1e-6, rtol=0)
    else:  # near the reference, their pull is next to none
        assert (got - reward).norm() < 0.15 * pull.norm()


@pytest.mark.parametrize("name", sorted(set(LOSSES.names()) - {"gmpo"}))
@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_tokens_of_high_entropy_keep_the_weight_they_had(name, mode):
    """arXiv:2506.01939 divides by all tokens: what is kept has the gradient it had without."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(4, 6, generator=generator).double()
    old = (logprobs + 0.1 * torch.randn(4, 6, generator=generator)).detach()
    values = torch.randn(4, 6, generator=generator).double()
    mask = torch.arange(6) < tensor([6, 4, 0, 1])[:, None]
    keep = torch.rand(4, 6, generator=generator) < 0.3
    keep[3, 0] = False  # a response that keeps no token counts as a sequence all the same
    assert 0 < int((keep & mask).sum()) < int(mask.sum()) / 2
    logprobs.requires_grad_()
    options = {"loss_aggregation": mode, "denominators": Denominators(11.0, 3.0, 6.0)}
    options |= {"cpgd_drift_coef": 0.0} if name == "cpgd" else {}
    for kl in ({}, {"ref_logprobs": old - 1.0, "init_kl_coef": 0.3}):

        def slope(advantages, kept, more=options | kl):
            loss, _ = policy_loss(name, logprobs, old, advantages, mask, keep=kept, **more)
            return torch.autograd.grad(loss, logprobs)[0]

        chosen, whole, only_kl = slope(values, keep), slope(values, None), slope(0 * values, None)
        assert torch.equal(chosen[keep], whole[keep])
        assert torch.equal(chosen[~keep], only_kl[~keep])
        assert whole[keep].abs().max() > 0.01


def test_the_policy_loss_of_high_entropy_tokens_by_hand():
    # 4 tokens, one kept, with a loss of -2: over all 4 tokens, not over 1.
    old, mask = torch.full((2, 2), -1.0), torch.ones(2, 2).bool()
    keep = tensor([[True, False], [False, False]])
    values = torch.full((2, 2), 2.0)
    expected = {
        "token_mean": -2 / 4,
        "seq_mean_token_mean": (-2 / 2 + 0) / 2,
        "seq_mean_token_sum_norm": (-2 / 8 + 0) / 2,
    }
    for mode, number in expected.items():
        options = {"loss_aggregation": mode, "denominators": Denominators(4.0, 2.0, 8.0)}
        loss, _ = policy_loss("ppo_clip", old, old, values, mask, keep=keep, **options)
        assert float(loss) == pytest.approx(number)


def test_gmpo_takes_no_choice_of_tokens():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    for options in (
        {"keep": mask},
        {"rollout_correction": "token_tis", "rollout_logprobs": zeros},
        {"rollout_correction": "token_mask", "rollout_logprobs": zeros},
    ):
        with pytest.raises(ValueError, match="cannot be chosen or weighed in gmpo"):
            policy_loss("gmpo", zeros, zeros, zeros, mask, **options)
    loss, _ = policy_loss(
        *("gmpo", zeros, zeros, zeros + 1, mask),
        rollout_correction="seq_tis",
        rollout_logprobs=zeros,
    )
    assert float(loss) == -1.0


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ppo_clip", 0.8, 1.3),
        ("cpgd", 0.8, 1.3),
        ("gspo", 1 - 3e-4, 1 + 4e-4),
        ("gmpo", math.exp(-0.4), math.exp(0.4)),
    ],
)
def test_left_out_clip_ranges_are_those_of_the_paper(name, low, high):
    """A token has a gradient just within the range of its ratio, and none just beyond it."""
    mask, old = torch.ones(1, 1).bool(), torch.zeros(1, 1)
    for ratio, advantage, free in (
        *((high - 1e-5, 1.0, True), (high + 1e-5, 1.0, False)),
        *((low + 1e-5, -1.0, True), (low - 1e-5, -1.0, False)),
    ):
        logprobs = torch.full((1, 1), math.log(ratio), requires_grad=True)
        extra = {"cpgd_drift_coef": 0.0} if name == "cpgd" else {}
        loss, metrics = policy_loss(name, logprobs, old, tensor([[advantage]]), mask, **extra)
        loss.backward()
        assert bool(logprobs.grad != 0) == free
        assert float(metrics["policy/clip_fraction"]) == float(not free)


@pytest.mark.parametrize("ratio", [1e-8, 1e-3, 0.5, 0.79, 0.99, 1.29, 1.31, 50.0])
def test_cispo_has_no_lower_bound(ratio):
    logprobs = torch.full((1, 1), math.log(ratio), requires_grad=True)
    args = (torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1).bool())
    loss, metrics = policy_loss("cispo", logprobs, *args)
    loss.backward()
    assert float(logprobs.grad) == pytest.approx(-min(ratio, 1.3), rel=1e-5)
    assert float(metrics["policy/clip_fraction"]) == float(ratio > 1.3)
    bound = policy_loss("cispo", logprobs, *args, clip_range=0.2)[0]  # a bound that is asked for
    (got,) = torch.autograd.grad(bound, logprobs)
    assert float(got) == pytest.approx(-min(max(ratio, 0.8), 1.3), rel=1e-5)
