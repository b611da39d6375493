"""A reward that an untrained model already varies in, so that gradients are not zero."""

from collections.abc import Sequence


def spread(token_ids: Sequence[int]) -> float:
    """0, 0.25, 0.5, 0.75 or 1, from what was sampled alone."""
    return sum(token_ids) % 5 / 4


def held_out(label: str) -> float:
    """1 for prompts labeled so, which the tests put into the evaluation file only."""
    return float(label == "held out")


def mostly(response: str) -> float:
    """3 of 4 groups of an untrained model differ, or so."""
    return float(sum(map(ord, response)) % 2 == 0)


def matches(response: str, label: str) -> float:
    """What exact_match gives."""
    return float(response.strip() == label)
