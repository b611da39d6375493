"""Rule rewards that come with torchrft. They judge the response alone, never the prompt."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from torchrft.rewards.answer import TAIL, answer_part, last_box
from torchrft.rewards.choice import chosen_letter, label_letter
from torchrft.rewards.labels import label_text
from torchrft.rewards.registry import LabelError, MissingPackage, register


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """`bounded` rules take time linear in the response and need no process of their own.

    When a job starts, `check` gets the options and raises ValueError for those that cannot be used,
    and `label` gets every row's label with them and raises LabelError for what it can never judge.
    """

    bounded: bool = True
    check: Callable[..., object] = lambda **options: None
    label: Callable[..., object] = lambda label, **options: None


BUILT_IN: dict[str, BuiltIn] = {}


def _built_in(name: str, **traits: Any) -> Callable[[Any], Any]:
    BUILT_IN[name] = BuiltIn(**traits)
    return register(name)


@_built_in("exact_match", label=label_text)
def exact_match(response: str, label: Any) -> float:
    """1 if the response, or its answer part, is the label, white space around either aside.

    Raises LabelError for a label that is no text and no number.

    >>> exact_match(" 42\\n", 42), exact_match("<think>6 * 7</think>42", "42")
    (1.0, 1.0)
    """
    text = label_text(label)
    return float(text == response.strip() or text == answer_part(response))


# Neither the 7 of x7 is a number, nor is the minus of 5-7 a sign.
_NUMBER = re.compile(
    r"(?<!\w)[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d){1,9},\d{3}|\d+)(?![\d])(?:\.\d*)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+| \d{1,3}/\d{1,3})?",
    re.ASCII,
)
_LONGEST = 400  # characters of a number that is looked at
_LATEX_NUMBERS = [
    (re.compile(r"-\\?\$(?=[\d.])"), "-"),
    (re.compile(r"(?<=[A-Za-z}])\^\{?[-+]?\d+\}?"), ""),  # of a unit
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[!,;: ])(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}|\\[dt]?frac(\d)(\d)"), r"\1\3/\2\4"),
    (re.compile(r"(?<=\d) ?(?:\\times|\\cdot|[x×*·]) ?10(?:\^|\*\*)\{?([-+]?\d{1,9})\}?"), r"e\1"),
    (re.compile(r"(?<![\w.,^])10(?:\^|\*\*)\{?([-+]?\d{1,9})\}?"), r"1e\1"),
]


def _numbers(text: str) -> list[str]:
    text = text.replace("−", "-")
    for pattern, new in _LATEX_NUMBERS:
        text = pattern.sub(new, text)
    return _NUMBER.findall(text)


def _value(number: str) -> Decimal | None:
    whole, _, rest = re.sub(r"\s?/\s?", "/", number.replace(",", "")).rpartition(" ")
    above, _, below = rest.partition("/")
    if len(number) > _LONGEST:
        return None
    try:
        value = Decimal(above) / Decimal(below or 1)
        return Decimal(whole) + value.copy_sign(Decimal(whole)) if whole else value  # 3 1/2
    except ArithmeticError:  # a division by zero, an exponent beyond all bounds
        return None


def _tolerates(tolerance: float = 0.0) -> None:
    if not 0 <= tolerance <= 1:
        raise ValueError(f"option tolerance = {tolerance}, times the label: use 0 to 1")


def _number(label: Any, **options: Any) -> Decimal:
    wanted = _numbers(label_text(label))
    gold = _value(wanted[-1]) if wanted else None
    if gold is None:
        raise LabelError(f"the label {label!r:.80} is no number")
    return gold


@_built_in("numeric", check=_tolerates, label=_number)
def numeric(response: str, label: Any, *, tolerance: float = 0.0) -> float:
    """1 if the last number of the answer is the label, up to `tolerance` times the label.

    Looked at is the last box of the answer part, else all of it. Numbers are written as 1234,
    1,234.5, -1e3, 1/2 or in LaTeX. Raises LabelError for a label without one.

    >>> numeric("so it is 1,200.0 in all", 1200)
    1.0
    """
    text = answer_part(response)
    box = last_box(text)
    gold, found = _number(label), _numbers(text if box is None else box)
    value = _value(found[-1]) if found else None
    if value is None:
        return 0.0
    return float(abs(value - gold) <= Decimal(tolerance) * abs(gold))


def _compiles(pattern: str, **options: Any) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"option pattern = {pattern!r}: {error}") from error


@_built_in("regex", bounded=False, check=_compiles)
def regex(response: str, *, pattern: str, full: bool = False) -> float:
    """1 if `pattern` (of Python's `re`) is in the response, or matches all of it if `full`."""
    found = re.fullmatch(pattern, response) if full else re.search(pattern, response)
    return float(found is not None)


def _has_tags(tags: Sequence[str] = ("think", "answer"), **options: Any) -> None:
    if not tags or len(set(tags)) < len(tags):
        raise ValueError(f"option tags = {list(tags)}: name one or several different tags")


@_built_in("format", check=_has_tags)
def format_tags(
    response: str, *, tags: Sequence[str] = ("think", "answer"), opened: bool = False
) -> float:
    """1 if the response is <tag>...</tag> for each of `tags`, in that order, each once, else 0.

    Between and around them only white space may stand. `opened` says that the prompt ends with the
    first tag, so that the response starts inside of it.

    >>> format_tags("<think>2 + 2</think>\\n<answer>4</answer>")
    1.0
    """
    text = f"<{tags[0]}>{response}" if opened else response
    if any(text.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return 0.0
    place = 0
    for tag in tags:
        start, end = text.index(f"<{tag}>"), text.index(f"</{tag}>")
        if start < place or end < start or text[place:start].strip():
            return 0.0
        place = end + len(f"</{tag}>")
    return float(not text[place:].strip())


def _rises(target: int, limit: int) -> None:
    if not 0 <= target < limit <= 10**9:
        raise ValueError(f"options target = {target}, limit = {limit}: 0 <= target < limit <= 1e9")


@_built_in("length", check=_rises)
def length(token_ids: Sequence[int], *, target: int, limit: int) -> float:
    """1 for responses of up to `target` tokens, 0 from `limit` on, linear in between.

    >>> length(range(150), target=100, limit=200)
    0.5
    """
    return min(max((limit - len(token_ids)) / (limit - target), 0.0), 1.0)


def _are_letters(choices: str = "ABCDE") -> None:
    if not re.fullmatch("[A-Za-z]{2,}", choices) or len({*choices.upper()}) < len(choices):
        raise ValueError(f"option choices = {choices!r}: use two or more different letters")


@_built_in("multiple_choice", check=_are_letters, label=label_letter)
def multiple_choice(response: str, label: Any, *, choices: str = "ABCDE") -> float:
    """1 if the response chooses the label, a letter of `choices` or its number from 0.

    A choice is \\boxed{C}, "answer is C", "(C)" or "C. Paris"; the first of these kinds that is
    in the answer part counts, and of several the last. Raises LabelError for another label.

    >>> multiple_choice("Not (A), so the answer is (C).", 2)
    1.0
    """
    gold = label_letter(label, choices)
    return float(chosen_letter(response, choices.upper()) == gold)


def _needs_math_verify(**options: Any) -> None:
    try:  # here, so that no sample's deadline pays for the import
        import math_verify

        import torchrft.rewards.math_values  # noqa: F401
    except ImportError as error:
        raise MissingPackage("it needs math-verify: pip install 'torchrft[math]'") from error
    # It warns of missing timeouts: a worker process has its own.
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)


def _gold(label: Any, mark: str = "\0") -> str:
    from torchrft.rewards.math_equal import is_readable, plain  # which other jobs do without

    text = label_text(label).rpartition(mark)[2]
    box = last_box(text)
    text = text if box is None else box
    if not is_readable(text):
        raise LabelError(f"the label {label!r:.80} holds no answer that can be read")
    return plain(text)


def _gold_gsm8k(label: Any) -> str:
    return _gold(label, "####")


_STATED = re.compile(
    r"(?is)\b(?:answer|result)\b[^.\n]{0,40}?(?:\bis\b|:|=)(?!.*\b(?:answer|result)\b)(.+)"
)
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}|\n|[.?!]\s")


