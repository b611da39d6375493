"""Rule rewards that come with torchrft."""

from __future__ import annotations

from typing import Any

from torchrft.rewards.registry import register


@register("exact_match")
def exact_match(response: str, label: Any) -> float:
    """1 if the response is the label, white space around either aside, else 0.

    A label that is no string is compared as Python prints it. Raises ValueError if there is none.

    >>> exact_match(" 42\\n", 42)
    1.0
    """
    if label is None:
        raise ValueError("the row has no label")
    return float(response.strip() == str(label).strip())
