"""Compares two answers as mathematics. math-verify reads LaTeX; what is equal is decided here.

math-verify's own comparison drops signs and words that it does not know, and takes all numbers
below 1e-6 for equal, and all equations without solutions.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "π": "\\pi "}
    | {"√": "\\sqrt ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne "}
    | {"°": "^\\circ ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in "}
    | {"±": "\\pm ", "→": "\\to ", "′": "'"}
)  # fmt: skip
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        # Marks of mathematics, sizes, spaces. A comma with a space behind becomes a semicolon.
        (r"(?<=\d)(?:\{,\}|,\\!|,?\\[,;: ]|\\!)(?=\d{3}(?!\d))", ","),
        (r"(?<!\\)(?:\\[()\[\]]|\$)|\\!|\\text\{\}", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|boldsymbol|bm|bf|rm)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s+", " "),
        (r"(?:,|;|\{,\}) +|;", ";"),
        (r"\{([,:=])\}|\\text\{(\W|\d+)\}", r"\1\2"),
        (r"[,; ]*(?:\\text\{ *(?:and|or) *\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))[, ]*", ";"),
        (r" *(?:\\text\{ *percent *\}|percent(?![A-Za-z]))", r"\\%"),
        (r"\\text\{ *(hundred|[a-z]+(?:sand|illion)) *\}", r" \1"),
        # One command of several that mean the same.
        (r"\\[dtc](frac|binom)", r"\\\1"),
        (r"\\(?:(?:text|math)(?:rm|bf|it|sf|normal)?|[mh]box|textup)(?= *\{)", r"\\text"),
        (r"\\text\{([\d(][^{}]*|[^{}]*[,;][^{}]*)\}", r"\1"),
        (r"(?<=\{)b(?=matrix\})", "p"),
        (r"\\[lr]vert(?![A-Za-z])", "|"),
        (r"\\(le|ge)(?:q|qslant|slant)(?![A-Za-z])", r"\\\1"),
        (r"\\neq(?![A-Za-z])|\\not *=", r"\\ne"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\varnothing(?![A-Za-z])|\\\{ *\\\}", r"\\emptyset"),
        (r"\\sqrt *(\w|\\pi)|\\?\bsqrt *\(([^()]*)\)", r"\\sqrt{\1\2}"),
        (r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|pi|theta)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])infinity", r"\\infty"),
        (r"\^ *(?:\\prime|\{ *\\prime *\})", "'"),
        (r"\\(vec|hat|bar|math(?:bb|cal)) *(\w)", r"\\\1{\2}"),
        (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"(\\(?:frac|binom)) *(\w|\\[a-z]+(?![A-Za-z{]))", r"\1{\2}"),
        (r"(\\(?:frac|binom)\{(?:[^{}]|\{[^{}]*\})*\}) *(\w|\\[a-z]+(?![A-Za-z{]))", r"\1{\2}"),
        (r"^\*\*(.*)\*\*$", r"\1"),
        (r"(?<=[\w)}]) *\*\* *(?=[\w({-])", "^"),
        (r"(?<=[\w)}]) *\* *(?=[\w(\\])", r"\\cdot "),
        (r"([\^_]) *\{ *(?:\\text\{ *(\w+) *\}|(\w+|\\circ)) *\}", r"\1{\2\3}"),
        (r"([\^_])(\d+|\w|\\circ)", r"\1{\2}"),
        # Spaces stay between words and numbers only.
        (r" *([^\w\s\\]) *", r"\1"),
        (r"(\\[A-Za-z]+) +(?![A-Za-z])| +(?=\\)|(\\\\) +", r"\1\2"),
        (r"^ +| +$|(?<=[\w})])\.$", ""),
        (r"(?<=\d)(?:\^\{|\\text\{)?(?:st|nd|rd|th)\}?$", ""),
        (r"^\{([^{}]*)\}$", r"\1"),
    )
]  # fmt: skip


@lru_cache(maxsize=4096)  # the samples of a prompt have one label
def plain(latex: str) -> str:
    """Return LaTeX without what changes only its looks."""
    if latex.isdecimal():
        return latex
    latex = latex.translate(_SIGNS)
    for pattern, new in _REWRITES:
        latex = pattern.sub(new, latex)
    return latex


_HOLLOW = re.compile(
    r"\\(?:begin|end)\{\w*\}|\\(?:text|frac|sqrt|[fd]?box(?:ed)?|binom|overline|vec|mathbb)(?![A-Za-z])"
    r"|\\(?![A-Za-z])|[\s{}()\[\].,;:?_^~&$%]"
)


def is_readable(label: str) -> bool:
    """Return False for a label without content, or with braces that do not match."""
    text = plain(label)
    braces = re.sub(r"\\.|[^{}]", "", text)
    while "{}" in braces:
        braces = braces.replace("{}", "")
    return bool(_HOLLOW.sub("", text)) and not braces


# ------------------------------------------------------------------------------- numbers

_WHOLE = r"(?:\d{1,3}(?:[ ,]\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d+)"
_DECIMAL = rf"(?:{_WHOLE}?\.\d+|{_WHOLE}\.?)"
_POWER_OF_TEN = r"10\^\{([-+]?\d+)\}"
_NUMBER = re.compile(
    rf"([-+]*)(?:({_DECIMAL}|\.(?=\\overline))(?:\\overline\{{(\d+)\}})?"
    rf"(?:[eE]([-+]?\d+)|(?:\\times|\\cdot){_POWER_OF_TEN})?"
    rf"|(?:({_WHOLE})[ +]?)?(?:\\frac\{{([-+]?{_DECIMAL})\}}\{{([-+]?{_DECIMAL})\}}"
    rf"|(?<!\d)({_WHOLE})/({_WHOLE}))"
    rf"|{_POWER_OF_TEN})(\\?%)?(?: ?(hundred|thousand|million|billion|trillion))?",
    re.ASCII,
)
_MANY = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LONGEST = 4000  # digits of a number, and its largest exponent


def number(text: str) -> tuple[Fraction, bool] | None:
    """Return the value of a plain number and whether it is a percentage; None for anything else."""
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        return None
    sign, decimal, repeated, e, power, whole, above, below, over, under, ten, percent, many = (
        match.groups()
    )
    exponent = int(e or power or ten or 0)
    if abs(exponent) > _LONGEST:
        return None
    strip = re.compile("[ ,]").sub
    if ten:
        value = Fraction(1)
    elif decimal:
        digits = strip("", decimal)
        value = Fraction(digits if digits != "." else 0)
        if repeated:
            places = len(digits.partition(".")[2])
            value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
    else:
        divisor = Fraction(strip("", below or under))
        if divisor == 0:
            return None
        value = Fraction(strip("", above or over)) / divisor + int(strip("", whole or "0"))
    value *= Fraction(10) ** exponent * _MANY.get(many, 1)
    return (-value if sign.count("-") % 2 else value), bool(percent)


def _close(gold: Fraction, given: Fraction) -> bool:
    """Equal, or one is a decimal that stands for the other, which no decimal can be: 0.333333."""
    if gold == given or is_finite_decimal(gold) == is_finite_decimal(given):
        return gold == given
    return abs(gold - given) <= tolerance(abs(gold))


def tolerance(size: Any) -> Any:
    """How far a decimal may be from a number of this size that it stands for: six digits."""
    least = Fraction(1, 2 * 10**6) if size >= Fraction(1, 100) else 0
    return min(max(size / 10**6, least), Fraction(1, 10**6))


def is_finite_decimal(value: Fraction) -> bool:
    """Whether the decimal expansion ends."""
    return 10 ** value.denominator.bit_length() % value.denominator == 0


# ------------------------------------------------------------------------------- units

_ALIASES = (
    "m meter metre;cm centimeter centimetre;mm millimeter millimetre;km kilometer kilometre;"
    "in inch;ft foot feet;yd yard;mi mile;g gram;kg kilogram kilo;mg milligram;lb pound;oz ounce;"
    "s sec second;min minute;h hr hour;day;week;month;year yr;l liter litre;gal gallon;"
    "ml milliliter millilitre;deg degree;mi/h mph;km/h kmph kph kmh;cent ¢;$ dollar usd;€ euro eur;"
    "£ gbp;¥ yen jpy;"
    "n newton;j joule;w watt;v volt;hz hertz;rad radian;c celsius;f fahrenheit;am a.m a.m.;"
    "pm p.m p.m.;north;south;east;west;up;down;left;right;more;less;increase;decrease;profit;"
    "loss;gain;clockwise;counterclockwise;2 square sq sq. squared;3 cubic cubed"
)
_UNITS = {
    name + end: group.split()[0]
    for group in _ALIASES.split(";")
    for name in group.split()
    for end in (("", "s", "es") if len(name) > 1 else ("",))
    if not name.isdigit()
}
_POWER = r"(?:\^\{?-?\d\}?)?"
_TEXT = rf"\\text\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}{_POWER}"
_PLAIN = rf"(?i:{'|'.join(map(re.escape, sorted(_UNITS, key=len, reverse=True)))}){_POWER}"
_UNIT = re.compile(
    rf"(?<=[\d}})\]a-z%.])(?: ?(?:{_TEXT}|\\frac\{{{_TEXT}\}}\{{{_TEXT}\}}"
    rf"|\^\{{\\circ\}}(?: ?[CF])?|/{_TEXT}|/{_PLAIN}))+$"
    rf"|(?<=[\d}}]) {_PLAIN}(?:(?:/| per | ){_PLAIN})*\.?$"
    r"|(?<=\d)(?i:am|pm|mph|[ckm]m|kg|cents?|¢)$"
    r"|(?<=\d)(?: (?!hundred|thousand|[a-z]+illion|dozen|factorial|squared)[a-z]{2,}){1,4}$"
)
TURNS = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_CURRENCY = re.compile(r"^([-+]?)(\\\$|US\\\$|€|£|\\pounds|¥|₹|\\text\{Rs\.?\}|Rs\.?) ?(?=[\d.])")


def _unit(text: str) -> tuple[str, str | None]:
    """A quantity as its amount and its unit: "" if there is none, None if it is not known."""
    if match := _CURRENCY.match(text):
        name = "$" if "$" in match[2] else re.sub(r"\\text|[{}.]", "", match[2])
        return match[1] + text[match.end() :], name
    match = _UNIT.search(text)
    if match is None or not match.start() or TURNS.search(text):
        return text, ""
    unit = match[0].replace("\\circ", "deg").replace("\\frac", "")
    unit = re.sub(r"\}\{|\bper\b", "/", re.sub(r"\\text", " ", unit)).lower()
    words = re.findall(r"[a-z$€£¢.]+|-?\d|/", unit)
    known = [_UNITS.get(word, word) for word in words]
    if any(w.isalpha() and w not in _UNITS.values() for w in known):
        return text[: match.start()], None
    if known and known[0].isdigit():  # "square cm" as "cm 2"
        known[:2] = known[1::-1]
    return text[: match.start()], " ".join(known).replace("/", " / ").replace("  ", " ")


# ------------------------------------------------------------------------------- forms

_NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_\{\w+\})?(?:\([^()=]*\))?|\\text\{[^{}]*\}|[ '])+"
    r"|\([a-z](?:[,;][a-z])+\)|[^A-Za-z=<>]+"
)
_BASE = re.compile(r"(?:\\text\{)?([0-9A-Z]+)\}?_\{(\d+)\}")
_TIME = re.compile(r"\d{1,2}:[0-5]\d|\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{2,4}")  # or a date
_UNION = re.compile(r"\\cup.*?(?:[<>]|\\[lg]e(?![a-z]))|(?:[<>]|\\[lg]e(?![a-z])).*?\\cup")
_ENVIRONMENT = re.compile(r"\\(?:begin|end|operatorname|mathbb|vec|hat|bar)\{\w*\}")
_LETTERS = re.compile(
    r"\\text|(?<= )[a-z]{2,}(?= )|(?<![\\A-Za-z])(?:[a-z]{4}|[A-Za-z]*(?:[A-Z][a-z]{2}|[A-Z]{2}))"
)


def _split(text: str, marks: str) -> list[str]:
    """`text` at those of `marks` that stand in no brackets; empty if its brackets do not match."""
    parts, depth, place = [""], 0, 0
    while place < len(text):
        sign = text[place : place + 2] if text[place] == "\\" else text[place]
        depth += (sign[-1] in "([{") - (sign[-1] in ")]}")
        if depth < 0:
            return []
        if sign in marks and not depth:
            parts.append("")
        else:
            parts[-1] += sign
        place += len(sign)
    return parts if depth == 0 else []


def _items(text: str) -> tuple[str, list[str]]:
    """Brackets and members of (a, b), [a, b), {a, b} or a bare list, whose brackets are ""."""
    opened = re.match(r"\(|\[|\\\{|\\langle", text)
    closed = re.search(r"(?:\)|\]|\\\}|\\rangle)$", text)
    if opened and closed and opened.end() <= closed.start():
        inner = text[opened.end() : closed.start()]
        members = _split(inner, ";," if ";" not in inner else ";") or [""]
        if len(_split(text, ";,")) == 1 and (len(members) > 1 or opened[0] == "\\{"):
            return opened[0] + closed[0], members
    marked = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "\0", text)
    members = [member.replace("\0", ",") for member in _split(marked, ";,")]
    if len(members) < 2 and text.count("\\pm") == 1 and "\\mp" not in text:
        members = [text.replace("\\pm", "+").lstrip("+"), text.replace("\\pm", "-")]
        members[0] = members[0].replace("=+", "=")
    names = {name for name, equals, _ in (member.partition("=") for member in members) if equals}
    if len(names) == 1 and "=" in members[0] and len(members) > 1:  # x = 1, 2 or x = 1, x = 2
        members = [member.rpartition("=")[2] for member in members]
    return "", [member for member in members if member]


def matches(gold: Sequence[Any], given: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether each member of one has its own equal in the other, in any order."""
    left = list(given)
    for one in gold:
        place = next((i for i, other in enumerate(left) if same(one, other)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _lists_equal(gold: str, given: str) -> bool | None:
    """Judges lists, tuples, sets and intervals by their members; None where neither is one."""
    (kind, members), (other, others) = _items(gold), _items(given)
    sizes = (len(members), len(others))
    if max(sizes) < 2 and not {kind, other} & {"\\{\\}"}:
        return None
    if sizes[0] != sizes[1]:
        return False if min(sizes) > 1 or kind == other else None
    if kind and other and kind != other:
        return False
    if {kind, other} <= {"", "\\{\\}"}:
        return matches(members, others, is_equal)
    return kind == other and all(map(is_equal, members, others))


@lru_cache(maxsize=8192)  # many answers to a prompt are the same
def is_equal(gold: str, given: str) -> bool:
    """Return whether two answers, as `plain` gives them, are the same mathematics."""
    gold, given = _without_names(gold, given)
    if ("\\pmod" in gold) != ("\\pmod" in given):  # 7 is the answer to 7 (mod 12)
        gold, given = gold.partition("\\pmod")[0], given.partition("\\pmod")[0]
    if gold == given:
        return gold != ""
    if not given or not gold:
        return False
    # x < 1 or x > 2 is no list where the other side is a union.
    lists = None if _UNION.search(gold + given) else _lists_equal(gold, given)
    if lists is not None:
        return lists
    (gold, unit), (given, other) = _unit(gold), _unit(given)
    if unit and other and unit != other:
        return False
    if gold == given:
        return True
    one, two = number(gold), number(given)
    if one and two:
        scales = {1} if one[1] == two[1] else {1, 100}
        per_cent, value = (one[0], two[0]) if one[1] else (two[0], one[0])
        return any(_close(value * scale, per_cent) for scale in scales)
    based = [(_BASE.fullmatch(text), text) for text in (gold, given)]
    if based[0][0] or based[1][0]:
        return len({match.groups() if match else (text, "10") for match, text in based}) == 1
    if _TIME.fullmatch(gold) or _TIME.fullmatch(given):
        return False
    if any(_LETTERS.search(_ENVIRONMENT.sub("", text)) for text in (gold, given)):
        return _folded(gold) == _folded(given)
    from torchrft.rewards.math_values import values_equal

    return values_equal(gold, given)


def _without_names(gold: str, given: str) -> tuple[str, str]:
    """Both without "x =" where only one has it or both have the same; a = b = c is a = c."""
    sides = []
    for text in (gold, given):
        parts = _split(text, "=")
        other = re.search(r"\\[gl]e(?![a-z])|\\equiv|\\ne", text)
        if len(parts) == len(_split(text, "=<>,;")) > 1 and not other:
            sides.append(("" if text[:1] == "=" else parts[0], parts[-1]))
        else:
            member = re.fullmatch(r"([A-Za-z])\\in(?![A-Za-z])(.+)", text)
            sides.append((member[1], member[2]) if member else ("", text))
    (name, value), (second, another) = sides
    names = [each.replace(";", ",") for each in (name, second)]
    if names[0] == names[1] or ("" in names and _NAME.fullmatch("".join(names))):
        return value, another
    return gold, given


def _folded(text: str) -> str:
    return re.sub(r"\\text|[\s{}()\\.'\"]", "", text).casefold()
