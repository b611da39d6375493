"""The prompt order: permutations, shards, exact resumption."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from torchrft.data.loader import PromptLoader
from torchrft.data.prompts import PromptDataset
from torchrft.tools.images import Image
from torchrft.types import Prompt


def dataset(size):
    prompts = PromptDataset()
    for row in range(size):
        prompts.append(Prompt(row, str(row), (row + 1,), label=row))
    return prompts


def rows(loader, steps):
    return [[prompt.row for prompt in loader.next()] for _ in range(steps)]


def flat(batches):
    return [row for batch in batches for row in batch]


def test_every_pass_is_another_permutation_and_batches_straddle_passes():
    loader = PromptLoader(dataset(10), prompts_per_step=4, seed=0)
    batches = rows(loader, 10)
    assert [len(batch) for batch in batches] == [4] * 10
    passes = [flat(batches)[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert all(one != following for one, following in pairwise(passes))


EXPECTED = [
    [[1, 3, 0, 4, 2], [4, 3, 2, 1, 0]],
    [[3, 1, 0, 4, 2], [0, 3, 1, 4, 2]],
]


def test_order_is_fixed_by_the_seed_for_good():
    # A change of these values would make a resumed run go on in another order.
    assert rows(PromptLoader(dataset(5), 5, seed=0), 2) == EXPECTED[0]
    assert rows(PromptLoader(dataset(5), 5, seed=1), 2) == EXPECTED[1]
    assert EXPECTED[0][1] != EXPECTED[1][0]  # (seed 0, pass 1) is not (seed 1, pass 0)


def test_records_come_from_the_dataset():
    (prompt,) = PromptLoader(dataset(1), 1, seed=3).next()
    assert prompt == Prompt(0, "0", (1,), label=0)


def test_a_step_larger_than_the_dataset_repeats_prompts():
    batch = rows(PromptLoader(dataset(3), 6, seed=0), 1)[0]
    assert Counter(batch) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("size", [7, 8, 13])
def test_shards_interleave_to_the_order_of_one_process(world_size, size):
    whole = rows(PromptLoader(dataset(size), 8, seed=5), 6)
    shards = [
        rows(PromptLoader(dataset(size), 8, seed=5, rank=rank, world_size=world_size), 6)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            assert shards[rank][step] == batch[rank::world_size]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (4, 2)])
def test_resumption_is_exact_also_on_another_number_of_ranks(stop, before, after):
    uninterrupted = rows(PromptLoader(dataset(10), 4, seed=9), 15)
    states = []
    for rank in range(before):
        loader = PromptLoader(dataset(10), 4, seed=9, rank=rank, world_size=before)
        rows(loader, stop)
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    plain = {"position": 4 * stop, "seed": 9, "num_prompts": 10}
    assert states[0] == plain | {"content": states[0]["content"]}
    for rank in range(after):
        loader = PromptLoader(dataset(10), 4, seed=9, rank=rank, world_size=after)
        rows(loader, 2)  # a loader that has already moved is set back as well
        loader.load_state_dict(states[0])
        assert loader.state_dict() == states[0]
        expected = [batch[rank::after] for batch in uninterrupted[stop:]]
        assert rows(loader, 15 - stop) == expected


def test_resumption_with_another_batch_size_skips_and_repeats_nothing():
    first = PromptLoader(dataset(10), 4, seed=0)
    taken = flat(rows(first, 3))
    second = PromptLoader(dataset(10), 8, seed=0)
    second.load_state_dict(first.state_dict())
    assert sorted((taken + flat(rows(second, 1)))[:20]) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize(
    ("size", "seed", "message"),
    [(11, 0, "num_prompts = 10, this run 11"), (10, 1, "seed = 0, this run 1")],
)
def test_a_state_of_another_order_is_refused(size, seed, message):
    state = PromptLoader(dataset(10), 5, seed=0).state_dict()
    loader = PromptLoader(dataset(size), 5, seed=seed)
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state)
    assert loader.episode == 0


def test_a_pass_ends_within_a_step_however_long():
    """10 prompts: a step that draws three times 4 from position 8 passes 10 and 20."""
    loader = PromptLoader(dataset(10), 4, seed=0)
    ended = []
    for draws in (1, 1, 3, 1):
        began = loader.position
        for _ in range(draws):
            loader.next()
        ended.append([loader.finished_episode(every, since=began) for every in (1, 2)])
    assert ended == [[False, False], [False, False], [True, True], [False, False]]


def test_episodes_and_steps():
    loader = PromptLoader(dataset(10), 4, seed=0)
    assert [loader.total_steps(episodes) for episodes in (1, 2, 3)] == [3, 5, 8]
    assert loader.episode == 0.0
    loader.next()
    assert loader.episode == 0.4
    rows(loader, 4)
    assert loader.episode == 2.0


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    rows(PromptLoader(dataset(10), 4, seed=0), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="4 prompts per step cannot be divided among 3 ranks"):
        PromptLoader(dataset(10), 4, seed=0, world_size=3)
    with pytest.raises(ValueError, match="there are no prompts"):
        PromptLoader(dataset(0), 4, seed=0)


def changed_dataset(change):
    """Four prompts, of which one is changed, or the order."""
    prompts = [Prompt(row, str(row), (row + 1,), str(row), {"level": row}) for row in range(4)]
    data = PromptDataset()
    for prompt in change(prompts):
        data.append(prompt)
    return data


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p[::-1], "has the same prompts in another order than"),
        (lambda p: [p[1], p[0], *p[2:]], "has the same prompts in another order than"),
        (lambda p: [replace(p[0], token_ids=(9,)), *p[1:]], "has other prompts than"),
        (lambda p: [p[0], p[0], *p[2:]], "has other prompts than"),
        (lambda p: [replace(p[0], label="5"), *p[1:]], "has other labels than"),
        (lambda p: [*p[:3], replace(p[3], metadata={"level": 0})], "has other labels than"),
        (lambda p: [replace(p[0], images=(Image(data=b"x"),)), *p[1:]], "has other prompts than"),
    ],
)
def test_other_prompts_of_equal_number_are_refused(change, text):
    state = PromptLoader(changed_dataset(lambda p: p), 2, seed=0).state_dict()
    with pytest.raises(ValueError, match=text + r".*bring back the file"):
        PromptLoader(changed_dataset(change), 2, seed=0).load_state_dict(state)


def test_what_is_no_change_is_gone_on_with():
    state = PromptLoader(changed_dataset(lambda p: p), 2, seed=0).state_dict()
    again = PromptLoader(changed_dataset(lambda p: [replace(x, row=9) for x in p]), 2, seed=0)
    again.load_state_dict(state)
    del state["content"]  # of an earlier version
    PromptLoader(changed_dataset(lambda p: p[::-1]), 2, seed=0).load_state_dict(state)
    odd = [Prompt(0, "", (1,), {1, 2}, {"a": object(), 3: b"x"}) for _ in range(2)]
    digests = []
    for prompt in odd:
        data = PromptDataset()
        data.append(prompt)
        digests.append(data.digest())
    assert digests[0] == digests[1]
