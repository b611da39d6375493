"""Rule rewards by name, and what a reward function may ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from torchrft.config.registry import Registry

RewardCallable = Callable[..., float]
F = TypeVar("F", bound=RewardCallable)

ARGUMENTS = ("prompt", "response", "label", "token_ids", "metadata", "finish_reason")
"""Parameter names a reward function may have; each is filled by its name."""

REWARDS: Registry[RewardCallable] = Registry("reward function")


def register(name: str) -> Callable[[F], F]:
    """Makes a reward function selectable as `{ name = "..." }`; names must be new.

    >>> @register("polite")
    ... def polite(response: str) -> float:
    ...     return float("please" in response)
    """
    return REWARDS.register(name)


def arguments_of(function: RewardCallable, name: str) -> tuple[str, ...]:
    """Names of the arguments `function` wants; ValueError for one that nobody can fill."""
    valid = ", ".join(ARGUMENTS)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward function {name!r}: its parameters cannot be read; write a Python function "
            f"with parameters among {valid}"
        ) from error
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward function {name!r} is async; write a plain function")
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        # Also with a default: a misspelled `respones=""` would never be filled, unnoticed.
        if parameter.name not in ARGUMENTS or parameter.kind not in by_name:
            raise ValueError(
                f"reward function {name!r} has the parameter {str(parameter)!r}; "
                f"parameters are filled by name, from {valid}"
            )
    return tuple(parameter.name for parameter in parameters)
