"""Reads a row's label as a text, or says why it is none."""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from torchrft.rewards.registry import LabelError


def plain_label(label: Any) -> str | int | float | Decimal | Fraction:
    """Return the label where a data set wraps it: {"ground_truth": "34"}, ["34"] or '["34"]'.

    Raises LabelError for what is neither a text nor a finite number.
    """
    import numpy as np  # here, as in registry.py: a dry run has no use for it

    if isinstance(label, np.generic):
        label = label.item()
    if isinstance(label, str):
        label = stored(label)
    if isinstance(label, Mapping) and "ground_truth" in label:
        return plain_label(label["ground_truth"])
    if isinstance(label, list | tuple | np.ndarray) and len(label) == 1:
        return plain_label(label[0])
    if label is None:
        raise LabelError("the row has no label")
    is_finite = not isinstance(label, float | Decimal) or Decimal(label).is_finite()
    if isinstance(label, bool) or not isinstance(label, str | int | float | Decimal | Fraction):
        kind = type(label).__name__
        raise LabelError(f"the label {label!r:.80} is a {kind}: give a text or a number")
    if not is_finite:
        raise LabelError(f"the label {label!r:.80} is no finite number")
    return label


def stored(text: str) -> Any:
    """The list or dictionary that a text holds, as JSON or as Python prints it, else the text."""
    if re.match(r"""\s*[\[{]\s*['"]""", text):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError):
                return read(text)
    return text


def label_text(label: Any, **options: Any) -> str:
    """Return the label's text, a number's without an exponent.

    >>> label_text(1e16), label_text(0.00005), label_text({"ground_truth": " 34", "style": "rule"})
    ('10000000000000000', '0.00005', '34')
    """
    label = plain_label(label)
    if isinstance(label, float | Decimal):
        label = format(Decimal(str(label)), "f")
    return str(label).strip()
