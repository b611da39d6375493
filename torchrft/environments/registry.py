"""Environments by name."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, TypeVar

from torchrft.environments.adapters import ADAPTERS, library_of
from torchrft.environments.agent import PREFIX, Agent
from torchrft.environments.protocol import Environment
from torchrft.environments.tools import ToolEnvironment
from torchrft.tools.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENTS: Registry[Callable[..., Any]] = Registry("environment")


def register(name: str) -> Callable[[F], F]:
    """Makes a class, or a function that returns an environment, selectable by `name`."""
    return ENVIRONMENTS.register(name)


def importable(name: str) -> str:
    """The name under which another process finds what is registered in this one only."""
    if name not in ENVIRONMENTS.names():
        return name
    component = ENVIRONMENTS.get(name)
    return f"{inspect.getfile(component)}:{component.__name__}"


def make(name: str, options: Mapping[str, Any]) -> Environment:
    """An environment for one episode.

    `name` is a registered one, "path/to/file.py:Class", "package.module:Class" or "library:which"
    for the libraries of ADAPTERS; a function that returns an environment does as well as a class.
    Raises ValueError for a name that means nothing.
    """
    component, library = _component(name), library_of(name)
    try:
        made = component(**options)
    except ModuleNotFoundError as error:
        if library is None:
            raise
        # Without a name it is the library's own sentence about a name of the user's.
        remedy = f": pip install {library.replace('_', '-')}" if error.name else ""
        raise ValueError(f"{error}{remedy}") from error
    if callable(getattr(made, "reset", None)):
        if callable(getattr(made, "step", None)):
            return made
        if callable(getattr(made, "get_reward", None)):
            return ToolEnvironment.of(made)
    raise ValueError(
        f"{type(made).__name__} is no environment; write a class with reset(row, seed) and "
        "step(reply), or one with reset(**row), get_reward() and tools as its public methods"
    )


@cache  # a file that is edited meanwhile stays what it was
def _component(name: str) -> Callable[..., Any]:
    module, colon, rest = name.partition(":")
    if name.startswith(PREFIX):
        return partial(Agent, ENVIRONMENTS.get(rest))
    if module in ADAPTERS and not rest:
        raise ValueError(f"{name!r} does not say which; write {module}:NAME")
    if module in ADAPTERS:
        is_class = module == "openenv" and "://" not in rest
        return partial(ADAPTERS[module], _component(rest) if is_class else rest)
    if name in ENVIRONMENTS.names() or not colon or ".py" in name:
        return ENVIRONMENTS.get(name)
    try:
        component = getattr(importlib.import_module(module), rest, None)
    except ImportError as error:
        raise ValueError(
            f"{error}; a name is path/to/file.py:Class or package.module:Class, or begins with "
            + ", ".join(f"{library}:" for library in ADAPTERS)
        ) from error
    if not callable(component):
        raise ValueError(f"{module} has no class or function {rest!r}")
    return component
