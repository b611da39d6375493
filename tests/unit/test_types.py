"""The records between the parts."""

import dataclasses
import doctest

import pytest
import tiny
import torch

from torchrft import types
from torchrft.types import Prompt, SamplingParams


def test_docstring_examples():
    assert doctest.testmod(types) == (0, 4)


def test_budget():
    """What is left of the total, and of the response's own limit."""
    assert SamplingParams(max_total_tokens=10).budget(4) == 6
    assert SamplingParams(max_total_tokens=10, max_new_tokens=3).budget(4) == 3
    assert SamplingParams(max_total_tokens=10, max_new_tokens=30).budget(4) == 6
    assert SamplingParams(max_total_tokens=10).budget(12) == -2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "n = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"stop": ("a", "")}, r"stop = \('a', ''\)"),
    ],
)
def test_sampling_values_out_of_range(options, match):
    with pytest.raises(ValueError, match=f"SamplingParams: {match} is out of range"):
        SamplingParams(**options)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Prompt(row=0, text="", token_ids=(1,)).row = 1


def test_select():
    batch = tiny.batch([(2, [1, 3]), (1, [2])])
    batch = dataclasses.replace(
        batch,
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        advantages=torch.arange(9.0).view(3, 3),
    )
    part = batch.select([2, 0])
    assert len(part) == 2
    assert part.sequences[0] is batch.sequences[2]
    assert part.sequences[1] is batch.sequences[0]
    assert part.rewards.tolist() == [3.0, 1.0]
    assert part.group.tolist() == [1, 0]
    assert part.prompt_lens.tolist() == [1, 2]
    assert part.mask.tolist() == [[True, True, False], [True, False, False]]  # T stays 3
    assert part.advantages.tolist() == [[6.0, 7.0, 8.0], [0.0, 1.0, 2.0]]
    assert part.old_logprobs is None
