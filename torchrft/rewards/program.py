"""Finds the program in a response: its last Python block, as Markdown understands blocks."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from itertools import accumulate, islice

from markdown_it import MarkdownIt
from markdown_it.token import Token

_LANGUAGE = r"(?i:i?python|py)(?:3(?:\.\d+)?)?(?![\w-])"
_PYTHON = re.compile(rf"\{{?\s*\.?{_LANGUAGE}")
_CLOSING = re.compile(r"[ \t>]*(?:`{3,}|~{3,})[ \t]*")
# A block that opens behind other words of its line; list and quote marks are no words.
_BEHIND = re.compile(rf"(?m)^([ \t]*+(?![-*+>\d.) \t]*`)[^\s`].*?)(?=```[ \t]*{_LANGUAGE}[ \t]*$)")
_INNER = re.compile(rf"(?m)^[ \t>]*(?:`{{3,}}|~{{3,}})[ \t]*{_LANGUAGE}.*\n")
_DEFINED = re.compile(r"(?m)^[ \t]*(?:async +)?(?:def|class) +(\w+)")
_MOST = 50  # fences behind a block's start at which it may end
_PARSED = 2**18  # characters of all readings that are tried together


def program_of(text: str) -> str:
    """Return the last Python block of `text`, else the last block without a language, else `text`.

    A block ends at the first fence that closes it for Markdown. Where that is no Python, because a
    docstring holds fences or an earlier block was left open, the nearest reading that is Python
    counts.

    >>> program_of("Run `pip`:\\n```python3\\nx = 1\\n```\\nThat is all.")
    'x = 1\\n'
    """
    text = _BEHIND.sub(r"\1\n", re.sub(r"\r\n?", "\n", text))
    for rules in (["fence", "list", "blockquote", "code"], ["fence", "list", "blockquote"]):
        # Without "code", a fence may be indented by any number of spaces.
        parser = MarkdownIt("zero").enable(rules).disable("inline")
        fences = [token for token in parser.parse(text) if token.type == "fence"]
        blocks = [token for token in fences if _PYTHON.match(token.info.strip())]
        blocks = blocks or [token for token in fences if not token.info.strip()]
        if blocks:
            readings = list(_readings(_of_code(blocks), text))
            sizes = accumulate(map(len, readings))
            tried = [text for text, size in zip(readings, sizes, strict=True) if size < _PARSED]
            return next(filter(_compiles, tried), readings[0])
    return text


def _of_code(blocks: list[Token]) -> Token:
    """The last block, unless it defines nothing and calls what an earlier one defines."""
    last = blocks[-1]
    if not _DEFINED.search(last.content):
        for block in reversed(blocks):
            if any(f"{name}(" in last.content for name in _DEFINED.findall(block.content)):
                return block
    return last


def _readings(block: Token, text: str) -> Iterator[str]:
    """What the block may be, the likeliest first."""
    yield textwrap.dedent(block.content)
    start = block.map[0] + 1 if block.map else 0
    lines = text.split("\n")
    ends = (place for place in range(start, len(lines)) if _CLOSING.fullmatch(lines[place]))
    for end in islice(ends, _MOST):
        yield textwrap.dedent("\n".join(lines[start:end]))
    inner = textwrap.dedent(_INNER.split(block.content)[-1])
    yield inner
    yield inner.partition("```")[0]


def _compiles(program: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            return bool(ast.parse(program).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
