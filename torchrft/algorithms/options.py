"""Options of registered functions are their keyword parameters."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError


def check_options(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Raises ValueError for an option that `function` does not take."""
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            raise ValueError(f'{what} has no option "{name}"')


def options_of(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    own: Mapping[str, Any],
    positional: int,
) -> dict[str, Any]:
    """Keywords for `function`: those of the job's `settings` that it takes, and its `own` options.

    Its first `positional` parameters are no options. Raises ValueError for an own option that it
    does not take, that is a field of the job, or whose value is not of the type in the function's
    signature, and for an option without a default that nobody sets.
    """
    what = getattr(function, "__name__", repr(function))
    check_options(function, own, what)
    known = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    for name, value in own.items():
        if name in settings:
            raise ValueError(f'{what}: "{name}" is a field of its own; set --{name} instead')
        try:
            TypeAdapter(hints.get(name, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"].lower()
            raise ValueError(f"{what}: option {name} = {value!r}: {wrong}") from error
    options = {name: value for name, value in settings.items() if name in known} | dict(own)
    for name, parameter in list(known.items())[positional:]:
        by_name = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if by_name and parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{what}: its option {name} has no default and is not set")
    return options
