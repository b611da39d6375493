"""What becomes of every key of DeepSpeed's configuration: the table in deepspeed_keys.toml."""

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from torchrft.config.field_types import NonNegativeInt, PositiveInt, TwoRates

_Amount = Annotated[float, Field(ge=0, lt=math.inf)]
_FromMinus1 = Annotated[int, Field(ge=-1)]
_Adam = Annotated[str, StringConstraints(pattern="(?i)^adamw?$")]
# Accelerate writes infinity for "never".
_Steps = NonNegativeInt | Annotated[float, Field(ge=0)]

TYPES: dict[str, tuple[str, Any]] = {
    "switch": ("true or false", bool),
    "count": ("an integer above 0", PositiveInt),
    "from -1": ("an integer of -1 or more", _FromMinus1),
    "steps": ("a number of 0 or more", _Steps),
    "amount": ("a number of 0 or more", _Amount),
    "betas": ("a list of two numbers from 0 to below 1", TwoRates),
    "adam": ("Adam or AdamW", _Adam),
    # One for every parameter group, or a list with one for each.
    "amounts": ("a number of 0 or more", _Amount | list[_Amount]),
    "counts": ("an integer above 0", PositiveInt | list[PositiveInt]),
}
"""What a mapped key may take, in words and as a type."""


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
    off: Sequence[Any] = ()
    type: str | list[Any] = ""

    def asks_nothing(self, value: Any) -> bool:
        """Whether `value` is the default or turns the feature off."""
        if isinstance(value, dict):
            switches = [*_switches(value)]
            return not value or (bool(switches) and not any(switches))
        is_on = any(value is True for value in self.off)  # false asks for something then
        off = self.off if is_on else (False, *self.off)
        return value in (None, "auto", *off)

    def fault(self, value: Any) -> str | None:
        """What a mapped key's value must be, if it is not; DeepSpeed fills in "auto" itself."""
        if value == "auto" or (value is None and self.type[-1:] == "?"):
            return None
        if isinstance(self.type, list):
            if type(value) in (str, int) and value in self.type:  # not False, though False == 0
                return None
            *most, last = map(repr, self.type)
            return f"must be {', '.join(most)} or {last}"
        words, kind = TYPES[self.type.removesuffix("?")]
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            return f"must be {words}"
        return None


def _switches(table: dict[str, Any]) -> Iterator[bool]:
    """The values of "enabled" in a table; what lies below one that is off does not count."""
    if "enabled" in table:
        yield bool(table["enabled"])
    for inner in table.values() if table.get("enabled", True) else ():
        if isinstance(inner, dict):
            yield from _switches(inner)


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())

KEYS = {
    name: Key(**{field: value for field, value in entry.items() if field != "names"})
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
