"""Every estimator, loss, aggregation and correction against plain loops in float64.

The reference is written from docs/algorithms.md, sample by sample and token by token, on Python
floats and float64 autograd; the package's own functions are not used in it.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.algorithms import advantages as package
from torchrft.algorithms.aggregation import MODES, Denominators
from torchrft.algorithms.corrections import CORRECTIONS
from torchrft.algorithms.losses import LOSSES, policy_loss, value_loss
from torchrft.algorithms.selection import high_entropy_mask

B, T = 7, 6
GROUPS = [0, 0, 0, 1, 1, 2, 2]  # of unequal sizes


def case(seed: int):
    """Rewards, mask (prefixes, one of them empty) and log-probs, in float32."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[seed % B] = 0
    mask = torch.arange(T) < lengths[:, None]
    logprobs, old, ref, rollout = (-2 * torch.rand(B, T, generator=g) for _ in range(4))
    old = logprobs + 0.6 * (old - old.mean())
    rollout = old + 0.5 * (rollout - rollout.mean())
    rewards = torch.randint(0, 4, (B,), generator=g) / 2.0
    values = torch.randn(B, T, generator=g)
    sequence = torch.randn(B, 1, generator=g).expand(B, T)
    return rewards, mask, logprobs, old, ref, rollout, values, sequence


def tokens(mask, i):
    return [t for t in range(mask.shape[1]) if mask[i, t]]


# ---------------------------------------------------------------- advantages


def centered(rewards, groups, i):
    mine = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
    mean = sum(mine) / len(mine)
    if max(mine) == min(mine):
        return 0.0, 0.0, mine
    return rewards[i] - mean, math.sqrt(sum((r - mean) ** 2 for r in mine) / (len(mine) - 1)), mine


def loop_advantages(name, rewards, mask, kl, values, gamma, lambd, weight):
    """Advantages and returns as lists of lists; `kl` [B, T] is the penalty already scaled."""
    out = [[0.0] * T for _ in range(B)]
    sequence = [rewards[i] - sum(kl[i][t] for t in tokens(mask, i)) for i in range(B)]
    varied = len({g for i, g in enumerate(GROUPS) if centered(sequence, GROUPS, i)[1] > 0})
    for i in range(B):
        where = tokens(mask, i)
        value, std, mine = centered(sequence, GROUPS, i)
        if name in ("group_norm", "gspo", "gmpo", "dapo", "cispo") or (
            name == "cpgd" and weight == "std"
        ):
            value = value / (std + 1e-6)
        elif name == "cpgd" and weight == "clip_filter":
            value = value * min(3 / max(varied, 1), 3.0)
        elif name == "rloo":
            value = sequence[i] - (sum(mine) - sequence[i]) / (len(mine) - 1)
        r = {t: -kl[i][t] + (rewards[i] if t == where[-1] else 0.0) for t in where}
        for t in where:
            if name in ("reinforce", "reinforce_plus_plus"):
                out[i][t] = sum(gamma ** (k - t) * r[k] for k in where if k >= t)
            elif name == "gae":
                total = 0.0
                for k in (k for k in where if k >= t):
                    after = values[i][k + 1] if k + 1 in where else 0.0
                    delta = r[k] + gamma * after - values[i][k]
                    total += (gamma * lambd) ** (k - t) * delta
                out[i][t] = total
            else:
                out[i][t] = value
    returns = [
        [out[i][t] + (values[i][t] if name == "gae" else 0) for t in range(T)] for i in range(B)
    ]
    return out, returns


def loop_whiten(table, mask):
    flat = [table[i][t] for i in range(B) for t in tokens(mask, i)]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat))
    return [
        [(table[i][t] - mean) / (std + 1e-8) if mask[i, t] else 0.0 for t in range(T)]
        for i in range(B)
    ]


