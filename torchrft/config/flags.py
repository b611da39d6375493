"""The command line: `--section.key value`, `--key value`, `--key=value`, and `--help`.

A parser of our own, because every fault of the command line, the TOML and the rules is to be
reported in one go, a line each; argparse and tyro stop at the first. A flag's words become the
value that a TOML would hold. Whether a field takes it is left to the config, as for a TOML.
"""

import json
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torchrft.config.fields import FIELDS, branches, did_you_mean, expected, is_optional, show
from torchrft.tools.text import redact, shorten

# Flags that are no fields, and what they take.
_COMMANDS = {"config_file": "a .toml file", "dry_run": "true or false"}
_NEGATED = {"disable_engine_sleep": "enable_engine_sleep"}
_NAMES = [*FIELDS, *_COMMANDS, *_NEGATED]


@dataclass
class Draft:
    """Values on their way to a config: where each comes from, and which are known to be bad."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    is_partial: bool = False  # a file could not be read, so nothing can be said to be missing

    def put(self, name: str, value: Any, origin: str) -> Any:
        """Sets a field that nobody has set; returns its value."""
        if name not in self.values:
            self.values[name], self.origins[name] = value, origin
        return self.values[name]

    def refuse(self, fault: str, *names: str) -> None:
        """Notes a fault; messages about fields called `names` would only confuse."""
        self.faults.append(fault)
        self.spoiled.update(names)


def parse(argv: list[str]) -> Draft:
    """Read the command line; faults are collected, not raised.

    >>> parse(["--dp_shard", "-1", "--bf16", "--wandb_run_name=7"]).values
    {'dp_shard': -1, 'bf16': True, 'wandb_run_name': '7'}
    """
    draft = Draft()
    for key, words in _grouped(argv, draft):
        text = shorten(redact(" ".join([f"--{key}", *words])), 120)
        section, dot, flag = key.rpartition(".")
        home = FIELDS[flag].section if flag in FIELDS else None
        if flag not in _NAMES or (dot and section != home):
            _refuse_unknown(text, flag, bool(dot), draft)
            continue
        name = _NEGATED.get(flag, flag)
        if name in draft.origins:
            draft.refuse(f"{text}: given twice, first as {draft.origins[name]}", name)
            continue
        draft.origins[name] = text
        try:
            value = _value(name, words)
        except ValueError as error:
            draft.refuse(f"{text}: {error}", name)
        else:
            draft.values[name] = not value if flag in _NEGATED else value
    return draft


def _grouped(argv: list[str], draft: Draft) -> list[tuple[str, list[str]]]:
    """Each flag's key with the words behind it; a word that is behind no flag is a fault."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            key, equals, inline = word[2:].partition("=")
            groups.append((key, [inline] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            draft.refuse(f"{show(word)}: not a flag; write --key {show(word)}")
    return groups


def _refuse_unknown(text: str, flag: str, has_section: bool, draft: Draft) -> None:
    near = did_you_mean(flag, _NAMES)
    positive = re.sub("^(no|disable)[_-]", "", flag)
    hint = "--help lists all flags"
    if positive != flag and positive in FIELDS:
        hint = f"write --{positive} false"
    elif near:  # the very field, if only its section is wrong
        at = f"{FIELDS[near].section}." if has_section and near in FIELDS else ""
        hint = f"did you mean --{at}{near}?"
    draft.refuse(f"{text}: unknown flag; {hint}", near or "")


def kind_of(name: str) -> str:
    """The JSON type that a flag's words are read as."""
    if name in _COMMANDS:
        return "boolean" if name == "dry_run" else "string"
    kinds = {part.get("type", "string") for part in branches(FIELDS[name].schema)}
    return "array" if "array" in kinds else kinds.pop()


def _value(name: str, words: list[str]) -> Any:
    """The words as a TOML would write them; None unsets a field. Raises ValueError for a fault."""
    kind, is_field = kind_of(name), name in FIELDS
    if not words and kind != "boolean":
        want = expected(name) if is_field else _COMMANDS[name]
        raise ValueError(f"its value is missing; expected {want}")
    if [word.lower() for word in words] == ["none"] and is_field and is_optional(name):
        return None
    if kind == "array":
        return _list(name, words)
    if len(words) > 1:
        raise ValueError(f"takes one value; {show(' '.join(words[1:]))} is too much")
    if kind == "boolean":
        word = words[0].lower() if words else "true"
        if word not in ("true", "false"):
            raise ValueError("expected true or false")
        return word == "true"
    return words[0] if kind == "string" else as_value(words[0])


def _as_toml(text: str) -> Any:
    (value,) = tomllib.loads(f"value = {text}").values()  # a line break may begin another key
    return value


def as_value(text: str) -> Any:
    """A value as TOML, JSON or Python write it; other text stays text, for its field to refuse."""
    for read in (_as_toml, json.loads, float):  # only the last reads .5
        with suppress(ValueError, RecursionError):
            return read(text)
    return text


def _list(name: str, words: list[str]) -> Any:
    """A list as TOML, as several words, or separated by commas; one word alone is kept as it is."""
    text = " ".join(words)
    if text.startswith("["):
        return as_value(text)
    if re.search("integer|number", expected(name)):
        inner = re.sub(r"^\((.*)\)$", r"\1", text.strip()).strip()
        return [as_value(word) for word in re.split(r"\s*,\s*|\s+", inner)]
    if len(words) == 1 and "," not in text:
        return words
    return [part.strip() for word in words for part in word.split(",")]
