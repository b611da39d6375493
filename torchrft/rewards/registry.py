"""Reward functions by name, and what a function may ask for."""

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeVar

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from torchrft.rewards.source import RewardResult
from torchrft.tools.registry import Registry
from torchrft.tools.signals import Abandoned, SecondKeyboardInterrupt
from torchrft.tools.text import shorten

RewardCallable = Callable[..., Any]
F = TypeVar("F", bound=RewardCallable)

ARGUMENTS = ("prompt", "response", "label", "token_ids", "images", "metadata", "finish_reason")
"""Parameter names a reward function may have; each is filled by its name."""
BATCH_ARGUMENTS = {
    "prompts": "prompt",
    "responses": "response",
    "labels": "label",
    "finish_reasons": "finish_reason",
}
"""Names that make a function one of many samples; it gets lists, also for the other names."""

GRACE = 1.0  # seconds beyond its deadline in which an async function returns what it has

REWARDS: Registry[RewardCallable] = Registry("reward function")


class LabelError(ValueError):
    """A label that a rule cannot judge by: a fault of the data, not of the answer."""


class MissingPackage(ValueError):
    """An optional package that a rule needs is not installed here."""


class RuleFault(Exception):
    """A bug in a function, on sample `index` of those it was given; or a fault `of_data`."""

    def __init__(self, index: int, text: str, of_data: bool = False) -> None:
        self.index, self.text, self.of_data = index, shorten(text), of_data
        super().__init__(index, self.text, of_data)


def told(error: BaseException) -> str:
    """An exception's type and text, shortened; the text comes from its own code, which may fail."""
    try:
        return shorten(f"{type(error).__name__}: {error}")
    except Exception:
        return f"{type(error).__name__:.80}, whose text cannot be had"


def register(name: str) -> Callable[[F], F]:
    """Makes a reward function selectable as `{ name = "..." }`; names must be new.

    >>> @register("polite")
    ... def polite(response: str) -> float:
    ...     return float("please" in response)
    """
    return REWARDS.register(name)


