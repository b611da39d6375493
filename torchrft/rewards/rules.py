"""Rule rewards that come with torchrft. They judge the response alone, never the prompt."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from torchrft.rewards.registry import LabelError, register
from torchrft.rewards.sandbox import run_tests


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


def _text(label: Any, **options: Any) -> str:
    if label is None:
        raise LabelError("the row has no label")
    return str(label).strip()


@_built_in("exact_match", label=_text)
def exact_match(response: str, label: Any) -> float:
    """1 if the response is the label, white space around either aside, else 0.

    A label that is no string is compared as Python prints it. Raises LabelError if there is none.

    >>> exact_match(" 42\\n", 42)
    1.0
    """
    return float(response.strip() == _text(label))


# Neither the 7 of x7 is a number, nor is the minus of 5-7 a sign.
_NUMBER = re.compile(
    r"(?<!\w)[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?", re.ASCII
)
_LONGEST = 400  # characters of a number that is looked at


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(text.replace("−", "-"))


def _value(number: str) -> Decimal | None:
    above, _, below = number.replace(",", "").replace(" ", "").partition("/")
    if len(number) > _LONGEST:
        return None
    try:
        return Decimal(above) / Decimal(below or 1)
    except ArithmeticError:  # a division by zero, an exponent beyond all bounds
        return None


def _tolerates(tolerance: float = 0.0) -> None:
    if tolerance < 0:
        raise ValueError(f"option tolerance = {tolerance}: use 0 or more")


def _number(label: Any, **options: Any) -> Decimal:
    wanted = _numbers(_text(label))
    gold = _value(wanted[-1]) if wanted else None
    if gold is None:
        raise LabelError(f"the label {label!r:.80} is no number")
    return gold


@_built_in("numeric", check=_tolerates, label=_number)
def numeric(response: str, label: Any, *, tolerance: float = 0.0) -> float:
    """1 if the last number in the response is the label, up to `tolerance` times the label.

    Numbers are written as 1234, 1,234.5, -1e3 or 1/2. Raises LabelError for a label without one.

    >>> numeric("so it is 1,200.0 in all", 1200)
    1.0
    """
    gold, found = _number(label), _numbers(response)
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
    if not 0 <= target < limit:
        raise ValueError(f"options target = {target}, limit = {limit}: 0 <= target < limit")


@_built_in("length", check=_rises)
def length(token_ids: Sequence[int], *, target: int, limit: int) -> float:
    """1 for responses of up to `target` tokens, 0 from `limit` on, linear in between.

    >>> length(range(150), target=100, limit=200)
    0.5
    """
    return min(max((limit - len(token_ids)) / (limit - target), 0.0), 1.0)


# What counts as a choice, the surest sign first; of equal signs the last one in the response.
_CHOICES = (
    r"\\boxed\s?\{\s?(?:\\text\{)?\(?([A-Z])\b",
    r"(?i:answer|choice|option)\s?(?i:is|:)?[\s:*({\[]{0,8}([A-Z])\b(?!')",
    r"\(([A-Z])\)",
    r"(?m:^[\s*]{0,8}([A-Z])[\s*.):]{0,8}$)",
)


def _letter(label: Any, choices: str = "ABCDE") -> str:
    choices = choices.upper()
    is_number = isinstance(label, int) and 0 <= label < len(choices)
    gold = choices[label] if is_number else _text(label).strip("()").upper()
    if gold not in tuple(choices):
        raise LabelError(f"the label {label!r:.80} is none of the choices {choices}")
    return gold


def _are_letters(choices: str = "ABCDE") -> None:
    if not re.fullmatch("[A-Za-z]{2,}", choices) or len({*choices.upper()}) < len(choices):
        raise ValueError(f"option choices = {choices!r}: use two or more different letters")


@_built_in("multiple_choice", check=_are_letters, label=_letter)
def multiple_choice(response: str, label: Any, *, choices: str = "ABCDE") -> float:
    """1 if the response chooses the label, a letter of `choices` or its number from 0.

    A choice is \\boxed{C}, "answer is C", "(C)" or a line of its own; the first of these kinds that
    is there counts, and of several the last. Raises LabelError for another label.

    >>> multiple_choice("Not (A), so the answer is (C).", 2)
    1.0
    """
    gold, choices = _letter(label, choices), choices.upper()
    for pattern in _CHOICES:
        found = [letter for letter in re.findall(pattern, response) if letter in choices]
        if found:
            return float(found[-1] == gold)
    return 0.0


_TAIL = 4000  # characters at the end of a response in which its answer is looked for


def _needs_math_verify(**options: Any) -> None:
    try:
        import math_verify
    except ImportError as error:
        raise ValueError("it needs math-verify: pip install 'torchrft[math]'") from error
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns of missing timeouts


@lru_cache(maxsize=4096)  # the samples of a prompt have one label
def _gold(label: str) -> list[Any]:
    from math_verify import parse

    marked = any(sign in label for sign in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(label if marked else f"${label}$", parsing_timeout=None)
    if not gold:
        raise LabelError(f"math-verify reads no answer in the label {label!r:.80}")
    return gold


_SPACING = re.compile(r"\\(?:left|right|,|;|!)|\$|(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_INTEGER = re.compile(r"[-+]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")


def _plain(answer: str) -> str:
    """LaTeX without what only changes its looks."""
    return _SPACING.sub("", answer).replace("dfrac", "frac").replace("tfrac", "frac")


def _parts(answer: str) -> tuple[str, list[str]] | None:
    """Brackets and components of (a, b), [a, b) and the like; None for anything else."""
    if answer[:1] not in tuple("([") or answer[-1:] not in tuple(")]"):
        return None
    parts, depth = [""], 0
    for sign in answer[1:-1]:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return None
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return answer[0] + answer[-1], parts


@lru_cache(maxsize=4096)  # and many of their answers are the same
def _is_equal(label: str, answer: str) -> float:
    from math_verify import parse, verify

    # Parsing LaTeX takes milliseconds, which most answers need not cost.
    in_box = answer.startswith("\\boxed{") and answer.endswith("}")
    gold, given = _plain(label), _plain(answer[7:-1] if in_box else answer)
    if gold == given != "":
        return 1.0
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(given) and max(map(len, (gold, given))) < 99:
        return float(int(gold.replace(",", "")) == int(given.replace(",", "")))
    wanted, shown = _parts(gold), _parts(given)
    if wanted and shown and wanted[0] == shown[0] and len(wanted[1]) == len(shown[1]) > 1:
        pairs = zip(wanted[1], shown[1], strict=True)
        return float(all(_is_equal(one, f"\\boxed{{{other}}}") for one, other in pairs))
    # Their timeouts are off: a worker process has its own.
    found = parse(answer, parsing_timeout=None)
    return float(verify(_gold(label), found, timeout_seconds=None))


def _answer(response: str) -> str:
    """What follows the last <answer>, and there the last \\boxed{...}, else the end."""
    response = response.rpartition("<answer>")[2].partition("</answer>")[0]
    start = response.rfind("\\boxed{")
    depth = 0
    for place in range(start + 6, min(start + _TAIL, len(response)) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[start : place + 1]
    return response[-_TAIL:]


def _answered(label: Any, **options: Any) -> None:
    if not re.sub(r"\s|\$|\\boxed\{\s*\}", "", _text(label).rpartition("####")[2]):
        raise LabelError(f"the label {label!r:.80} holds no answer")


@_built_in("math", bounded=False, check=_needs_math_verify, label=_answered)
def math(response: str, label: Any) -> float:
    """1 if the response's answer equals the label as mathematics, by `math-verify`.

    The answer is the last \\boxed{...}, else what math-verify finds in the last 4,000 characters.
    Both may be LaTeX or plain. Raises LabelError for a label without an answer.
    """
    return _is_equal(_text(label), _answer(response))


@_built_in("gsm8k", bounded=False, check=_needs_math_verify, label=_answered)
def gsm8k(response: str, label: Any) -> float:
    """`math` for GSM8K: of the label and of the response counts what follows the last "####".

    A response without that mark is looked at as a whole.
    """
    gold = _text(label).rpartition("####")[2].strip().replace(",", "")
    return _is_equal(gold, _answer(response.rpartition("####")[2]))


def _takes_time(seconds: float = 5.0, partial: bool = False) -> None:
    if seconds <= 0:
        raise ValueError(f"option seconds = {seconds}: use more than 0")


def _tests(label: Any, **options: Any) -> list[str]:
    tests = [label] if isinstance(label, str) else label
    if (
        not isinstance(tests, list)
        or not tests
        or not all(isinstance(test, str) and test.strip() for test in tests)
    ):
        raise LabelError(f"the label {label!r:.80} is no test, nor a list of tests")
    return tests


@_built_in("code", bounded=False, check=_takes_time, label=_tests)
def code(response: str, label: Any, *, seconds: float = 5.0, partial: bool = False) -> float:
    """1 if the response's last code block passes all tests of the label, run in a sandbox.

    The label is Python source with assertions, or a list of such, each a test. With `partial` the
    reward is the share of tests passed. `seconds` bounds all of them together.
    """
    tests = _tests(label)
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.DOTALL)
    passed = run_tests(blocks[-1] if blocks else response, tests, seconds)
    return passed / len(tests) if partial else float(passed == len(tests))
