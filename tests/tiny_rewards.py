"""A reward that an untrained model already varies in, so that gradients are not zero."""

from collections.abc import Sequence


def spread(token_ids: Sequence[int]) -> float:
    """0, 0.25, 0.5, 0.75 or 1, from what was sampled alone."""
    return sum(token_ids) % 5 / 4
