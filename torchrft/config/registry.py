"""Components that a configuration selects by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """Names of one kind of component; `kind` is how messages call it.

    >>> SHAPES: Registry[type] = Registry("shape")
    >>> @SHAPES.register("circle")
    ... class Circle: ...
    >>> SHAPES.get("circle") is Circle
    True
    >>> SHAPES.get("cirle")
    Traceback (most recent call last):
    ...
    ValueError: unknown shape "cirle"; did you mean "circle"? Valid names: circle
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._components: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """Decorator that adds a component under `name`.

        Raises ValueError if another component has that name; the same one may come again, so that
        a module can be reloaded by whoever holds the object.
        """

        def add(component: U) -> U:
            # Typed by its own type, so that a decorated function keeps its signature.
            held: Any = self._components.setdefault(name, cast(Any, component))
            if held is not component:
                raise ValueError(f'{self.kind} "{name}" is registered already, as {held!r}')
            return component

        return add

    def get(self, name: str) -> T:
        """The component called `name`; ValueError with the valid names if there is none."""
        if name in self._components:
            return self._components[name]
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f' did you mean "{near[0]}"?' if near else ""
        valid = ", ".join(self.names()) or "none is registered"
        raise ValueError(f'unknown {self.kind} "{name}";{hint} Valid names: {valid}')

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._components)