@pytest.mark.parametrize("kl_in_reward", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", package.ESTIMATORS.names())
def test_advantages(name, seed, kl_in_reward):
    rewards, mask, _, old, ref, _, values, _ = case(seed)
    gamma, lambd = 0.9, 0.8
    options = {
        "gae": {"values": values, "gamma": gamma, "lambd": lambd},
        "reinforce": {"gamma": gamma},
        "reinforce_plus_plus": {"gamma": gamma},
    }.get(name, {})
    kl = [[0.0] * T for _ in range(B)]
    if kl_in_reward:
        options |= {
            "old_logprobs": old,
            "ref_logprobs": ref,
            "init_kl_coef": 0.3,
            "kl_estimator": "k2",
        }
        for i in range(B):
            for t in tokens(mask, i):
                kl[i][t] = 0.3 * (float(old[i, t]) - float(ref[i, t])) ** 2 / 2
    weights = ["std", "clip_filter", "none"] if name == "cpgd" else [None]
    for weight in weights:
        extra = {} if weight is None else {"cpgd_weight": weight}
        result = package.compute(name, rewards, torch.tensor(GROUPS), mask, **options, **extra)
        expected, returns = loop_advantages(
            name, rewards.tolist(), mask, kl, values.tolist(), gamma, lambd, weight
        )
        if name in ("reinforce_plus_plus", "reinforce_baseline"):
            expected = loop_whiten(expected, mask)
        got = result.advantages.double()
        assert torch.allclose(
            got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6
        )
        if name == "gae":
            inside = torch.tensor(returns, dtype=torch.float64).where(mask, 0.0)
            assert torch.allclose(result.returns.double(), inside, atol=1e-6)


def test_whitening_and_clipping_follow_the_estimator():
    rewards, mask, *_ = case(3)
    plain = package.compute("dr_grpo", rewards, torch.tensor(GROUPS), mask).advantages.tolist()
    white = loop_whiten(plain, mask)
    result = package.compute(
        "dr_grpo", rewards, torch.tensor(GROUPS), mask, advantages_norm=True, advantage_clip=0.5
    )
    expected = [[max(-0.5, min(0.5, x)) for x in row] for row in white]
    assert torch.allclose(result.advantages, torch.tensor(expected), atol=1e-6)
    flat = [abs(white[i][t]) > 0.5 for i in range(B) for t in tokens(mask, i)]
    share = result.metrics["advantages/clipped_fraction"]
    assert share == pytest.approx(sum(flat) / len(flat))
    assert 0 < share < 1


def test_statistics_over_ranks_are_those_of_one_rank():
    """`reduce` adds what the other rank has: two halves give what the whole gives."""
    rewards, mask, *_ = case(4)
    group = torch.tensor(GROUPS)
    for name, options in (
        ("reinforce_baseline", {"advantage_clip": 0.7}),
        ("cpgd", {"cpgd_weight": "clip_filter"}),
    ):
        whole = package.compute(name, rewards, group, mask, **options)
        halves = [slice(0, 3), slice(3, B)]  # groups stay whole
        sums: list[list[torch.Tensor]] = [[], []]
        results = [None, None]
        # Each round of `reduce` needs the other half's tensor: replay until all are known.
        for _ in range(6):
            for rank, part in enumerate(halves):
                calls = []

                def reduce(tensor, calls=calls, rank=rank, sums=sums):
                    calls.append(tensor)
                    others = sums[1 - rank]
                    index = len(calls) - 1
                    return tensor + others[index] if index < len(others) else tensor

                results[rank] = package.compute(
                    name, rewards[part], group[part], mask[part], reduce=reduce, **options
                )
                sums[rank] = calls
        got = torch.cat([result.advantages for result in results])
        assert torch.allclose(got, whole.advantages, atol=1e-6)
        assert results[0].metrics == pytest.approx(whole.metrics)


def test_what_estimators_refuse():
    ones = torch.ones(3, 2).bool()
    rewards = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="sample 2 is alone in its group: n_samples_per_prompt"):
        package.compute("rloo", rewards, torch.tensor([0, 0, 1]), ones)
    with pytest.raises(ValueError, match='cpgd_weight "sdt" is unknown'):
        package.compute("cpgd", rewards, torch.tensor([0, 0, 0]), ones, cpgd_weight="sdt")
    with pytest.raises(ValueError, match="needs old_logprobs beside ref_logprobs"):
        package.compute("reinforce", rewards, torch.zeros(3), ones, ref_logprobs=torch.zeros(3, 2))
    with pytest.raises(ValueError, match='"gae" needs the values of a critic'):
        package.compute("gae", rewards, torch.zeros(3), ones)
    assert package.AdvantageEstimator("gae").needs_values
    assert not package.AdvantageEstimator("rloo").needs_values