@lru_cache(maxsize=4096)  # many answers to a prompt are the same
def _answer(text: str) -> str:
    """The answer in an answer part, as `plain` gives it: its last box, or what it states."""
    from math_verify import parse

    from torchrft.rewards.math_equal import plain

    box = last_box(text)
    if box is not None:
        return plain(box)
    stated = _STATED.search(text[-300:])
    for candidate in (stated[1] if stated else text, text):
        candidate = candidate.lstrip(" \n*_:").rstrip(" \n*_.:")
        around = re.sub(r"\$[^$]*\$|\b(?:and|or)\b", "", candidate)
        is_prose = _PROSE.search(candidate.replace("$", "")) or (
            "$" in candidate and re.search("[A-Za-z]{2}", around)
        )
        if len(candidate) < 200 and not is_prose:
            return plain(candidate)
    read = parse(text[-TAIL:], parsing_timeout=None)
    return plain(next((each for each in reversed(read) if isinstance(each, str)), ""))


def _is_equal(gold: str, text: str) -> float:
    from torchrft.rewards.math_equal import is_equal

    return float(is_equal(gold, _answer(text)))


@_built_in("math", bounded=False, check=_needs_math_verify, label=_gold)
def math(response: str, label: Any) -> float:
    """1 if the response's answer equals the label as mathematics.

    The answer is the last \\boxed{...} of the answer part, else what math-verify finds in its last
    4,000 characters. Both may be LaTeX or plain. Raises LabelError for a label without an answer.
    """
    return _is_equal(_gold(label), answer_part(response))


