"""Micro-batches: which samples share a pass, and that packing changes no number."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.learn.packing import build, plan
from torchrft.models.attention import Packed
from torchrft.models.policy import PolicyModel
from torchrft.types import RolloutBatch


def all_rows(batch):
    return list(range(len(batch)))


def cost(batch, rows, last=0):
    """Tokens of one pass, those that sequences of one prompt begin with once; less the `last`."""
    beginnings = set()
    for row in rows:
        ids, prompt = batch.sequences[row].tolist(), int(batch.prompt_lens[row])
        ends = range(1, len(ids) - last + 1)
        beginnings |= {(tuple(ids[:prompt]), tuple(ids[:end])) for end in ends}
    return len(beginnings)


def test_padded_plan_goes_in_order():
    batch = tiny.batch([(2, [1] * 5)])
    assert plan(batch, [0, 1, 2, 3, 4], packed=False, samples=2, max_tokens=1) == [
        [0, 1], [2, 3], [4],
    ]  # fmt: skip
    assert plan(batch, [4, 2, 0], packed=False, samples=3, max_tokens=1) == [[4, 2, 0]]


def test_packed_plan_by_hand():
    """Prompt of 4: 4 + 3 + 3 = 10 fits, the next 3 do not. Prompt of 2: 2 + 1 fills its bin.
    First-fit-decreasing: 10, 4 + 3 = 7, then 3 beside the 7."""
    batch = tiny.batch([(4, [3, 3, 3]), (2, [1])])
    rows = all_rows(batch)
    assert plan(batch, rows, packed=True, samples=1, max_tokens=10) == [[0, 1], [2, 3]]
    assert plan(batch, rows, packed=True, samples=1, max_tokens=16) == [[0, 1, 2, 3]]
    assert plan(batch, rows, packed=True, samples=1, max_tokens=15) == [[0, 1, 2], [3]]
    assert plan(batch, rows, packed=True, samples=1, max_tokens=7) == [[0], [1], [2], [3]]
    # The largest piece first, whatever the order of the rows.
    assert plan(batch, [3, 2], packed=True, samples=1, max_tokens=9) == [[2], [3]]


def test_token_budget():
    batch = tiny.batch([(5, [4, 1, 9, 3]), (2, [8, 8]), (7, [1]), (1, [2, 2, 2])], seed=3)
    sizes = []
    for budget in (14, 16, 20, 33, 60, 1000):
        bins = plan(batch, all_rows(batch), packed=True, samples=1, max_tokens=budget)
        assert sorted(row for rows in bins for row in rows) == all_rows(batch)
        assert all(cost(batch, rows) <= budget for rows in bins)
        sizes.append(len(bins))
        for rows in bins:  # what runs is what was counted, less the last token of every sample
            micro = build(batch, rows, True)
            assert micro.input_ids.numel() == cost(batch, rows, last=1)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (7, 1)


def test_sample_longer_than_the_budget():
    batch = tiny.batch([(2, [1]), (5, [4])])
    rows = all_rows(batch)
    with pytest.raises(ValueError, match="a sample of 9 tokens exceeds the budget of 8"):
        plan(batch, rows, packed=True, samples=1, max_tokens=8)
    assert plan(batch, rows, packed=True, samples=1, max_tokens=9) == [[1], [0]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)),
        min_size=1,
        max_size=5,
    ),
    slack=st.integers(0, 30),
    shuffle=st.randoms(use_true_random=False),
)
def test_every_sample_is_planned_once(groups, slack, shuffle):
    batch = tiny.batch(groups)
    rows = all_rows(batch)
    shuffle.shuffle(rows)
    budget = max(len(s) for s in batch.sequences) + slack
    bins = plan(batch, rows, packed=True, samples=1, max_tokens=budget)
    assert sorted(row for part in bins for row in part) == all_rows(batch)
    assert all(part for part in bins)
    assert all(cost(batch, part) <= budget for part in bins)


def by_hand():
    """Prompt 10 11 with responses 20 and 30 31 32; prompt 12 with response 40 41."""
    return RolloutBatch(
        sequences=(
            torch.tensor([10, 11, 20]),
            torch.tensor([12, 40, 41]),
            torch.tensor([10, 11, 30, 31, 32]),
        ),
        prompt_lens=torch.tensor([2, 1, 2]),
        mask=torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool(),
        rewards=torch.zeros(3),
        group=torch.tensor([0, 1, 0]),
        rollout_logprobs=torch.zeros(3, 3),
    )


def test_packed_build_by_hand():
    """The prompt of rows 0 and 2 is there once; last tokens are labels only."""
    micro = build(by_hand(), [0, 1, 2], packed=True)
    assert micro.input_ids.tolist() == [[10, 11, 30, 31, 12, 40]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert micro.labels.tolist() == [20, 40, 41, 30, 31, 32]
    assert micro.targets.tolist() == [1, 4, 5, 1, 2, 3]
    assert micro.cells.tolist() == [0, 3, 4, 6, 7, 8]
    assert isinstance(micro.layout, Packed)
    assert micro.layout.cu_queries.tolist() == [0, 4, 6]
    scattered = micro.scatter(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert scattered.tolist() == [[1, 0, 0], [2, 3, 0], [4, 5, 6]]


def test_padded_build_by_hand():
    micro = build(by_hand(), [2, 1], packed=False)
    assert micro.rows == [2, 1]
    assert micro.input_ids.tolist() == [[10, 11, 30, 31], [12, 40, 0, 0]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert micro.layout is None
    assert micro.labels.tolist() == [30, 31, 32, 40, 41]
    assert micro.targets.tolist() == [1, 2, 3, 4, 5]
    assert micro.cells.tolist() == [0, 1, 2, 3, 4]
    assert micro.scatter(torch.arange(1.0, 6)).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_scatter_is_differentiable():
    micro = build(by_hand(), [0, 1, 2], packed=True)
    values = torch.zeros(6, requires_grad=True)
    (micro.scatter(values) * torch.arange(9.0).view(3, 3)).sum().backward()
    assert values.grad.tolist() == [0, 3, 4, 6, 7, 8]


GROUPS = {
    "mixed": [(3, [4, 1, 7]), (6, [2]), (2, [5, 5, 1, 3])],
    "responses of one token": [(4, [1, 1, 1]), (2, [1])],
    "prompts of one token": [(1, [4, 2]), (1, [3]), (1, [1])],
    "one sample": [(3, [3])],
}


def step(batch, bins, packed, weights, dtype=torch.float32):
    """Log-probs [B, T] and the gradients of their weighted sum, micro-batch by micro-batch."""
    model = tiny.model("qwen2", tie_word_embeddings=True).to(dtype)
    policy = PolicyModel(model, temperature=0.8)
    logprobs = torch.zeros(batch.mask.shape)
    for rows in bins:
        micro = build(batch, rows, packed)
        values, entropy = policy(micro)
        logprobs[rows] = micro.scatter(values.detach())
        part = micro.scatter(values + 0.1 * entropy)
        (part * weights[rows]).sum().backward()
    return logprobs, [p.grad for p in model.parameters()]


def check_equal(batch, bins, packed, dtype=torch.float32):
    """These passes and one padded sample at a time give the same numbers."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(batch.mask.shape, generator=generator) / batch.mask.sum()
    logprobs, grads = step(batch, bins, packed, weights, dtype)
    alone = [[row] for row in all_rows(batch)]
    wanted, wanted_grads = step(batch, alone, False, weights, dtype)
    assert torch.equal(wanted != 0, batch.mask)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=2e-6)
    norm = torch.cat([g.flatten() for g in wanted_grads]).norm()
    for a, b in zip(grads, wanted_grads, strict=True):
        assert (a - b).norm() < 1e-6 * norm


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_packed_and_padded_give_the_same_step(groups, packed):
    batch = tiny.batch(groups)
    check_equal(batch, [all_rows(batch)], packed)


