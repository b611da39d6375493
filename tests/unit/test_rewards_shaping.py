import statistics

import pytest
import torch

from torchrft.config.job_config import Reward
from torchrft.rewards.shaping import RewardShaper, RunningNorm, overlong_penalty
from torchrft.types import Completion, Score


def test_overlong_penalty_by_hand():
    # Budget 10, buffer 4: nothing up to 6 tokens, then -0.5 for each quarter of the buffer.
    found = [overlong_penalty(length, 10, 4, 2.0) for length in (1, 6, 7, 8, 10, 12)]
    assert found == pytest.approx([0.0, 0.0, -0.5, -1.0, -2.0, -2.0])


def test_the_penalty_is_a_part_of_the_score():
    completion = Completion(0, 0, tuple(range(8)), (0.0,) * 8, "", "stop")
    config = Reward(overlong_buffer_len=4, overlong_penalty_factor=2.0)
    [score] = RewardShaper(config).penalize([Score(1.0, {"rule": 1.0})], [completion], [10])
    assert score == Score(0.0, {"rule": 1.0, "overlong": -1.0})
    [same] = RewardShaper(Reward()).penalize([Score(1.0, {"rule": 1.0})], [completion], [10])
    assert same == Score(1.0, {"rule": 1.0})


@pytest.mark.parametrize("sizes", [[1, 4, 2], [7], [3, 3, 1]])
def test_running_norm_is_that_of_all_rewards_seen(sizes):
    rewards = torch.rand(7, generator=torch.Generator().manual_seed(0)) * 5 + 100
    norm = RunningNorm()
    for part in rewards.split(sizes):
        norm.update(part)
    assert norm.mean == pytest.approx(statistics.fmean(rewards.tolist()), abs=1e-9)
    std = statistics.stdev(rewards.tolist())
    value = torch.tensor([90.0, 110.0])
    assert torch.allclose(norm.normalize(value, False), value / std, rtol=1e-6)
    expected = (value - norm.mean) / std
    assert torch.allclose(norm.normalize(value, True), expected.float(), rtol=1e-5)


def test_two_ranks_hold_the_statistics_of_one():
    rewards = torch.rand(10, generator=torch.Generator().manual_seed(1))
    whole = RunningNorm()
    whole.update(rewards)
    parts = rewards[:4], rewards[4:]
    mean = float(rewards.double().mean())
    others = [
        [torch.tensor([len(p), p.double().sum()], dtype=torch.float64) for p in parts],
        [(p.double() - mean).square().sum()[None] for p in parts],
    ]
    for rank, part in enumerate(parts):
        calls = iter(others)
        norm = RunningNorm()
        norm.update(part, lambda tensor, rank=rank, calls=calls: tensor + next(calls)[1 - rank])
        assert norm.count == 10
        assert (norm.mean, norm.squares) == pytest.approx((whole.mean, whole.squares), abs=1e-12)


def test_fewer_than_two_rewards_change_nothing():
    norm = RunningNorm()
    norm.update(torch.tensor([3.0]))
    assert norm.normalize(torch.tensor([3.0]), True).tolist() == [3.0]
    norm.update(torch.tensor([]))
    assert norm.count == 1
    norm.update(torch.tensor([3.0]))  # equal rewards: no division by zero
    assert norm.normalize(torch.tensor([3.0]), True).tolist() == [0.0]


def test_normalization_comes_before_clipping_and_is_saved():
    def one_rank(tensor):
        return tensor

    config = Reward(reward_running_norm=True, reward_running_norm_minus_mean=True, reward_clip=0.5)
    shaper = RewardShaper(config)
    # Mean 2, unbiased std 1: -1, 0, 1, of which two are clipped to 0.5.
    shaped, metrics = shaper.shape(torch.tensor([1.0, 2.0, 3.0]), one_rank)
    assert shaped.tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert metrics["reward/clipped_fraction"] == pytest.approx(2 / 3)
    other = RewardShaper(config)
    other.load_state_dict(shaper.state_dict())
    rewards = torch.tensor([2.0, 2.5])
    assert torch.equal(other.shape(rewards, one_rank)[0], shaper.shape(rewards, one_rank)[0])
