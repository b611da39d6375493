"""Rule rewards by name, and what a reward function may ask for."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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


def resolve(name: str) -> RewardCallable:
    """The function of a registered name or of `path/to/file.py:function`.

    Raises ValueError if there is none.
    """
    path, colon, function_name = name.rpartition(":")
    if name.endswith(".py"):
        raise ValueError(f"reward function {name!r}: say which function, as in {name}:my_reward")
    if not colon or not path.endswith(".py"):
        return REWARDS.get(name)
    module = _load_file(Path(path).expanduser(), name)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"reward function {name!r}: {path} has no function {function_name!r}; "
            f"its functions are {', '.join(functions) or 'none'}"
        )
    return function


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


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"reward function {name!r}: there is no file {path}")
    # Named by place and content: two functions of a file share one module, an edited file is new.
    key = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    module_name = f"torchrft_reward_{path.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(
            f"reward function {name!r}: {path} failed to load: {type(error).__name__}: {error}"
        ) from error
    return module
