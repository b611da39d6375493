"""The command line: `--section.key value`, `--key value`, `--key=value`, and `--help`.

A parser of our own, because every fault of the command line, the TOML and the rules is to be
reported in one go, a line each; argparse and tyro stop at the first. Nothing is validated here: a
word that does not read as its field's type stays text, and the config refuses it.
"""

import json
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torchrft.config.fields import FIELDS, branches, did_you_mean, expected, is_optional, show
from torchrft.tools.text import redact, shorten

_OWN = {"config_file": "string", "dry_run": "boolean"}
_NEGATED = {"disable_engine_sleep": "enable_engine_sleep"}


@dataclass
class Draft:
    """Values on their way to a config: where each comes from, and which are known to be bad."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    is_partial: bool = False  # a file could not be read, so nothing can be said to be missing
    config_file: str | None = None
    dry_run: bool = False

    def put(self, name: str, value: Any, origin: str) -> Any:
        """Sets a field that nobody has set; returns its value."""
        if name not in self.values:
            self.values[name], self.origins[name] = value, origin
        return self.values[name]


def wants_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def parse(argv: list[str]) -> Draft:
    """Read the command line; faults are collected, not raised.

    >>> parse(["--dp_shard", "-1", "--bf16", "--wandb_run_name=7"]).values
    {'dp_shard': -1, 'bf16': True, 'wandb_run_name': '7'}
    """
    draft = Draft()
    typed: dict[str, str] = {}
    for key, words in _grouped(argv, draft.faults):
        text = shorten(redact(" ".join([f"--{key}", *words])), 120)
        name = _resolve(key, text, draft)
        if name is None:
            continue
        target = _NEGATED.get(name, name)
        try:
            if target in typed:
                raise ValueError(f"{text}: given twice, first as {typed[target]}")
            typed[target] = text
            value = _value(target, key, words, text)
        except ValueError as error:
            draft.faults.append(str(error))
            draft.spoiled.add(target)
            continue
        if target in _OWN:
            setattr(draft, target, value)
        else:
            negated = target != name and isinstance(value, bool)
            draft.put(target, not value if negated else value, text)
    return draft


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


def _resolve(key: str, typed: str, draft: Draft) -> str | None:
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
    draft.spoiled.update([near] if near else [])
    draft.faults.append(f"{typed}: unknown flag; {hint}")
    return None


def _value(name: str, key: str, words: list[str], typed: str) -> Any:
    """The value of one flag, None to unset it. Raises ValueError for words that cannot be one."""
    kind = _OWN.get(name) or kind_of(name)
    if not words and kind != "boolean":
        want = "a .toml file" if name == "config_file" else expected(name)
        raise ValueError(f"--{key}: its value is missing; expected {want}")
    if [word.lower() for word in words] == ["none"] and name in FIELDS and is_optional(name):
        return None
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
    """A value as TOML or JSON writes it; other text stays text, for its field to refuse."""
    for read in (lambda: tomllib.loads(f"value = {text}")["value"], lambda: json.loads(text)):
        with suppress(ValueError, RecursionError):
            return read()
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
