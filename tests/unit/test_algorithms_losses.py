import math
from dataclasses import replace

import pytest
import torch
from torch import tensor
from torch.nn.functional import pad

from torchrft.algorithms.aggregation import MODES, Denominators, aggregate, masked_sum
from torchrft.algorithms.losses import LOSSES, policy_loss, value_loss

BUDGET = {"max_response_length": 9.0}  # what seq_mean_token_sum_norm divides by
MASK = tensor([[True, True, False], [True, False, False]])
# Ratios 1.5 and 0.5 with advantage 1; 0.5 with advantage -2.
RATIOS = tensor([[1.5, 0.5, 1.0], [0.5, 1.0, 1.0]])
ADVANTAGES = tensor([[1.0, 1.0, 0.0], [-2.0, 0.0, 0.0]])


def hand_case(**options):
    old = torch.full((2, 3), -1.0)
    loss, metrics = policy_loss("ppo_clip", old + RATIOS.log(), old, ADVANTAGES, MASK, **options)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def random_case(rows=5, width=7, seed=0, spread=0.3):
    """float32 log-probs, old and reference ones, advantages, and a mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=generator) * 3
    logprobs = old + spread * torch.randn(rows, width, generator=generator)
    ref = old + spread * torch.randn(rows, width, generator=generator)
    advantages = torch.randn(rows, width, generator=generator)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[rows // 2] = 0
    mask = torch.arange(width) < lengths[:, None]
    mask[0, 0] = False  # a hole
    mask[0, 1] = True
    return logprobs.requires_grad_(), old, ref, advantages, mask


def loop_loss(logprobs, old, ref, advantages, mask, mode, low, high, kl, coef):
    """ALGORITHMS.md token by token, on float64 scalars that autograd follows."""
    sequences = []
    for i in range(mask.shape[0]):
        terms = []
        for t in range(mask.shape[1]):
            if not mask[i, t]:
                continue
            ratio = torch.exp(logprobs[i, t] - old[i, t])
            clipped = torch.clamp(ratio, 1 - low, 1 + high)
            policy = torch.maximum(-ratio * advantages[i, t], -clipped * advantages[i, t])
            d = logprobs[i, t] - ref[i, t]
            k2 = d * d / 2
            # k1's value with k2's gradient.
            penalty = {"k1": d.detach() + k2 - k2.detach(), "k2": k2, "k3": torch.exp(-d) - 1 + d}[
                kl
            ]
            terms.append(policy + coef * penalty)
        if terms:
            sequences.append(terms)
    if mode == "token_mean":
        return sum(map(sum, sequences)) / sum(map(len, sequences))
    if mode == "seq_mean_token_mean":
        return sum(sum(terms) / len(terms) for terms in sequences) / len(sequences)
    return sum(sum(terms) / BUDGET["max_response_length"] for terms in sequences) / len(sequences)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Token losses: max(-1.5, -1.3) = -1.3, max(-0.5, -0.8) = -0.5; max(1.0, 1.6) = 1.6.
        ("token_mean", (-1.3 - 0.5 + 1.6) / 3),
        ("seq_mean_token_mean", ((-1.3 - 0.5) / 2 + 1.6 / 1) / 2),
        ("seq_mean_token_sum_norm", ((-1.3 - 0.5) / 9 + 1.6 / 9) / 2),
    ],
)
def test_loss_aggregation(mode, expected):
    loss, metrics = hand_case(loss_aggregation=mode, **BUDGET)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert metrics["policy/loss"] == pytest.approx(expected, abs=1e-6)
    # The first and the last of the three tokens are clipped.
    assert metrics["policy/clip_fraction"] == pytest.approx(2 / 3)
    # k3 of KL(old || policy) with d = -log ratio: mean of (ratio - 1) - log ratio.
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 0.5)]
    assert metrics["policy/approx_kl"] == pytest.approx(sum(k3) / 3, abs=1e-6)
    assert metrics["policy/kl"] == 0.0


def test_seq_mean_token_mean_is_the_default():
    assert hand_case()[0] == pytest.approx(0.35, abs=1e-6)


def test_response_budget_is_the_norm_of_dr_grpo():
    budget = Denominators(tokens=3, sequences=2, max_response_length=4)
    loss, _ = hand_case(loss_aggregation="seq_mean_token_sum_norm", denominators=budget)
    assert loss == pytest.approx((-1.8 / 4 + 1.6 / 4) / 2, abs=1e-6)


def test_kl_term_by_hand():
    # k1 with the reference 0.1 below the policy on every token: KL = 0.1 whatever the aggregation.
    ref = torch.full((2, 3), -1.0) + RATIOS.log() - 0.1
    for mode in ("token_mean", "seq_mean_token_mean"):
        plain, _ = hand_case(loss_aggregation=mode)
        loss, metrics = hand_case(
            loss_aggregation=mode, ref_logprobs=ref, kl_estimator="k1", init_kl_coef=3.0
        )
        assert loss == pytest.approx(plain + 3.0 * 0.1, abs=1e-6)
        assert metrics["policy/kl"] == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_values_and_gradients_against_a_float64_loop(mode, kl):
    logprobs, old, ref, advantages, mask = random_case()
    loss, metrics = policy_loss(
        "ppo_clip",
        *(logprobs, old, advantages, mask),
        loss_aggregation=mode,
        ref_logprobs=ref,
        kl_estimator=kl,
        init_kl_coef=0.3,
        clip_range=0.15,
        clip_range_higher=0.25,
        **BUDGET,
    )
    loss.backward()
    exact = logprobs.detach().double().requires_grad_()
    others = (old.double(), ref.double(), advantages.double())
    expected = loop_loss(exact, *others, mask, mode, 0.15, 0.25, kl, 0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(logprobs.grad.double(), exact.grad, atol=1e-6, rtol=0)
    assert 0 < float(metrics["policy/clip_fraction"]) < 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "expected"),
    [
        (1.5, 1.0, 0.2, 0.3, -1.3),  # above 1 + clip_range_higher: held
        (1.5, 1.0, 0.2, 0.6, -1.5),  # within
        (0.5, -1.0, 0.2, 0.3, 0.8),  # below 1 - clip_range: held
        (0.5, -1.0, 0.6, 0.3, 0.5),  # within
        (1.5, -1.0, 0.2, 0.3, 1.5),  # the pessimistic side is not clipped
        (0.5, 1.0, 0.2, 0.3, -0.5),
    ],
)
def test_clip_range(ratio, advantage, low, high, expected):
    logprobs = tensor([[math.log(ratio)]], requires_grad=True)
    loss, metrics = policy_loss(
        *("ppo_clip", logprobs, torch.zeros(1, 1), tensor([[advantage]])),
        tensor([[True]]),
        clip_range=low,
        clip_range_higher=high,
    )
    loss.backward()
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    held = expected != pytest.approx(-ratio * advantage)
    assert float(metrics["policy/clip_fraction"]) == float(held)
    assert float(logprobs.grad) == pytest.approx(0.0 if held else -ratio * advantage)


@pytest.mark.parametrize("mode", MODES)
def test_on_policy_loss_is_minus_the_mean_advantage(mode):
    _, old, _, advantages, mask = random_case()
    logprobs = old.clone().requires_grad_()
    options = {"loss_aggregation": mode, **BUDGET}
    loss, metrics = policy_loss("ppo_clip", logprobs, old, advantages, mask, **options)
    mean = aggregate(advantages, mask, mode, replace(Denominators.of(mask), **BUDGET))
    assert float(loss) == pytest.approx(-float(mean), abs=1e-6)
    assert float(metrics["policy/clip_fraction"]) == 0.0
    assert float(metrics["policy/approx_kl"]) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_a_positive_advantage_raises_the_log_prob(mode):
    logprobs, old, _, _, mask = random_case(spread=0.01)
    advantages = torch.where(torch.arange(5)[:, None] % 2 == 0, 1.0, -1.0).expand(5, 7)
    options = {"loss_aggregation": mode, **BUDGET}
    loss, _ = policy_loss("ppo_clip", logprobs, old, advantages, mask, **options)
    loss.backward()
    assert torch.equal((-logprobs.grad).sign(), advantages * mask)  # the direction of descent


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filler", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("filled", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_padding_and_masked_values_have_no_effect(mode, filler, filled):
    logprobs, old, ref, advantages, mask = random_case()
    total = Denominators(float(mask.sum()), float(mask.any(-1).sum()), 9.0)
    options = {"loss_aggregation": mode, "init_kl_coef": 0.3, "denominators": total}
    loss, metrics = policy_loss(
        "ppo_clip", logprobs, old, advantages, mask, ref_logprobs=ref, **options
    )
    loss.backward()
    wide_mask = pad(mask, (0, 4))
    wide = [pad(x.detach(), (0, 4)) for x in (logprobs, old, ref, advantages)]
    for index in filled:
        wide[index] = wide[index].where(wide_mask, filler)
    inputs = wide[0].requires_grad_()
    padded, padded_metrics = policy_loss(
        *("ppo_clip", inputs, wide[1], wide[3], wide_mask), ref_logprobs=wide[2], **options
    )
    padded.backward()
    assert float(padded) == pytest.approx(float(loss), abs=1e-7)
    for name, value in metrics.items():
        assert float(padded_metrics[name]) == pytest.approx(float(value), abs=1e-7)
    assert torch.allclose(inputs.grad[:, :7], logprobs.grad, atol=1e-7)
    assert (inputs.grad[~wide_mask] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2,), (4,)])
def test_the_split_into_micro_batches_has_no_effect(mode, cuts):
    logprobs, old, ref, advantages, mask = random_case()
    total = replace(Denominators.of(mask), **BUDGET)
    options = {"loss_aggregation": mode, "init_kl_coef": 0.3, "denominators": total}
    whole, metrics = policy_loss(
        "ppo_clip", logprobs, old, advantages, mask, ref_logprobs=ref, **options
    )
    whole.backward()
    expected, logprobs.grad = logprobs.grad, None
    sums = dict.fromkeys(metrics, 0.0)
    for start, end in zip((0, *cuts), (*cuts, 5), strict=True):
        rows = slice(start, end)
        part, part_metrics = policy_loss(
            *("ppo_clip", logprobs[rows], old[rows], advantages[rows], mask[rows]),
            ref_logprobs=ref[rows],
            **options,
        )
        part.backward()
        sums = {name: value + float(part_metrics[name]) for name, value in sums.items()}
    assert torch.allclose(logprobs.grad, expected, atol=1e-7)
    for name, value in metrics.items():
        assert sums[name] == pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_without_tokens_counts_neither_above_nor_below(mode):
    logprobs, old, _, advantages, mask = random_case()
    kept = mask.any(-1)
    assert kept.sum() == 4
    options = {"loss_aggregation": mode, **BUDGET}
    with_it, _ = policy_loss("ppo_clip", logprobs, old, advantages, mask, **options)
    without, _ = policy_loss(
        *("ppo_clip", logprobs[kept], old[kept], advantages[kept], mask[kept]), **options
    )
    assert float(with_it) == pytest.approx(float(without), abs=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_unmasked_gives_zero_and_no_gradient(mode):
    logprobs, old, ref, advantages, mask = random_case()
    loss, metrics = policy_loss(
        *("ppo_clip", logprobs, old, advantages, torch.zeros_like(mask)),
        ref_logprobs=ref,
        loss_aggregation=mode,
        **BUDGET,
    )
    loss.backward()
    assert {float(loss), *map(float, metrics.values())} == {0.0}
    assert (logprobs.grad == 0).all()


def test_huge_ratios_stay_finite():
    logprobs = tensor([[0.0, -1000.0]], requires_grad=True)
    old = tensor([[-1000.0, 0.0]])
    loss, _ = policy_loss(
        "ppo_clip", logprobs, old, tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    )
    loss.backward()
    # exp(20) for the first token, exp(-20) for the second.
    assert float(loss) == pytest.approx((math.exp(20) - math.exp(-20)) / 2, rel=1e-6)
    assert logprobs.grad.isfinite().all()


def test_masked_sum_and_denominators():
    values = tensor([[1.0, 2.0, math.nan], [4.0, math.inf, -math.inf]])
    assert float(masked_sum(values, MASK)) == 7.0
    assert Denominators.of(MASK) == Denominators(3.0, 2.0, None)
    assert Denominators.of(MASK & False) == Denominators(0.0, 0.0, None)
    assert Denominators.of(MASK[:0]) == Denominators(0.0, 0.0, None)


@pytest.mark.parametrize("budget", [None, 0.0, -1.0, math.nan])
def test_the_sum_norm_demands_its_constant(budget):
    """The longest response of a batch is no constant: the same sample would weigh more or less."""
    given = Denominators(tokens=3.0, sequences=2.0, max_response_length=budget)
    for options in ({"max_response_length": budget}, {"denominators": given}):
        with pytest.raises(ValueError, match=r"sum_norm.* pass max_response_length > 0 \(it is"):
            hand_case(loss_aggregation="seq_mean_token_sum_norm", **options)
        with pytest.raises(ValueError, match="max_response_length"):
            value_loss(
                *(RATIOS, RATIOS, RATIOS, MASK),
                loss_aggregation="seq_mean_token_sum_norm",
                **options,
            )
        hand_case(loss_aggregation="token_mean", **options)  # the others have no use for it


def test_the_constant_of_the_sum_norm():
    options = {"loss_aggregation": "seq_mean_token_sum_norm"}
    for length in (2.0, 100.0):
        expected = ((-1.3 - 0.5) / length + 1.6 / length) / 2
        assert hand_case(**options, max_response_length=length)[0] == pytest.approx(expected)
        given = Denominators(tokens=3.0, sequences=2.0)
        both = hand_case(**options, denominators=given, max_response_length=length)
        assert both[0] == pytest.approx(expected)
    # (1 - 0)^2 + (2 - 0)^2 and (3 - 0)^2, over 5 tokens and 2 sequences, halved
    values = tensor([[1.0, 2.0, 7.0], [3.0, 7.0, 7.0]])
    loss, _ = value_loss(
        values, values, torch.zeros(2, 3), MASK, **options, max_response_length=5.0
    )
    assert float(loss) == pytest.approx((5 / 5 + 9 / 5) / 2 / 2)


def test_what_is_refused():
    with pytest.raises(ValueError, match='unknown policy_loss "ppo_clp"; did you mean "ppo_clip"'):
        policy_loss("ppo_clp", *[torch.zeros(1, 1)] * 3, torch.ones(1, 1).bool())
    with pytest.raises(ValueError, match='"ppo_clip" has no option "clip_rnge"'):
        hand_case(clip_rnge=0.1)
    with pytest.raises(ValueError, match='"mean" is unknown; choose from token_mean, seq_mean'):
        hand_case(loss_aggregation="mean")
    with pytest.raises(ValueError, match='kl_estimator "k4" is unknown'):
        hand_case(ref_logprobs=RATIOS, kl_estimator="k4")
    with pytest.raises(ValueError, match=r"shape \(2, 2\) differs from \(2, 3\)"):
        hand_case(ref_logprobs=torch.zeros(2, 2))
    assert "ppo_clip" in LOSSES.names()
