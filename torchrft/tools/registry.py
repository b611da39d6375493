"""Components that a configuration selects by name."""

import difflib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
U = TypeVar("U")

REGISTRIES: dict[str, "Registry[Any]"] = {}
"""All registries of this process, by their kind."""


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
        REGISTRIES[kind] = self
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
        """The component called `name`, or the function that `path/to/file.py:function` names.

        Raises ValueError with the valid names if there is none.
        """
        if name in self._components:
            return self._components[name]
        path, colon, function = name.rpartition(":")
        if name.endswith(".py"):
            raise ValueError(f"{self.kind} {name!r}: say which function, as in {name}:my_function")
        if colon and path.endswith(".py"):
            return cast(T, _function_of(Path(path).expanduser(), function, f"{self.kind} {name!r}"))
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f' did you mean "{near[0]}"?' if near else ""
        valid = ", ".join(self.names()) or "none is registered"
        raise ValueError(f'unknown {self.kind} "{name}";{hint} Valid names: {valid}')

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._components)


def _function_of(path: Path, name: str, what: str) -> Callable[..., Any]:
    module = _load_file(path, what)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        known = f"its functions are {', '.join(functions) or 'none'}"
        raise ValueError(f"{what}: {path} has no function {name!r}; {known}")
    return function


def _load_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    # Named by place and content: two functions of a file share one module, an edited file is new.
    key = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    module_name = f"torchrft_{path.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: {path} failed to load: {why}") from error
    return module
