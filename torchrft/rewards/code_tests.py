"""Reads the tests of a program from a label, in the forms of public data sets, and judges it."""

import ast
import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Any

from torchrft.rewards.code_asserts import AssertReader, Check, Unreadable
from torchrft.rewards.registry import LabelError
from torchrft.rewards.sandbox import Sandbox

_TOLERANCE = 1e-6  # relative or absolute, of numbers that are not whole
_CALLS = ("functional", "function_call", "function", "call")
_SCRIPTS = ("stdin", "stdin_stdout", "standard_input")
_MISSING = object()
_WRAPPINGS = ("ground_truth", "input_output", "test_cases", "tests", "test_list", "test")
_IDLE = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Import, ast.ImportFrom)  # tests nothing


def read_tests(label: Any, forgeable: bool = False) -> list[list[Check]]:
    """Return the tests of a label, each as its checks.

    `forgeable` admits Python that only the program's own interpreter can run. Raises LabelError for
    a label that is no test, and without `forgeable` for one that a program could forge.

    >>> len(read_tests({"inputs": ["1", "2"], "outputs": ["2", "4"]}))
    2
    """
    try:
        cases = _cases(label)
        if isinstance(cases, list) and cases and all(isinstance(case, Mapping) for case in cases):
            return [[_pair(case)] for case in cases]
        is_source = isinstance(cases, list) and all(isinstance(case, str) for case in cases)
        if not is_source or not all(map(str.strip, cases)) or not cases:
            raise LabelError("is no test, nor a list of tests")
        return _of_source(cases, forgeable)
    except LabelError as error:
        raise LabelError(f"the label {label!r:.80} {error}") from error


def _cases(label: Any) -> Any:
    """The label without its wrapping: a list of sources, or of mappings, one for each case."""
    if isinstance(label, str):
        label = _parsed(label, "[{")
        if isinstance(label, str):
            return [label]
    if not isinstance(label, Mapping):
        return label
    if "inputs" in label and "outputs" in label:
        given, wanted = label["inputs"], label["outputs"]
        if not (isinstance(given, list) and isinstance(wanted, list)) or len(given) != len(wanted):
            raise LabelError("needs lists of as many inputs as outputs")
        pairs = zip(given, wanted, strict=True)
        return [{**label, "input": text, "output": output} for text, output in pairs]
    if "input" in label and "output" in label:
        return [label]
    cases = _cases(next((label[key] for key in _WRAPPINGS if label.get(key)), None))
    if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        return cases
    imports, setup = label.get("test_imports") or [], label.get("test_setup_code") or ""
    before = [*([imports] if isinstance(imports, str) else imports), *([setup] if setup else [])]
    if label.get("entry_point") and any("def check(" in case for case in cases):
        cases = ["\n".join([*cases, f"check({label['entry_point']})"])]
    return before + cases


def _parsed(text: str, first: str = "") -> Any:
    """What a text holds as JSON or as Python's literals, if it starts with one of `first`."""
    if not first or text.lstrip()[:1] in tuple(first):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(text)
    return text


def _pair(case: Mapping[str, Any]) -> Check:
    """A check of an input with its output, of the standard streams or of a function."""
    if "input" not in case or "output" not in case:
        raise LabelError(f"has a case without input or output, with {', '.join(map(str, case))}")
    given, wanted, more = case["input"], case["output"], case.get("metadata")
    more = _parsed(more, "{") if isinstance(more, str) else more
    kind, name = case.get("type") or case.get("testtype"), case.get("fn_name")
    name = name or case.get("func_name")
    name = more.get("func_name") if not name and isinstance(more, Mapping) else name
    if kind is not None and kind not in (*_CALLS, *_SCRIPTS):
        raise LabelError(f"has a case of type {kind!r}: use 'stdin' or 'functional'")
    if kind in _SCRIPTS or not (name or kind):
        if given is None or wanted is None:
            raise LabelError("has a case whose input or output is None")
        return Check([{"stdin": _lines(given)}], partial(_is_output, _lines(wanted)))
    if not isinstance(name, str) or not all(map(str.isidentifier, name.split("."))):
        raise LabelError(f"has a case of a function that fn_name does not name: {name!r}")
    wanted_values = [wanted]
    if isinstance(given, str):  # an argument per line
        arguments: Any = [_parsed(line) for line in given.split("\n") if line.strip()]
        wanted_values = [_parsed(wanted) if isinstance(wanted, str) else wanted]
    else:
        arguments = given if isinstance(given, list | Mapping) else [given]
        if isinstance(wanted, list) and len(wanted) == 1 and wanted[0] is not None:
            wanted_values.append(wanted[0])  # in APPS and TACO, outputs are lists
    stars = "**" if isinstance(arguments, Mapping) else "*"
    name = name.removeprefix("Solution.")
    question = {"call": f"{name}({stars}{arguments!r})", "name": name.split(".")[0]}
    return Check([question], partial(_is_value, wanted_values))


