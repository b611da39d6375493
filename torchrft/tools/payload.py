"""JSON and gzip that come from outside, read within bounds."""

import json
import zlib
from typing import Any

DEEPEST = 64
"""Lists and objects within each other, of labels and other columns of a row."""


def parse(content: str | bytes | bytearray) -> Any:
    """The value of JSON text. Raises ValueError for anything else, however deeply nested."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_deeper(value: Any, limit: int = DEEPEST) -> bool:
    """Whether lists and objects lie more than `limit` deep within each other: what copies, sends or
    prints them may end in a RecursionError."""
    level = [value]
    for _ in range(limit + 1):
        level = [one for one in level if isinstance(one, list | dict)]
        level = [v for one in level for v in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def branches(text: bytes, most: int, most_values: int) -> int:
    """How many lists, objects and keys JSON text has: what it takes to parse it, told beforehand.

    Raises ValueError for more than `most`, or `most_values` values, and for what is not UTF-8.
    """
    if b"\0" in text:  # as in UTF-16, whose marks are not found below
        raise ValueError("no JSON in UTF-8")
    parts = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', most_values)
    outside = b"".join(parts[::2])  # of strings
    count = sum(map(outside.count, b"[{:"))
    if count > most or len(parts) + outside.count(b",") > most_values:
        raise ValueError(f"JSON of more than {most} lists and keys, or {most_values} values")
    return count


def gunzip(data: bytes, limit: int) -> bytes:
    """The bytes that `data` is the gzip of. Raises ValueError if it is none, or beyond `limit`."""
    try:
        unzip = zlib.decompressobj(wbits=31)
        content = unzip.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"no valid gzip: {error}") from None
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes when decompressed")
    if not unzip.eof or unzip.unused_data:
        raise ValueError("no valid gzip: it ends early or late")
    return content
