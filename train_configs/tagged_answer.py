"""A reward of its own for recipes whose answers stand in a tag."""

import re
from typing import Any


def tagged_answer(response: str, label: Any) -> float:
    """1 if the last <answer> of the response is the label, blanks aside; 0.1 for any answer."""
    found = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    if not found:
        return 0.0
    mine, right = ("".join(text.split()).strip("$°.") for text in (found[-1], str(label)))
    return 1.0 if mine == right else 0.1
