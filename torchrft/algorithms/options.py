"""Options of losses and estimators: fields of their records, or keywords of users' functions."""

import inspect
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError


def option_parameters(component: Callable[..., Any], tensors: int) -> dict[str, Any]:
    """The parameters of `component` that are options, by name.

    A class takes options alone. A function takes `tensors` positional arguments first.
    """
    parameters = list(inspect.signature(component).parameters.items())
    return dict(parameters if isinstance(component, type) else parameters[tensors:])


def check_options(
    component: Callable[..., Any], options: Mapping[str, Any], tensors: int, what: str
) -> None:
    """Raises ValueError for an option that `component` does not take."""
    known = option_parameters(component, tensors)
    for name in options:
        if name not in known:
            raise ValueError(f'{what} has no option "{name}"')


def bind(component: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`component` with its options: an instance of a class, a function with its keywords set."""
    return component(**options) if isinstance(component, type) else partial(component, **options)


def options_from(
    component: Callable[..., Any],
    fields: Mapping[str, Any],
    user_options: Mapping[str, Any],
    tensors: int,
) -> dict[str, Any]:
    """The options of `component`: the job's `fields` of their names, and the `user_options`.

    Raises ValueError for a user's option that the component does not take, that is a field of the
    job, or whose value is not of the declared type, and for an option without a default that
    nobody sets.
    """
    what = getattr(component, "__name__", repr(component))
    check_options(component, user_options, tensors, what)
    known = option_parameters(component, tensors)
    hints = typing.get_type_hints(component) if user_options else {}
    for name, value in user_options.items():
        if name in fields:
            raise ValueError(f'{what}: "{name}" is a field of its own; set --{name} instead')
        try:
            TypeAdapter(hints.get(name, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"].lower()
            raise ValueError(f"{what}: option {name} = {value!r}: {wrong}") from error
    options = {name: fields[name] for name in known if name in fields} | dict(user_options)
    for name, parameter in known.items():
        by_name = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if by_name and parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{what}: its option {name} has no default and is not set")
    return options
