"""What adapters of other libraries share."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torchrft.environments.protocol import Message


def from_user(text: str) -> tuple[Message, ...]:
    """One message of the role user."""
    return ({"role": "user", "content": text},)


def task_seed(row: Mapping[str, Any], seed: int) -> int:
    """The row's column "seed", else the episode's seed; below 2**31, as old generators take it."""
    chosen = row.get("seed", seed)
    if not isinstance(chosen, int):
        raise ValueError(f'the column "seed" holds {chosen!r}, no whole number')
    return chosen % 2**31


def known(what: str, name: str, names: Iterable[str]) -> str:
    """The `name` if it is one of `names`. Raises ValueError with those that come near."""
    valid = sorted(names)
    if name in valid:
        return name
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5) or valid[:8]
    raise ValueError(f"{what} has no {name!r}; it has {', '.join(near) or 'none'}, for example")