# ---------------------------------------------------------------- losses


def clamp(x, low, high):
    return min(max(x, low), high)


def loop_token_loss(name, lp, old, adv, mask, i, t, low, high, dual, drift):
    """Loss of one token as a float64 tensor with gradient in `lp`."""
    ell = (lp[i, t] - old[i, t]).clamp(-20, 20)
    where = tokens(mask, i)
    mean = sum((lp[i, k] - old[i, k]).clamp(-20, 20) for k in where) / len(where)
    a = adv[i, t]

    def surrogate(ratio):
        bounded = ratio.clamp(1 - low, 1 + high)
        loss = torch.maximum(-ratio * a, -bounded * a)
        return torch.minimum(loss, -dual * a) if dual is not None and a < 0 else loss

    if name == "ppo_clip":
        return surrogate(ell.exp())
    if name == "gspo":
        return surrogate(mean.exp().detach() * (lp[i, t] - lp[i, t].detach()).exp())
    if name == "gmpo":
        sign = 1.0 if a > 0 else -1.0
        total = 0.0
        for k in where:
            each = (lp[i, k] - old[i, k]).clamp(-20, 20)
            total = total + sign * torch.minimum(sign * each, sign * each.clamp(-low, high))
        return -a * (total / len(where)).exp()
    if name == "cpgd":
        bounded = ell.clamp(math.log(1 - low), math.log(1 + high))
        return -torch.minimum(ell * a, bounded * a) + drift * (ell.exp() - 1 - ell)
    if name == "cispo":
        return -ell.exp().detach().clamp(1 - low, 1 + high) * a * lp[i, t]
    return -a * lp[i, t]


def loop_weight(correction, old, rollout, mask, i, t, cap):
    w = math.exp(float(old[i, t]) - float(rollout[i, t]))
    total = sum(float(old[i, k]) - float(rollout[i, k]) for k in tokens(mask, i))
    if correction == "token_tis":
        return min(w, cap)
    if correction == "seq_tis":
        return min(math.exp(total), cap)
    if correction == "token_mask":
        return float(1 / cap <= w <= cap)
    if correction == "seq_mask":
        return float(1 / cap <= math.exp(total / len(tokens(mask, i))) <= cap)
    return 1.0


def loop_aggregate(terms, mask, mode, budget):
    """`terms[i][t]` over the tokens of `mask`."""
    rows = [i for i in range(B) if tokens(mask, i)]
    if mode == "token_mean":
        count = sum(len(tokens(mask, i)) for i in rows)
        return sum(terms[i][t] for i in rows for t in tokens(mask, i)) / count
    total = 0.0
    for i in rows:
        where = tokens(mask, i)
        below = len(where) if mode == "seq_mean_token_mean" else budget
        total = total + sum(terms[i][t] for t in where) / below
    return total / len(rows)


