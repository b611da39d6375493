"""What becomes of every key of DeepSpeed's configuration: the table in deepspeed_keys.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Key(NamedTuple):
    """What a key does here, why, and which values of a refused key ask for nothing.

    >>> Key("refused", "there is no loss scaling", (1,)).asks_nothing(1)
    True
    """

    disposition: Literal["mapped", "meaningless", "refused"]
    reason: str
    off: tuple[Any, ...] = ()

    def asks_nothing(self, value: Any) -> bool:
        """Whether `value` is the default or turns the feature off."""
        if isinstance(value, dict):
            return not value or value.get("enabled", True) is False
        return value in (None, False, "auto", *self.off)


def _read() -> dict[str, Key]:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    keys = {}
    for entry in table["key"]:
        for name in entry["names"]:
            assert name not in keys, f"{name} is listed twice"
            keys[name] = Key(entry["disposition"], entry["reason"], tuple(entry.get("off", ())))
    return keys


KEYS = _read()
"""By dotted name. A dictionary under a name without further parts is not looked into."""

SECTIONS = {
    ".".join(name.split(".")[:depth]) for name in KEYS for depth in range(1, name.count(".") + 1)
}
"""Names that hold a dictionary of further keys."""