@_built_in("gsm8k", bounded=False, check=_needs_math_verify, label=_gold_gsm8k)
def gsm8k(response: str, label: Any) -> float:
    """`math` for GSM8K: of the label and of the response counts what follows the last "####".

    A response without that mark is looked at as a whole.
    """
    return _is_equal(_gold_gsm8k(label), answer_part(response).rpartition("####")[2])


def _takes_time(seconds: float = 5.0, **options: Any) -> None:
    if not 0 < seconds <= 1e6:
        raise ValueError(f"option seconds = {seconds}: use more than 0 and at most 1e6")
    from torchrft.rewards import code_tests, sandbox  # noqa: F401

    sandbox.isolation()  # here, so that no sample's deadline pays for the try


def _tests(label: Any, allow_forgeable_tests: bool = False, **options: Any) -> list[Any]:
    from torchrft.rewards.code_tests import read_tests  # which jobs without programs do without

    return read_tests(label, allow_forgeable_tests)


@_built_in("code", bounded=False, check=_takes_time, label=_tests)
def code(
    response: str,
    label: Any,
    *,
    seconds: float = 5.0,
    partial: bool = False,
    allow_forgeable_tests: bool = False,
) -> float:
    """1 if the last Python block of the answer part passes all tests of the label, in a sandbox.

    The label is Python source with assertions, a list of such, each a test, or inputs and outputs;
    docs/rewards.md has its forms. With `partial` the reward is the share of tests passed. `seconds`
    bounds all of them together. `allow_forgeable_tests` runs tests that need the program's objects
    in its interpreter, where it can make them pass.
    """
    from torchrft.rewards.code_tests import passed_tests
    from torchrft.rewards.program import program_of

    tests = _tests(label, allow_forgeable_tests)
    passed = passed_tests(program_of(answer_part(response)), tests, seconds)
    return passed / len(tests) if partial else float(passed == len(tests))