@pytest.mark.parametrize("budget", [10, 13, 20])
def test_any_plan_gives_the_same_step(budget):
    """Small budgets spread the samples of one prompt over several passes."""
    batch = tiny.batch(GROUPS["mixed"])
    bins = plan(batch, all_rows(batch), packed=True, samples=1, max_tokens=budget)
    assert len(bins) > 1
    check_equal(batch, bins, packed=True)


def test_samples_of_one_prompt_need_not_be_neighbors():
    """The rows of three prompts interleaved, in a shuffled order."""
    batch = tiny.batch(GROUPS["mixed"])
    order = [4, 0, 3, 7, 1, 5, 2, 6]
    shuffled = replace(batch.select(order), group=batch.group[order])
    check_equal(shuffled, [all_rows(shuffled)], packed=True)
    micro = build(shuffled, all_rows(shuffled), True)
    # 3 + 6 + 2 prompt tokens, each once, and 28 response tokens less 8 last ones.
    assert micro.input_ids.numel() == cost(shuffled, order, last=1) == 3 + 6 + 2 + 28 - 8
    check_equal(batch, [[6, 1, 4], [0, 7, 3], [5, 2]], packed=True)


def test_equal_prompts_of_two_groups_are_shared():
    """What counts is the prompt's tokens, not the group: a prompt may come twice in a rollout."""
    first, second = tiny.batch([(3, [2])]), tiny.batch([(3, [4])])
    assert torch.equal(first.sequences[0][:3], second.sequences[0][:3])
    both = RolloutBatch(
        sequences=(*first.sequences, *second.sequences),
        prompt_lens=torch.tensor([3, 3]),
        mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(),
        rewards=torch.zeros(2),
        group=torch.tensor([0, 1]),
        rollout_logprobs=torch.zeros(2, 4),
    )
    assert torch.equal(first.sequences[0], second.sequences[0][:5])  # one response begins the other
    assert build(both, [0, 1], True).input_ids.numel() == 3 + 3
    check_equal(both, [[0, 1]], packed=True)


def test_responses_that_begin_alike_are_shared():
    """Tokens 33 and 24 come in two and three responses, and are computed once."""
    rows = [[11, 42, 33, 24, 15], [11, 42, 33, 24, 46], [11, 42, 33, 17], [11, 42, 28]]
    batch = tiny.batch([(2, [3, 3, 2, 1])])
    batch = replace(batch, sequences=tuple(map(torch.tensor, rows)))
    micro = build(batch, [0, 1, 2, 3], packed=True)
    assert micro.input_ids.tolist() == [[11, 42, 33, 24]]
    assert micro.targets.tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 1]
    assert micro.labels.tolist() == [33, 24, 15, 33, 24, 46, 33, 17, 28]
    assert plan(batch, [0, 1, 2, 3], packed=True, samples=1, max_tokens=8) == [[0, 1, 2, 3]]
    assert plan(batch, [0, 1, 2, 3], packed=True, samples=1, max_tokens=7) == [[0, 1, 2], [3]]
    check_equal(batch, [[0, 1, 2, 3]], packed=True, dtype=torch.float64)
