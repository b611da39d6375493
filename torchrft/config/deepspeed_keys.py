"""What becomes of every key of DeepSpeed's configuration: the table in deepspeed_keys.toml."""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple


def _integer(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _per_group(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A value for every parameter group, or a list with one for each."""
    return lambda value: all(map(accepts, value)) if isinstance(value, list) else accepts(value)


TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "switch": ("true or false", lambda value: type(value) is bool),
    "count": ("an integer above 0", lambda value: _integer(value, 1)),
    "from -1": ("an integer of -1 or more", lambda value: _integer(value, -1)),
    # Accelerate writes infinity for "never".
    "steps": ("an integer of 0 or more", lambda value: _integer(value, 0) or value == math.inf),
    "amount": ("a number of 0 or more", _amount),
    "betas": (
        "a list of two numbers from 0 to below 1",
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(_amount(beta) and beta < 1 for beta in value)
        ),
    ),
    "adam": ("Adam or AdamW", lambda value: str(value).lower() in ("adam", "adamw")),
    "amounts": ("a number of 0 or more", _per_group(_amount)),
    "counts": ("an integer above 0", _per_group(lambda value: _integer(value, 1))),
    "sizes": ("an integer of 0 or more", _per_group(lambda value: _integer(value, 0))),
}
"""What a mapped key may take: in words, and as a function that says whether a value fits."""


class Key(NamedTuple):
    """What a key does here, why, which values of a refused key ask for nothing, and what a mapped
    key takes.

    >>> Key("refused", "there is no loss scaling", (1,)).asks_nothing(1)
    True
    >>> Key("mapped", "", (), "count?").fault(0)
    'must be an integer above 0'
    """

    disposition: Literal["mapped", "meaningless", "refused"]
    reason: str
    off: tuple[Any, ...] = ()
    type: str | list[Any] = ""

    def asks_nothing(self, value: Any) -> bool:
        """Whether `value` is the default or turns the feature off."""
        if isinstance(value, dict):
            return not value or value.get("enabled", True) is False
        return value in (None, False, "auto", *self.off)

    def fault(self, value: Any) -> str | None:
        """What a mapped key's value must be, if it is not; DeepSpeed fills in "auto" itself."""
        if value == "auto" or (value is None and self.type[-1:] == "?"):
            return None
        if isinstance(self.type, list):
            if type(value) in (str, int) and value in self.type:  # not False, though False == 0
                return None
            *most, last = map(repr, self.type)
            return f"must be {', '.join(most)} or {last}"
        words, accepts = TYPES[self.type.removesuffix("?")]
        return None if accepts(value) else f"must be {words}"


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())

KEYS = {
    name: Key(
        entry["disposition"], entry["reason"], tuple(entry.get("off", ())), entry.get("type", "")
    )
    for entry in _TABLE["key"]
    for name in entry["names"]
}
"""By dotted name. A dictionary under a name without further parts is not looked into."""

TRAINER: dict[str, dict[str, Any]] = _TABLE["trainer"]
"""What the trainer makes of mapped keys: "fields", "only" and "elsewhere"."""

SECTIONS = {
    ".".join(name.split(".")[:depth]) for name in KEYS for depth in range(1, name.count(".") + 1)
}
"""Names that hold a dictionary of further keys."""