def check_loss(name, mode, seed, correction="none", dual=None, entropy_coef=0.0, ratio=1.0):
    _, mask, lp32, old, ref, rollout, _, adv = case(seed)
    low, high, drift, cap, beta, budget = 0.15, 0.25, 0.4, 1.3, 0.2, 9.0
    entropy = torch.rand(B, T, generator=torch.Generator().manual_seed(seed + 9))
    lp = lp32.double().requires_grad_()
    d_old, d_adv, d_ref = old.double(), adv.double(), ref.double()
    keep = mask
    if ratio < 1:
        pool = sorted(
            (float(entropy[i, t]) for i in range(B) for t in tokens(mask, i)), reverse=True
        )
        least = pool[math.ceil(ratio * len(pool) - 1e-9) - 1]
        keep = mask & (entropy >= least)
        assert torch.equal(high_entropy_mask(entropy, mask, ratio), keep)
    terms = [[None] * T for _ in range(B)]
    kl = [[None] * T for _ in range(B)]
    for i in range(B):
        for t in tokens(mask, i):
            weight = loop_weight(correction, old, rollout, mask, i, t, cap)
            terms[i][t] = weight * loop_token_loss(
                name, lp, d_old, d_adv, mask, i, t, low, high, dual, drift
            )
            d = lp[i, t] - d_ref[i, t]
            kl[i][t] = (-d).exp() - 1 + d
    for i in range(B):
        for t in tokens(mask & ~keep, i):
            terms[i][t] = 0.0  # dropped above; the denominators count all tokens
    expected = loop_aggregate(terms, mask, mode, budget)
    expected = expected + beta * loop_aggregate(kl, mask, mode, budget)
    expected = expected - entropy_coef * loop_aggregate(
        entropy.double().tolist(), mask, mode, budget
    )
    expected.backward()

    options = {"clip_range": low, "clip_range_higher": high} if name != "reinforce" else {}
    options |= {"cpgd_drift_coef": drift} if name == "cpgd" else {}
    options |= {"dual_clip": dual} if dual is not None else {}
    lengths = mask.sum(-1)
    total = Denominators(float(mask.sum()), float(mask.any(-1).sum()), budget)
    assert int((lengths == 0).sum()) == 1
    logprobs = lp32.clone().requires_grad_()
    loss, metrics = policy_loss(
        name,
        logprobs,
        old,
        adv,
        mask,
        loss_aggregation=mode,
        ref_logprobs=ref,
        init_kl_coef=beta,
        entropy=entropy,
        entropy_coef=entropy_coef,
        keep=keep if ratio < 1 else None,
        rollout_logprobs=rollout,
        rollout_correction=correction,
        rollout_correction_cap=cap,
        denominators=total,
        **options,
    )
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), abs=2e-6)
    assert torch.allclose(logprobs.grad.double(), lp.grad, atol=1e-6)
    assert float(metrics["policy/loss"]) == pytest.approx(float(loss))
    assert lp.grad.abs().max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES.names())
def test_losses(name, mode, seed):
    check_loss(name, mode, seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_corrections(correction, mode):
    check_loss("ppo_clip", mode, 2, correction=correction)


def test_dual_clip_entropy_and_selection():
    check_loss("ppo_clip", "token_mean", 3, dual=1.05)
    check_loss("ppo_clip", "seq_mean_token_mean", 4, entropy_coef=0.3)
    for mode in MODES:
        check_loss("gspo", mode, 5, ratio=0.4)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LOSSES.names()),
    st.sampled_from(MODES),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 2), min_size=B, max_size=B),
)
def test_any_split_into_micro_batches_is_the_same_step(name, mode, seed, part_of):
    _, mask, lp, old, ref, _, _, adv = case(seed)
    total = Denominators(float(mask.sum()), float(mask.any(-1).sum()), 8.0)
    options = {"loss_aggregation": mode, "denominators": total, "init_kl_coef": 0.1}
    whole = lp.clone().requires_grad_()
    loss, metrics = policy_loss(name, whole, old, adv, mask, ref_logprobs=ref, **options)
    loss.backward()
    pieces, sums, value = lp.clone().requires_grad_(), {}, 0.0
    for part in set(part_of):
        rows = [i for i in range(B) if part_of[i] == part]
        each, found = policy_loss(
            name, pieces[rows], old[rows], adv[rows], mask[rows], ref_logprobs=ref[rows], **options
        )
        each.backward()
        value += float(each.detach())
        sums = {k: sums.get(k, 0.0) + float(v) for k, v in found.items()}
    assert value == pytest.approx(float(loss.detach()), abs=1e-6)
    assert torch.allclose(pieces.grad, whole.grad, atol=1e-6)
    assert sums == pytest.approx({k: float(v) for k, v in metrics.items()}, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES.names())