@dataclass(frozen=True, slots=True)
class Rule:
    """A reward function and how it is called.

    `parameters` maps its parameters to arguments. With `tolerant`, an exception means that there is
    no verdict on an answer; else it is a bug.
    """

    name: str
    function: RewardCallable
    parameters: Mapping[str, str]
    options: Mapping[str, Any]
    is_batch: bool
    is_async: bool
    tolerant: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]], timeout: float) -> list[RewardResult]:
        """Results of the samples `rows`, each a value for every argument the function wants.

        An async function runs on all samples at once; those that take longer than `timeout` seconds
        have no verdict. Raises RuleFault for an exception and for what is no finite number.
        """
        if self.is_async:
            values: Any = self._guarded(lambda: asyncio.run(self._gather(rows, timeout)))
        elif self.is_batch:
            values = self._guarded(lambda: self._call(rows))
        else:
            values = self._one_by_one(rows)
        import numpy as np

        is_list = isinstance(values, Sequence) or (isinstance(values, np.ndarray) and values.ndim)
        if not is_list or len(values) != len(rows):
            raise RuleFault(0, f"{len(rows)} rewards are expected in a list, got {values!r:.80}")
        return [_as_result(value, index) for index, value in enumerate(values)]

    def _one_by_one(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        values: list[Any] = []
        for row in rows:
            try:
                values.append(self._call_one(row))
            except BaseException as error:  # sys.exit() and KeyboardInterrupt, too
                values.append(self._failed(len(values), error))
        return values

    def _call_one(self, row: Mapping[str, Any]) -> Any:
        return self.function(**{p: row[a] for p, a in self.parameters.items()}, **self.options)

    def _call(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        columns = {p: [row[a] for row in rows] for p, a in self.parameters.items()}
        return self.function(**columns, **self.options)

    async def _gather(self, rows: Sequence[Mapping[str, Any]], timeout: float) -> Any:
        if self.is_batch:
            values = await self._await(0, self._call(rows), timeout * len(rows))
            return [values] * len(rows) if isinstance(values, RewardResult) else values
        calls = [self._await(i, self._call_one(row), timeout) for i, row in enumerate(rows)]
        return await asyncio.gather(*calls)

    async def _await(self, index: int, call: Any, timeout: float) -> Any:
        task = asyncio.ensure_future(call)
        done, _ = await asyncio.wait([task], timeout=timeout)
        if not done:
            task.cancel()
            return RewardResult(0.0, error=f"it took more than {timeout:g} s")
        return self._guarded(task.result, index)

    def _guarded(self, call: Callable[[], Any], index: int = 0) -> Any:
        try:
            return call()
        except BaseException as error:  # sys.exit() and KeyboardInterrupt, too
            return self._failed(index, error)

    def _failed(self, index: int, error: BaseException) -> RewardResult:
        """What an exception means: no verdict, or a bug, which is raised."""
        if isinstance(error, RuleFault | MemoryError | SecondKeyboardInterrupt | Abandoned):
            raise error
        if isinstance(error, LabelError):
            raise RuleFault(index, str(error), of_data=True) from error
        text = told(error)
        if self.tolerant:
            return RewardResult(0.0, error=f"{text:.200}")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text += f" ({frame.filename}, line {frame.lineno})"
        raise RuleFault(index, text) from error


def make_rule(name: str, options: Mapping[str, Any]) -> Rule:
    """The function called `name`, ready to be called.

    Raises ValueError for an unknown name, a parameter that nobody fills, and an option that the
    function does not take, lacks, or takes of another type.
    """
    function = REWARDS.get(name)
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward function {name!r}: its parameters cannot be read; write a Python function "
            f"with parameters among {', '.join(ARGUMENTS)}"
        ) from error
    filled = [parameter for parameter in known.values() if _is_filled(parameter, name)]
    is_batch = any(parameter.name in BATCH_ARGUMENTS for parameter in filled)
    singles = set(BATCH_ARGUMENTS.values()) & {parameter.name for parameter in filled}
    if is_batch and singles:
        raise ValueError(
            f"reward function {name!r} asks for one sample ({min(singles)}) and for many; use "
            f"plural names for all of {', '.join(BATCH_ARGUMENTS)}, or for none"
        )
    _check_options(function, name, options, [p for p in known.values() if p not in filled])
    return Rule(
        name=name,
        function=function,
        parameters={p.name: BATCH_ARGUMENTS.get(p.name, p.name) for p in filled},
        options=dict(options),
        is_batch=is_batch,
        is_async=any(map(inspect.iscoroutinefunction, (function, type(function).__call__))),
    )


def _is_filled(parameter: inspect.Parameter, name: str) -> bool:
    """Whether a parameter is an argument, rather than an option; ValueError if it is neither."""
    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and (
        parameter.name in ARGUMENTS or parameter.name in BATCH_ARGUMENTS
    ):
        return True
    # Also with a default: a misspelled `respones=""` would never be filled, unnoticed.
    if parameter.kind is not parameter.KEYWORD_ONLY:
        raise ValueError(
            f"reward function {name!r} has the parameter {str(parameter)!r}; parameters are filled "
            f"by name, from {', '.join(ARGUMENTS)}, or their plurals; options come after a *"
        )
    return False


def _check_options(
    function: RewardCallable,
    name: str,
    options: Mapping[str, Any],
    parameters: Sequence[inspect.Parameter],
) -> None:
    what, known = f"reward function {name!r}", {p.name: p for p in parameters}
    holder: Any = function if inspect.isroutine(function) else type(function).__call__
    for option, value in options.items():
        if option not in known:
            valid = ", ".join(known) or "it takes none"
            raise ValueError(f"{what} has no option {option!r}; valid: {valid}")
        kind = known[option].annotation
        try:
            if isinstance(kind, str):  # of this option alone: others' need not be there
                kind = eval(kind, inspect.unwrap(holder).__globals__)
            kind = Any if kind is inspect.Parameter.empty else kind
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"].lower()
            raise ValueError(f"{what}: option {option} = {value!r}: {wrong}") from error
        except (NameError, PydanticUserError) as error:
            raise ValueError(
                f"{what}: option {option} has the type {kind!r:.80}, which nothing in TOML is; use "
                "bool, int, float, str or a list"
            ) from error
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"{what} needs its option {option!r}: options = {{ {option} = ... }}")


def _as_result(value: Any, index: int) -> RewardResult:
    """A function's answer as a result of finite floats; RuleFault if it is none."""
    if type(value) is float and math.isfinite(value):
        return RewardResult(value)
    result = value if isinstance(value, RewardResult) else RewardResult(value)
    for name in ("parts", "metrics"):
        if not isinstance(getattr(result, name), Mapping):
            given = f"{name} = {getattr(result, name)!r:.80}"
            raise RuleFault(index, f"a RewardResult's {name} must be a dictionary, got {given}")
    numbers = {"score": result.score, **result.parts, **result.metrics}
    for number in numbers.values():
        if not math.isfinite(as_float(number)):
            raise RuleFault(index, f"a reward must be a finite number, got {number!r:.80}")
    return replace(
        result,
        error=None if result.error is None else shorten(str(result.error)),
        score=as_float(result.score),
        parts={name: as_float(part) for name, part in result.parts.items()},
        metrics={name: as_float(metric) for name, metric in result.metrics.items()},
    )


def as_float(value: Any) -> float:
    """A real number as a float, anything else as NaN."""
    import numpy as np  # here: it takes long, and a dry run scores nothing

    if not isinstance(value, Real | np.bool_):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf
