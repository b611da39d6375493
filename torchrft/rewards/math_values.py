"""Compares what math-verify reads, as SymPy objects. Imports SymPy."""

import re
import zlib
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import parse
from math_verify.parser import LatexExtractionConfig

from torchrft.rewards.math_equal import TURNS, is_finite_decimal, matches, tolerance

# Units are taken away before, by `math_equal`: math-verify would also take variables.
_NORMAL = NormalizationConfig(units=False, malformed_operators=True, nits=True)
_READER = [LatexExtractionConfig(normalization_config=_NORMAL)]
_SMALL = sympy.Float(10) ** -40
_TEXTUAL = re.compile(r"'|\\prime|\^\{T\}|\\angle|mod(?![a-z])|\\frac\{d\w*\}\{d|\?")


def values_equal(gold: str, given: str) -> bool:
    """Return whether two LaTeX texts, which are different texts, have the same value."""
    if _TEXTUAL.search(gold) or _TEXTUAL.search(given):
        return False  # signs that the reader drops
    letters = {sign for sign in re.sub(r"\\[A-Za-z]+", "", gold + given) if sign.isalpha()}
    if any(letter.swapcase() in letters for letter in letters):
        return False  # the reader takes x and X for one
    try:
        read = [_read(gold), _read(given)]
        return None not in read and _same(*read)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return False  # SymPy can make nothing of the pair


@lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    """The SymPy object with exact numbers, or None; of relations with "or", the set of all."""
    if ";" in text and re.search(r"[<>]|\\[lg]e(?![a-z])", text):
        return sympy.Union(*(_read(each).as_set() for each in text.split(";")))
    if TURNS.search(text):
        text = re.sub(r"(\d+)\^\{\\circ\}", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"\\log_\{e\}", r"\\ln", text).replace(";", ",")
    value = next(iter(parse(f"\\boxed{{{text}}}", _READER, parsing_timeout=None)), None)
    if value is None or isinstance(value, str):
        return None
    exact: dict[Any, Any] = {each: sympy.Rational(str(each)) for each in value.atoms(sympy.Float)}
    exact |= {symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"}
    return value.xreplace(exact | {sympy.S.Reals: sympy.Interval(-sympy.oo, sympy.oo)})


def _same(one: Any, two: Any) -> bool:
    """Whether two objects are the same: by members, or by value at a few points."""
    if isinstance(one, sympy.MatrixBase) or isinstance(two, sympy.MatrixBase):
        shapes = [getattr(value, "shape", None) for value in (one, two)]
        return shapes[0] == shapes[1] and all(map(_same, one, two))
    relations = [_relations(value) for value in (one, two)]
    if all(relations):
        return matches(relations[0], relations[1], _same_relation)
    if any(relations):
        one, two = (one.as_set(), two) if relations[0] else (one, two.as_set())
        return isinstance(one, sympy.Set) and isinstance(two, sympy.Set) and _same(one, two)
    if isinstance(one, sympy.Interval) and isinstance(two, sympy.Interval):
        return one.args[2:] == two.args[2:] and all(map(_same, one.args[:2], two.args[:2]))
    if isinstance(one, sympy.Set | sympy.Tuple) or isinstance(two, sympy.Set | sympy.Tuple):
        joint = type(one) is type(two) and isinstance(one, sympy.FiniteSet | sympy.Union)
        return bool(one == two or (joint and matches(one.args, two.args, _same)))
    return one == two or _same_value(one, two)


def _relations(value: Any) -> list[Any]:
    found = value.args if isinstance(value, sympy.And) else (value,)
    return list(found) if all(isinstance(each, sympy.Rel) for each in found) else []


def _same_relation(one: Any, two: Any) -> bool:
    """The same up to a factor: 2x < 4 and x < 2, and -x > -2."""
    (kind, left), (other, right) = ((type(each), each.lhs - each.rhs) for each in (one, two))
    ratios = [_at(left, point) / _at(right, point) for point in range(3)]
    names = [sorted(symbol.name for symbol in side.free_symbols) for side in (left, right)]
    steady = names[0] == names[1] and all(
        ratio.is_number and ratio and abs(ratio - ratios[0]) < 1e-12 * abs(ratio)
        for ratio in ratios
    )
    turned = {sympy.Gt: sympy.Lt, sympy.Lt: sympy.Gt, sympy.Ge: sympy.Le, sympy.Le: sympy.Ge}
    return bool(steady and (turned.get(kind, kind) if ratios[0] < 0 else kind) is other)


def _same_value(one: Any, two: Any) -> bool:
    one, two = one.doit(), two.doit()
    if one.is_Rational and two.is_Rational:
        return bool(one == two)
    for point in range(3 if one.free_symbols or two.free_symbols else 1):
        left, right = _at(one, point), _at(two, point)
        if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
            return bool(one == two or sympy.simplify(one - two) == 0)
        gap, size = abs(left - right), max(abs(left), abs(right))
        if size < _SMALL and gap:  # or nearly nothing is left of a difference that is nothing
            return bool(sympy.simplify(one - two) == 0)
        if gap > size * _SMALL:
            # A decimal may stand for a number that no decimal is.
            exact = [Fraction(v.p, v.q) for v in (one, two) if v.is_Rational]
            fits = exact and exact[0].denominator > 1 and is_finite_decimal(exact[0])
            return bool(fits and not one.free_symbols | two.free_symbols and gap <= tolerance(size))
    return True


def _at(value: Any, point: int) -> Any:
    """The value to 60 digits where each symbol has a number of its own, not all positive."""
    numbers = {s: zlib.crc32(s.name.encode()) % 1009 + 101 * point for s in value.free_symbols}
    signed = {s: sympy.Rational(number * (-1) ** point, 613) for s, number in numbers.items()}
    return value.xreplace(signed).doit().evalf(60)