def _lines(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def _is_output(wanted: str, answers: Sequence[Any]) -> bool:
    """Whether two outputs have the same lines, white space at their ends aside.

    >>> _is_output("1.5 2\\nyes\\n", ["1.50 2  \\nyes"]), _is_output("1\\n2", ["1 2"])
    (True, False)
    """
    written, lines = answers[0].rstrip().split("\n"), wanted.rstrip().split("\n")
    return len(written) == len(lines) and all(map(_is_line, written, lines))


def _is_line(written: str, wanted: str) -> bool:
    # Lines of numbers may have any space between them; other words stand where they should.
    for separator, same in ((" ", _is_word), (None, _is_number)):
        words = written.rstrip().split(separator), wanted.rstrip().split(separator)
        if len(words[0]) == len(words[1]) and all(map(same, *words)):
            return True
    return False


def _is_word(written: str, wanted: str) -> bool:
    return written == wanted or _is_number(written, wanted)


def _is_number(written: str, wanted: str) -> bool:
    """Whether two words are one number: exactly if a whole one is wanted, else up to 1e-6."""
    # Python reads underscores and the digits of all scripts in numbers, which nobody prints.
    if "_" in written or not written.isascii():
        return False
    try:
        answer, number = Decimal(written), Decimal(wanted)
        if number == number.to_integral_value() and not {*wanted.lower()} & {*".e"}:
            return answer == number
        largest = max(abs(answer), abs(number), Decimal(1))
        return largest.is_finite() and abs(answer - number) <= largest * Decimal(_TOLERANCE)
    except (ArithmeticError, ValueError):
        return False


def _is_value(wanted: Sequence[Any], answers: Sequence[Any]) -> bool:
    answer = [*answers[0]] if isinstance(answers[0], Iterator) else answers[0]
    return any(_is_same(answer, value) for value in wanted)


def _is_same(answer: Any, wanted: Any) -> bool:
    """Whether an answer is a value as JSON holds it, without tuples and with texts for keys."""
    if isinstance(answer, list | tuple) and isinstance(wanted, list | tuple):
        return len(answer) == len(wanted) and all(map(_is_same, answer, wanted))
    if isinstance(answer, dict) and isinstance(wanted, dict):
        texts = {str(key): value for key, value in answer.items()}
        pairs = [(texts.get(str(key), _MISSING), value) for key, value in wanted.items()]
        return len(answer) == len(wanted) and all(_is_same(*pair) for pair in pairs)
    if isinstance(wanted, float) and type(answer) in (int, float):
        return math.isclose(answer, wanted, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(answer == wanted)


def _of_source(sources: Sequence[str], forgeable: bool) -> list[list[Check]]:
    reader, tests = AssertReader(), list[list[Check]]()
    try:
        for source in sources:
            checks = reader.read(source)
            tests += [checks] if checks else []
        if tests:
            tests[-1] += reader.end()
    except Unreadable as error:
        if not forgeable:
            raise LabelError(
                f"needs the program's own objects, for {str(error)[:80]!r}: compare what functions "
                "return with plain data, as assert f(1) == 2 does, or use pairs of inputs and "
                "outputs, or set the function's option allow_forgeable_tests = true, with which "
                "programs can pass that do not solve it"
            ) from error
        tests = _forgeable(sources)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LabelError(f"is no Python: {error}") from error
    if not tests:
        raise LabelError("tests nothing: it asks the program for no answer")
    return tests


def _forgeable(sources: Sequence[str]) -> list[list[Check]]:
    """Tests to run as they are; what only defines belongs to the test behind it."""
    tests, checks = list[list[Check]](), list[Check]()
    for source in sources:
        checks = [*checks, Check([{"run": source}], lambda answers: bool(answers[0]))]
        if any(not isinstance(node, _IDLE) for node in ast.parse(source).body):
            tests, checks = [*tests, checks], []
    return tests


def passed_tests(program: str, tests: Sequence[Sequence[Check]], seconds: float) -> int:
    """How many tests a program passes that answers within `seconds`.

    All are asked before one is judged, so that no question tells how an answer was.
    """
    with Sandbox(program, seconds) as sandbox:
        answers = [[[*map(sandbox.ask, check.questions)] for check in test] for test in tests]
    reading, writing = os.pipe()
    child = os.fork()  # for there are data that take hours to compare
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            for test, given in zip(tests, answers, strict=True):
                os.write(writing, b"1" if all(map(_passes, test, given)) else b"0")
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as verdicts:
        passed = verdicts.read().count(b"1")
    os.waitpid(child, 0)
    return passed


def _passes(check: Check, answers: Sequence[str | None]) -> bool:
    with suppress(Exception):  # the answer is of another kind than the test can look at
        return None not in answers and check.judge(
            [_plain(json.loads(each or "")) for each in answers]
        )
    return False


_KINDS: Mapping[str, Any] = {
    "int": lambda digits: int(digits, 16),
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "tuple": lambda values: tuple(map(_plain, values)),
    "set": lambda values: set(map(_plain, values)),
    "frozenset": lambda values: frozenset(map(_plain, values)),
    "dict": lambda pairs: {_plain(key): _plain(value) for key, value in pairs},
    "iter": lambda values: iter([*map(_plain, values)]),
}


def _plain(answer: Any) -> Any:
    """Plain data from JSON, as `encode` of sandbox_child.py writes it: of built-in types alone."""
    if isinstance(answer, list):
        return [_plain(each) for each in answer]
    if isinstance(answer, dict):
        ((kind, values),) = answer.items()
        return _KINDS[kind](values)
    return answer
