"""A DeepSpeed configuration, read and judged key by key."""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torchrft.deepspeed.keys import KEYS, SECTIONS

# Sections whose switches DeepSpeed takes in quotes, too.
_QUOTED = ("bf16.", "bfloat16.", "fp16.", "zero_optimization.")


class Judged(NamedTuple):
    """What was set, by dotted name and without null, and a line for each key without effect."""

    values: dict[str, Any]
    notes: list[str]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; the default where it is "auto" or not set."""
        value = self.values.get(name, default)
        return default if value == "auto" else value

    def section(self, name: str) -> dict[str, Any]:
        """What was set below `name`, without "auto"."""
        start = name + "."
        below = {k.removeprefix(start): v for k, v in self.values.items() if k.startswith(start)}
        return {k: v for k, v in below.items() if v != "auto"}


def read_json(config: Mapping[str, Any] | str | Path) -> Judged:
    """Judges a configuration, a dict or a JSON file.

    Raises ValueError for an unknown key, a value that its key does not take, a key that is refused
    and a value without effect.
    """
    values: dict[str, Any] = {}
    notes = []
    whole = config if isinstance(config, Mapping) else _load(Path(config))
    for name, value in _walk(whole, ""):
        key = KEYS[name]
        if isinstance(value, str) and name.startswith(_QUOTED):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if key.disposition == "mapped" and (fault := key.fault(value)):
            raise ValueError(f"DeepSpeed key {name} = {value!r} {fault} ({key.reason})")
        if key.disposition == "refused" and not key.asks_nothing(value):
            raise ValueError(f"DeepSpeed key {name} = {value!r} is not supported: {key.reason}")
        if key.disposition == "meaningless":
            notes.append(f"DeepSpeed key {name} has no effect: {key.reason}")
        if value is not None:
            values[name] = value
    judged = Judged(values, notes)
    _check_effects(judged)
    return judged


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"DeepSpeed config {path} is not a file")
    config = _parse(path)
    if not isinstance(config, Mapping):
        raise ValueError(f"DeepSpeed config {path} must hold a JSON object, {{...}}")
    return config


def _parse(path: Path) -> Any:
    """JSON, or Hjson as DeepSpeed reads it: comments, trailing commas, a byte order mark."""
    try:
        text = path.read_text("utf-8-sig")
        try:
            return json.loads(text, object_pairs_hook=_table)
        except json.JSONDecodeError:
            import hjson

            return hjson.loads(text, object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:  # hjson's errors are of the first kind, too
        raise ValueError(f"DeepSpeed config {path} is no valid JSON: {error}") from error
    except ImportError as error:
        hint = "comments and trailing commas need hjson: pip install 'torchrft[deepspeed]'"
        raise ValueError(f"DeepSpeed config {path} is no valid JSON; {hint}") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:  # Python would take the last one
            raise ValueError(f'the key "{name}" is there more than once in its table; leave one')
    return dict(pairs)


def _walk(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key.startswith(("_", "//", "#")):  # how people write comments into JSON
            continue
        if name == "zero_optimization" and isinstance(value, bool):  # DeepSpeed's first format
            value = {"stage": int(value)}
        if name in KEYS:
            yield name, value
        elif name not in SECTIONS:
            accepted = [known for known in KEYS if KEYS[known].disposition != "refused"]
            near = get_close_matches(name, [*accepted, *SECTIONS], n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ValueError(f'DeepSpeed has no key "{name}"{hint}')
        elif isinstance(value, Mapping):
            yield from _walk(value, name + ".")
        elif value is not None:
            inner = [known for known in KEYS if known.startswith(name + ".")]
            example = f"{name}.enabled" if f"{name}.enabled" in inner else inner[0]
            must = f"must be a table of keys such as {example}"
            raise ValueError(f"DeepSpeed key {name} = {value!r} {must}")


def _check_effects(judged: Judged) -> None:
    """Refuses values that nothing would look at."""
    for name, value in judged.values.items():
        section, is_option, _ = name.partition(".params.")
        untyped = is_option and judged.get(f"{section}.type") is None
        if untyped and KEYS[name].disposition == "mapped" and value != "auto":
            fault = f"has no effect without {section}.type; set that, or leave it out"
            raise ValueError(f"DeepSpeed key {name} = {value!r} {fault}")
    zero = "zero_optimization."
    sharded = [f"{zero}zero_hpz_partition_size", f"{zero}mics_shard_size"]
    sizes = {name: size for name in sharded if (size := judged.get(name, 1)) > 1}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"set {sharded[0]} or {sharded[1]}, not both to different sizes")
    if sizes and (stage := judged.get(f"{zero}stage", 0)) != 3:
        name, size = next(iter(sizes.items()))
        fault = f"has no effect at stage {stage}; use stage 3, or leave it out"
        raise ValueError(f"DeepSpeed key {name} = {size} {fault}")