def test_sign_and_on_policy_value(name):
    """A positive advantage raises log pi; at rho = 1 losses of ratios are minus the mean of A."""
    lp = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    adv = torch.tensor([[2.0, 2.0], [-1.0, -1.0]])
    mask = torch.ones(2, 2).bool()
    loss, _ = policy_loss(name, lp, lp.detach(), adv, mask, loss_aggregation="token_mean")
    loss.backward()
    assert (torch.sign(-lp.grad) == torch.sign(adv)).all()
    if name in ("ppo_clip", "gspo", "gmpo"):
        assert float(loss.detach()) == pytest.approx(-0.5)  # -(2 + 2 - 1 - 1) / 4
    elif name == "cpgd":
        assert float(loss.detach()) == 0.0  # log-ratios are 0
    else:
        # -A log pi: 2 + 4 - 0.5 - 3 = 2.5, over 4 tokens
        assert float(loss.detach()) == pytest.approx(0.625)


def test_losses_by_hand():
    # One token each, old log-prob 0, so rho = exp(logprob): 1.5 and 0.5; A = 1 and -1.
    lp, adv = torch.log(torch.tensor([[1.5], [0.5]])), torch.tensor([[1.0], [-1.0]])
    mask, old = torch.ones(2, 1).bool(), torch.zeros(2, 1)
    by_hand = {
        # -min(1.5, 1.2) and max(0.5, 0.8): (-1.2 + 0.8) / 2
        "ppo_clip": -0.2,
        "gspo": -0.2,  # a sequence of one token has the token's ratio
        # l' = min(ln 1.5, 0.2) = 0.2; -min(-ln 0.5, 0.2) = -0.2: (-e^0.2 + e^-0.2) / 2
        "gmpo": (-math.exp(0.2) + math.exp(-0.2)) / 2,
        # -ln 1.2 (clipped) and ln 0.8 (clipped); the drift is 0 with its coefficient
        "cpgd": (-math.log(1.2) + math.log(0.8)) / 2,
        # -1.2 ln 1.5 and 0.8 ln 0.5
        "cispo": (-1.2 * math.log(1.5) + 0.8 * math.log(0.5)) / 2,
        "reinforce": (-math.log(1.5) + math.log(0.5)) / 2,
    }
    assert set(by_hand) == set(LOSSES.names())
    for name, expected in by_hand.items():
        options = {"clip_range": 0.2, "clip_range_higher": 0.2} if name != "reinforce" else {}
        options |= {"cpgd_drift_coef": 0.0} if name == "cpgd" else {}
        loss, _ = policy_loss(name, lp, old, adv, mask, loss_aggregation="token_mean", **options)
        assert float(loss) == pytest.approx(expected, abs=1e-6), name


def test_value_loss():
    # V_old 0, V 0.5 clipped to 0.2; return 1: max(0.64, 0.25) = 0.64. Return 0: max(0.04, 0.25).
    values = torch.tensor([[0.5], [0.5]], requires_grad=True)
    returns, mask = torch.tensor([[1.0], [0.0]]), torch.ones(2, 1).bool()
    loss, metrics = value_loss(values, torch.zeros(2, 1), returns, mask, value_clip=0.2)
    assert float(loss) == pytest.approx((0.64 + 0.25) / 2 / 2)
    assert float(metrics["clip_fraction"]) == 0.5
    loss.backward()
    # The clipped term has no gradient; the other is (V - ret) / 2 sequences = 0.25.
    assert torch.allclose(values.grad, torch.tensor([[0.0], [0.25]]))


def test_what_losses_refuse():
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
    with pytest.raises(ValueError, match=r"clip_range 1.0 must be < 1"):
        policy_loss("cpgd", zeros, zeros, zeros, mask, clip_range=1.0)
    with pytest.raises(ValueError, match='"token_tis" needs rollout_logprobs'):
        policy_loss("ppo_clip", zeros, zeros, zeros, mask, rollout_correction="token_tis")
    with pytest.raises(ValueError, match=r"entropy_coef = 0.1 needs the tokens' entropy"):
        policy_loss("ppo_clip", zeros, zeros, zeros, mask, entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"cap 0.5 must be at least 1"):
        policy_loss(
            *("ppo_clip", zeros, zeros, zeros, mask),
            rollout_logprobs=zeros,
            rollout_correction="token_mask",
            rollout_correction_cap=0.5,
        )
