"""From a judge's answers to a number."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

from torchrft.rewards.registry import RuleFault, as_float, told
from torchrft.rewards.source import RewardResult
from torchrft.rewards.workers import Task, WorkerPool
from torchrft.tools.registry import Registry

Parser = Callable[[str], float | None]  # None: there is no verdict in the answer

PARSERS: Registry[Parser] = Registry("parser of a judge")

# 3, -0.5, .5, 1,200 or 1e-3; the minus of 5-7 is no sign.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-−])?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d\b)?"
)
_LARGEST = 1e18  # beyond it, squares of rewards are no float32: nothing that a judge means
_VERDICT = re.compile(rf"(?i)\bverdict\b[^\w.−-]*({_NUMBER.pattern}|\w+)")
_WORDS = dict.fromkeys(("yes", "true", "correct", "pass"), 1.0) | dict.fromkeys(
    ("no", "false", "incorrect", "fail"), 0.0
)


PARSE_SECONDS = 10.0  # for one answer


class Stuck(Exception):
    """A parser has not come to an end."""


class Parsing:
    """A judge's parser. The user's own run in a worker process: regular expressions may explode.

    Raises ValueError as `parser_of`; when called Stuck, and as `_checked`.
    """

    def __init__(self, name: str) -> None:
        self.parser = parser_of(name)
        self.pool: WorkerPool | None = None
        if "(" in name or ".py:" in name:
            task = Task(f"{__file__}:parse", {"parser": name}, tolerant=False)
            self.pool = WorkerPool([task], 1, PARSE_SECONDS, 2 << 30)

    def __call__(self, answer: str) -> float | None:
        if self.pool is None:
            return _checked(self.parser, answer)
        [result] = self.pool.run(0, [{"response": answer}], False, PARSE_SECONDS)
        if result.error is not None:
            raise Stuck(result.error)
        return None if result.metrics["none"] else result.score

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


def parse(response: str, *, parser: str) -> RewardResult:
    """What a parser says of an answer, as a worker process is asked for it."""
    value = _checked(parser_of(parser), response)
    return RewardResult(0.0 if value is None else value, metrics={"none": float(value is None)})


def _checked(parser: Parser, answer: str) -> float | None:
    """Raises RuleFault for an exception, and for what is no finite number and not None."""
    try:
        value = parser(answer)
    except Exception as error:
        raise RuleFault(0, f"raised {told(error)}") from error
    if value is not None and not math.isfinite(as_float(value)):
        raise RuleFault(0, f"must give a finite number or None, got {value!r:.80}")
    return None if value is None else as_float(value)


def parser_of(name: str) -> Parser:
    """A registered parser, the function that `path/to/file.py:function` names, or a regular
    expression with one group, whose last match holds a number or a word of yes or no.

    Raises ValueError for anything else.
    """
    if "(" not in name or ".py:" in name:
        return PARSERS.get(name)
    try:
        pattern = re.compile(name)
    except re.error as error:
        raise ValueError(f"parser = {name!r} is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise ValueError(
            f"parser = {name!r} has {pattern.groups} groups; put one, (...), around the verdict "
            "and make others (?:...)"
        )
    return lambda answer: _last(pattern, answer)


@PARSERS.register("last_number")
def last_number(answer: str) -> float | None:
    """The last number in the answer.

    >>> last_number("Between 0 and 10, I give 7.5."), last_number("-3"), last_number("none")
    (7.5, -3.0, None)
    """
    return _last(_NUMBER, answer)


@PARSERS.register("verdict")
def verdict(answer: str) -> float | None:
    """What follows the last word "verdict": 1 for yes, true, correct or pass, 0 for no, false,
    incorrect or fail, or a number.

    >>> verdict("It holds. Verdict: yes"), verdict("**Verdict**: *incorrect*"), verdict("yes")
    (1.0, 0.0, None)
    >>> verdict("Verdict: 0.75"), verdict("verdict = **-1**"), last_number("−.5")
    (0.75, -1.0, -0.5)
    """
    return _last(_VERDICT, answer)


def aggregate(values: Sequence[float], how: Literal["majority", "mean"]) -> float:
    """The most frequent value, or the mean of those that are equally frequent; or the mean of all.

    >>> aggregate([1, 0, 1], "majority"), aggregate([1, 0], "majority"), aggregate([3, 0], "mean")
    (1.0, 0.5, 1.5)
    """
    counts = Counter(values)
    most = max(counts.values())
    chosen = [v for v in counts if counts[v] == most] if how == "majority" else values
    return fmean(chosen)


def _last(pattern: re.Pattern[str], answer: str) -> float | None:
    found: list[Any] = pattern.findall(answer)
    if not found:
        return None
    text = found[-1].strip().lower().replace(",", "").replace("−", "-")
    if text in _WORDS:
        return _WORDS[text]
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < _LARGEST else None
