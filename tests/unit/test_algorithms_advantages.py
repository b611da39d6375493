import math

import pytest
import torch
from torch import tensor

from torchrft.algorithms.advantages import ESTIMATORS, compute
from torchrft.algorithms.presets import PRESETS, resolve


def per_sample(rewards, group, estimator="group_norm"):
    rewards = tensor(rewards)
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    return compute(estimator, rewards, tensor(group), mask).advantages.squeeze(1).tolist()


def loop_group_norm(rewards, group):
    """The formula of ALGORITHMS.md, sample by sample, in Python floats."""
    result = []
    for mine, own in zip(rewards, group, strict=True):
        members = [r for r, g in zip(rewards, group, strict=True) if g == own]
        mean = sum(members) / len(members)
        variance = sum((r - mean) ** 2 for r in members) / max(len(members) - 1, 1)
        result.append((mine - mean) / (math.sqrt(variance) + 1e-6))
    return result


def test_group_norm_by_hand():
    # Rewards 1 and 3: mean 2, unbiased std sqrt((1 + 1) / 1) = 1.41421; -1 / 1.414215 = -0.707106.
    mask = tensor([[True, True, False], [True, False, False]])
    result = compute("group_norm", tensor([1.0, 3.0]), tensor([5, 5]), mask)
    expected = tensor([[-0.7071063, -0.7071063, 0.0], [0.7071063, 0.0, 0.0]])
    assert torch.allclose(result.advantages, expected, atol=1e-7)
    assert torch.equal(result.returns, result.advantages)
    assert result.advantages.dtype == torch.float32
    assert result.metrics == {}


def test_groups_of_unequal_size_interleaved():
    rewards = [1.0, 0.0, 0.25, 1.0, 0.5, 0.0, 0.75]
    group = [9, 2, 9, 2, 9, 7, 9]
    got = per_sample(rewards, group)
    assert got == pytest.approx(loop_group_norm(rewards, group), abs=1e-6)
    assert got[5] == 0.0  # alone in its group
    # By hand: group 2 holds 0 and 1: mean 0.5, std 0.70711, so -+0.5 / 0.70711 = -+0.70711.
    assert [got[1], got[3]] == pytest.approx([-0.7071058, 0.7071058], abs=1e-6)


def test_order_of_samples_has_no_effect():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    group = tensor([0, 1, 2] * 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(12, 2, dtype=torch.bool)
    straight = compute("group_norm", rewards, group, mask).advantages
    shuffled = compute("group_norm", rewards[order], group[order], mask).advantages
    assert torch.allclose(straight[order], shuffled, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.7, 1 / 3, 1e-8, 123456.7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_equal_rewards_give_exactly_zero(value, size):
    got = per_sample([value] * size + [0.0, 1.0], [4] * size + [5, 5])
    assert got[:size] == [0.0] * size
    assert got[size:] != [0.0, 0.0]


def test_sign():
    got = per_sample([0.0, 0.0, 1.0, 0.0], [0, 0, 0, 0])
    assert got[2] > 0 > max(got[0], got[1], got[3])


def test_only_response_tokens_get_an_advantage():
    mask = tensor([[True, False, True], [False, False, False]])
    advantages = compute("group_norm", tensor([0.0, 1.0]), tensor([0, 0]), mask).advantages
    assert (advantages != 0).tolist() == mask.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_names_the_sample(bad):
    with pytest.raises(ValueError, match=rf"the reward of sample 2 is {bad}"):
        per_sample([0.0, 1.0, bad, 1.0], [0, 0, 1, 1])


def test_what_is_refused():
    with pytest.raises(ValueError, match='unknown advantage_estimator "group_nrm"; did you mean'):
        per_sample([0.0], [0], "group_nrm")
    mask = torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match='"group_norm" has no option "gama"'):
        compute("group_norm", tensor([0.0, 1.0]), tensor([0, 0]), mask, gama=1.0)
    with pytest.raises(ValueError, match=r"must be \[B\], \[B\], \[B, T\]"):
        compute("group_norm", tensor([0.0, 1.0, 2.0]), tensor([0, 0, 0]), mask)
    with pytest.raises(ValueError, match=r"must be \[B\], \[B\], \[B, T\]"):
        compute("group_norm", tensor([0.0, 1.0]), tensor([0]), mask)


def test_presets_are_made_of_registered_parts_and_can_be_overridden():
    from torchrft.algorithms.losses import LOSSES

    for preset in PRESETS.values():
        assert preset.estimator in ESTIMATORS.names()
        assert preset.policy_loss in LOSSES.names()
    default = resolve("group_norm")
    assert default == PRESETS["group_norm"]
    assert default.loss_aggregation == "seq_mean_token_mean"
    other = resolve("group_norm", policy_loss="reinforce", loss_aggregation="token_mean")
    assert (other.estimator, other.policy_loss) == ("group_norm", "reinforce")
    assert other.loss_aggregation == "token_mean"
    own = resolve("mine.py:best", kl_placement=None)
    assert (own.estimator, own.policy_loss) == ("mine.py:best", "ppo_clip")
