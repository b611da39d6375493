"""Options of registered functions are their keyword parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def check_options(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Raises ValueError for an option that `function` does not take."""
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            raise ValueError(f'{what} has no option "{name}"')


def options_of(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that `function` takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in known}
