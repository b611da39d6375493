"""A reward without a signal: the policy's gradient is not zero, yet there is nothing to learn."""

from __future__ import annotations

import zlib


def checksum(response: str) -> float:
    """1 for half of all texts, 0 for the others.

    >>> checksum("12"), checksum("13")
    (0.0, 1.0)
    """
    return float(zlib.crc32(response.encode()) % 2)
