"""The command line: `--section.key value`, `--key value`, `--key=value`, and `--help`.

A parser of our own, because every fault of the command line, the TOML and the rules is to be
reported in one go, a line each; argparse and tyro stop at the first. Nothing is validated here: a
word that does not read as its field's type stays text, and the config refuses it.
"""

import difflib
import re
import textwrap
import tomllib
from dataclasses import dataclass, field
from typing import Any

from torchrft.config.fields import (
    FIELDS,
    SECTIONS,
    branches,
    choices,
    default_text,
    did_you_mean,
    expected,
    show,
)

_OWN = ("config_file", "dry_run", "help")
_NEGATED = {"disable_engine_sleep": "enable_engine_sleep"}
# What papers call some presets; only for suggestions.
_COMMON_NAMES = {"grpo": "group_norm", "ppo": "gae", "reinforce++": "reinforce_plus_plus"}

USAGE = """\
usage: python -m torchrft.train [--config_file FILE.toml] [--KEY VALUE | --SECTION.KEY VALUE] ...

  --config_file FILE.toml  read this file; flags override it
  --dry_run                validate, print the resolved TOML and the batch arithmetic, and exit
  --help, -h               print this and exit

Switches may stand alone (--bf16) or take true or false (--bf16 false). Lists take several words,
comma-separated values, or TOML: --stop '["a,b"]'.
"""


@dataclass
class Flags:
    """What the command line says: values by field name, and each field as it was typed."""

    values: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    config_file: str | None = None
    dry_run: bool = False


def wants_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def parse(argv: list[str]) -> Flags:
    """Read the command line; faults are collected, not raised.

    >>> parse(["--dp_shard", "-1", "--bf16", "--wandb_run_name=7"]).values
    {'dp_shard': -1, 'bf16': True, 'wandb_run_name': '7'}
    """
    flags = Flags()
    for key, words in _grouped(argv, flags.faults):
        typed = " ".join([f"--{key}", *words])
        typed = typed if len(typed) <= 120 else typed[:117] + "..."
        name = _resolve(key, typed, flags)
        if name is None:
            continue
        target = _NEGATED.get(name, name)
        try:
            if target in flags.typed:
                raise ValueError(f"{typed}: given twice, first as {flags.typed[target]}")
            flags.typed[target] = typed
            value = _value(target, key, words, typed)
        except ValueError as error:
            flags.faults.append(str(error))
            flags.spoiled.add(target)
            continue
        negated = name in _NEGATED and isinstance(value, bool)
        flags.values[target] = not value if negated else value
    flags.config_file = flags.values.pop("config_file", None)
    flags.dry_run = flags.values.pop("dry_run", False)
    return flags


def _grouped(argv: list[str], faults: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag's key with the words behind it; a word that is behind no flag is a fault."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            key, equals, inline = word[2:].partition("=")
            groups.append((key, [inline] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            faults.append(f"{show(word)}: not a flag; write --key {show(word)}")
    return groups


def _resolve(key: str, typed: str, flags: Flags) -> str | None:
    """The field (or own flag) that `key` names, or None after noting a fault."""
    section, dot, name = key.rpartition(".")
    if not dot and (key in FIELDS or key in _OWN or key in _NEGATED):
        return key
    if dot and name in FIELDS and FIELDS[name].section == section:
        return name
    near = did_you_mean(name, [*FIELDS, *_OWN, *_NEGATED])
    negated = re.sub("^(no|disable)[_-]", "", name)
    if negated != name and negated in FIELDS:
        hint = f"write --{negated} false"
    elif near:  # the very field, if only its section is wrong
        at = f"{FIELDS[near].section}." if dot and near in FIELDS else ""
        hint = f"did you mean --{at}{near}?"
    else:
        hint = "--help lists all flags"
    flags.spoiled.update([near] if near else [])
    flags.faults.append(f"{typed}: unknown flag; {hint}")
    return None


def _value(name: str, key: str, words: list[str], typed: str) -> Any:
    """The value of one flag. Raises ValueError for words that cannot be one."""
    kind = {"config_file": "string", "dry_run": "boolean"}.get(name) or kind_of(name)
    if not words and kind != "boolean":
        want = "a .toml file" if name == "config_file" else expected(name)
        raise ValueError(f"--{key}: its value is missing; expected {want}")
    if kind == "array":
        return _list(name, words)
    if len(words) > 1:
        raise ValueError(f"{typed}: takes one value; {show(' '.join(words[1:]))} is too much")
    value = _scalar(kind, words[0] if words else "true")
    if name == "dry_run" and not isinstance(value, bool):
        raise ValueError(f"{typed}: expected true or false")
    return value


def kind_of(name: str) -> str:
    """The JSON type that a field's flag is read as."""
    kinds = {part.get("type", "string") for part in branches(FIELDS[name].schema)}
    return "array" if "array" in kinds else kinds.pop()


def _scalar(kind: str, text: str) -> Any:
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind == "integer":
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,300}", text) else text
    if kind == "number":
        try:
            return float(text)
        except ValueError:
            return text
    if kind == "object" and text.lstrip().startswith("{"):
        return _toml(text)
    return text


def _toml(text: str) -> Any:
    """A value as TOML writes it; text that is none stays text, for its field to refuse."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _list(name: str, words: list[str]) -> Any:
    """A list as TOML, as several words, or separated by commas; one word alone is kept as it is."""
    if words[0].startswith("["):
        return _toml(" ".join(words))
    array = next(part for part in branches(FIELDS[name].schema) if part.get("type") == "array")
    item = array["prefixItems"][0] if "prefixItems" in array else array["items"]
    if item.get("type") in ("integer", "number"):
        inner = re.sub(r"^\((.*)\)$", r"\1", " ".join(words).strip())
        return [_scalar(item["type"], part) for part in re.split(r"\s*,\s*|\s+", inner.strip())]
    if len(words) == 1 and "," not in words[0]:
        return words
    return [part.strip() for word in words for part in word.split(",")]


def help_text() -> str:
    """All fields by section, with what they accept, their default and their text."""
    lines = [USAGE]
    width = max(map(len, FIELDS)) + 4
    for section, model in SECTIONS.items():
        lines.append(f"[{section}]  {model.__doc__}")
        for name, entry in FIELDS.items():
            if entry.section != section:
                continue
            doc = " ".join((entry.info.description or "").split())
            body = f"{doc} ({expected(name)}; {default_text(name)})"
            wrapped = textwrap.wrap(body, 100 - width - 2, break_long_words=False)
            lines += [
                f"  {'--' + name if first else '':<{width}}{text}".rstrip()
                for first, text in zip([True] + [False] * len(wrapped), wrapped, strict=False)
            ]
        lines.append("")
    return "\n".join(lines)


def nearest_choice(name: str, value: Any) -> str | None:
    """The choice of field `name` that a wrong value probably meant."""
    word = _COMMON_NAMES.get(str(value).lower(), str(value).lower())
    near = difflib.get_close_matches(word, choices(name), n=1, cutoff=0.6)
    return near[0] if near else None
