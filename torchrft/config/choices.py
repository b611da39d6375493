"""Names of the components of torchrft/algorithms, read off its source: it imports torch."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchrft.tools.registry import REGISTRIES

_SOURCES = sorted((Path(__file__).parents[1] / "algorithms").glob("*.py"))


def names(*forms: str) -> tuple[str, ...]:
    """What `forms`, patterns with one group, match in the source: each once, in its order."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in _SOURCES)
    return tuple(dict.fromkeys(name for form in forms for name in re.findall(form, text, re.M)))


def known_to(kind: str) -> Callable[[Any, Callable[[Any], Any]], Any]:
    """A validator that also takes what was registered since, by code that runs in this process."""

    def validate(value: Any, otherwise: Callable[[Any], Any]) -> Any:
        registry = REGISTRIES.get(kind)
        return value if registry and value in registry.names() else otherwise(value)

    return validate


ESTIMATORS = names(r'^    "(\w+)": Preset\(', r'\bESTIMATORS\.register\("(\w+)"\)')
"""Presets, then estimators without one."""
LOSSES = names(r'\bLOSSES\.register\("(\w+)"\)')
