"""From a command line to a `JobConfig`: TOML, then flags, then every rule; all faults at once."""

import contextlib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import tomli_w
from pydantic import ValidationError

from torchrft.config.faults import field_fault, key_fault, toml_fault
from torchrft.config.fields import FIELDS, SECTIONS, expected, show
from torchrft.config.flags import Draft, parse
from torchrft.config.help import help_text
from torchrft.config.job import batch_arithmetic, smallest_world_size
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import silent_fields, unmet
from torchrft.config.rules import check, unavailable
from torchrft.config.start import jsonl_rows, lacks_bf16, start_notes, with_precision
from torchrft.tools.text import one_line

__all__ = ["ConfigError", "LoadedConfig", "help_text", "load", "read", "to_toml"]

_MOST_FAULTS = 100  # shown at once


class ConfigError(Exception):
    """A config that cannot run; `faults` says why, one line each, the first few of very many."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = [one_line(fault) for fault in faults[:_MOST_FAULTS]]
        if more := len(faults) - len(self.faults):
            self.faults.append(f"{more} more faults; mend these first")
        super().__init__("\n".join(self.faults))


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config and what is to be said about it.

    `warnings` are unusual values; `notes` (dry run only) what would stop a real run;
    `world_size_source` says where the number of ranks comes from.
    """

    config: JobConfig
    world_size: int
    world_size_source: str
    dry_run: bool
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Filled(NamedTuple):
    """What a further file of options says beside its values: notes, and faults of the whole."""

    notes: list[str]
    faults: Callable[[JobConfig, int], list[str]]


# By the field that names the file: fills a draft from it, for so many data-parallel ranks (None:
# not known). Raises ValueError, in one sentence, for a file that cannot be used.
Sources = Mapping[str, Callable[[str, Draft, int | None], Filled]]
NO_SOURCES: Sources = {}
FILE_FIELDS = ("deepspeed_config",)
Verify = Callable[[JobConfig], list[str]]  # faults that only the parts themselves can find


def read(
    argv: list[str],
    verify: Verify = lambda config: [],
    warn: bool = True,
    sources: Sources = NO_SOURCES,
) -> JobConfig:
    """The front door of the entry point: a config for a real run, or SystemExit.

    Exits with 0 after --help and --dry_run and with 2 after faults, one line each on stderr. In a
    job of several ranks only rank 0 prints.
    """
    if "--help" in argv or "-h" in argv:
        _say([help_text()])
        raise SystemExit(0)
    try:
        loaded = load(argv, sources=sources)
        with contextlib.redirect_stdout(sys.stderr):  # a file of the user's may print
            faults = verify(loaded.config)
        if faults:
            raise ConfigError(faults)
    except ConfigError as error:
        _say([f"error: {fault}" for fault in error.faults], sys.stderr)
        raise SystemExit(2) from None
    if loaded.dry_run:
        _say([dry_run_text(loaded)])
        raise SystemExit(0)
    _say([f"warning: {warning}" for warning in loaded.warnings if warn], sys.stderr)
    return loaded.config


def _say(lines: Iterable[str], file: TextIO | None = None) -> None:
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, file=file)


def check_only(
    argv: list[str], verify: Verify = lambda config: [], sources: Sources = NO_SOURCES
) -> int:
    """Whether the job may start: 0, or 2 after printing faults; 10 after --help or --dry_run.

    For launch.py, which asks before it starts any process. Warnings are left to the job.
    """
    try:
        read(argv, verify, False, sources)
    except SystemExit as done:
        return int(done.code or 0) or 10
    return 0


def load(
    argv: list[str], world_size: int | None = None, sources: Sources = NO_SOURCES
) -> LoadedConfig:
    """Read flags and their TOML and judge them for `world_size` ranks (by default the job's).

    Raises ConfigError with all faults of the TOML, the flags and the rules together.
    """
    draft = parse(argv)
    dry_run, path = draft.values.pop("dry_run", False), draft.values.pop("config_file", None)
    flags, document = dict(draft.values), {}
    if path is not None:
        document = _merge_toml(path, draft)
    given = None if world_size is None else (world_size, "given")
    known = given or _known_world_size(dry_run, draft.faults)
    filled = _read_sources(draft, sources, known)
    config = _build(draft)
    for name in _idle_fields(config, flags, draft, document) & draft.values.keys():
        del draft.values[name]
    config = _build(draft)
    unknown = smallest_world_size(config), "the smallest that fits; set NGPU for another"
    world_size, source = known or unknown
    draft.faults += [fault for file in filled for fault in file.faults(config, world_size)]
    findings, notes = check(config, world_size), unavailable(config)
    errors = findings.errors if dry_run else findings.errors + notes
    if not draft.is_partial:
        # A message about a field whose own value is bad would only confuse; it waits its turn.
        clear = [text for text in errors if draft.spoiled.isdisjoint(re.findall(r"\w+", text))]
        draft.faults += clear
    if draft.faults:
        raise ConfigError(draft.faults)
    warnings = (*findings.warnings, *(note for file in filled for note in file.notes))
    config = with_precision(config, lacks_bf16)
    return LoadedConfig(config, world_size, source, dry_run, warnings, tuple(notes))


def _read_sources(draft: Draft, sources: Sources, known: tuple[int, str] | None) -> list[Filled]:
    """Fills what is not set from the files that fields name."""
    filled = []
    for name in FILE_FIELDS:
        if isinstance(path := draft.values.get(name), str) and path:
            sizes = [draft.values.get(name, 1) for name in ("tp_size", "sp_size")]
            fits = known is not None and all(type(size) is int and size > 0 for size in sizes)
            ranks = known[0] // math.prod(sizes) if known is not None and fits else None
            try:
                if name not in sources:
                    raise ValueError(f"{name} needs a reader; pass torchrft.sources.SOURCES")
                filled.append(sources[name](path, draft, ranks))
            except (OSError, ValueError, RecursionError) as error:
                draft.faults.append(f"{draft.origins[name]}: {error}")
                draft.is_partial = True
    return filled


def _merge_toml(path: str, draft: Draft) -> dict[str, Any]:
    """Fill what no flag has set from a TOML; returns all its values by their fields' names.

    Unknown sections and keys become faults.
    """
    try:
        document = tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        draft.is_partial = True
        draft.refuse(toml_fault(path, error))
        return {}
    values: dict[str, Any] = {}
    for section, table in document.items():
        is_table = isinstance(table, dict)
        if is_table and section in SECTIONS:
            values |= _merge_section(path, section, table, draft)
            continue
        at = f"{path}: [{section}]" if is_table else f"{path}: {section} = {show(table)}"
        if section in SECTIONS:
            draft.refuse(f"{at}: must be a table; write [{section}]")
        else:
            fault, near = key_fault(section, None)
            draft.refuse(f"{at}: {fault}", near, *(table if is_table else ()))
    return values


def _merge_section(path: str, section: str, table: dict[str, Any], draft: Draft) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        at = f"{path}: [{section}] {key} = {show(value)}"
        if key in SECTIONS[section].model_fields:
            draft.put(key, value, at)
            values[key] = value
        else:
            fault, near = key_fault(key, section)
            draft.refuse(f"{at}: {fault}", near)
    return values


def _build(draft: Draft) -> JobConfig:
    """The config of the draft; a bad value is a fault, and its default stands in for the rules."""
    try:
        return _config_of(draft.values)
    except ValidationError as error:
        details = error.errors()
    for number, detail in enumerate(details):
        section, name = map(str, detail["loc"][:2])
        fault = f"[{section}] {name} is missing; set it there or pass --{name} ({expected(name)})"
        is_missing = detail["type"] == "missing" and len(detail["loc"]) == 2
        if not is_missing and number <= _MOST_FAULTS:
            fault = field_fault(name, detail, draft.origins[name])
        # A key that was misspelt or refused elsewhere is not missing as well.
        is_known = is_missing and (draft.is_partial or name in draft.spoiled)
        if not is_known and fault not in draft.faults:
            draft.refuse(fault, name)
        draft.values.pop(name, None)
    stand_ins = {"pretrain": "missing", "train_batch_size": 1, "rollout_batch_size": 1}
    draft.values = stand_ins | draft.values
    return _config_of(draft.values)


def _config_of(values: dict[str, Any]) -> JobConfig:
    tables: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if value is not None:  # which a flag's `none` is: the field stays as if nobody had set it
            tables[FIELDS[name].section][name] = value
    return JobConfig.model_validate(tables)


def _idle_fields(
    config: JobConfig, flags: dict[str, Any], draft: Draft, document: dict[str, Any]
) -> set[str]:
    """Fields that lose their effect by what a flag switches off, as `eval_steps` by `eval_data`.

    What is off is None, false or 0. It is compared with the TOML's value, or else the default; one
    that is off itself counts as on.
    """
    off = {name for name, value in flags.items() if value in (None, False, 0)}
    before = {name: value for name, value in draft.values.items() if name not in off}
    before |= {name: document[name] for name in off & document.keys()}
    values = {name: document.get(name, FIELDS[name].info.default) for name in off}
    on = {name: True for name, value in values.items() if value in (None, False, 0)}
    try:
        return unmet(config) - unmet(_config_of(before), **on) - flags.keys()
    except ValidationError:  # the TOML's value is wrong
        return set()


def _known_world_size(dry_run: bool, faults: list[str]) -> tuple[int, str] | None:
    """The job's ranks: torchrun's, else what run_train.sh would start; a dry run may not know."""
    names = ["WORLD_SIZE"] if "WORLD_SIZE" in os.environ else []
    if dry_run and not names and "NGPU" in os.environ:
        names = ["NGPU", "NNODES"]
    ranks = 1
    for name in names:
        text = os.environ.get(name, "1")
        if re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
            ranks *= int(text)
        else:
            faults.append(f"environment variable {name} = {show(text)}: expected integer > 0")
    if names:
        return ranks, " x ".join(names)
    return None if dry_run else (1, "no torchrun")


def to_toml(config: JobConfig) -> str:
    """The config as TOML that loads to an equal config.

    None is left out, and so are unset fields whose default has no effect in this config: naming
    them would be refused, as naming any option without effect is.
    """
    silent = silent_fields(config)
    tables = config.model_dump(exclude_none=True, exclude=dict.fromkeys(SECTIONS, silent))
    return tomli_w.dumps({section: table for section, table in tables.items() if table})


def dry_run_text(loaded: LoadedConfig) -> str:
    """The resolved TOML, then what follows from it in comments, so that the whole stays TOML."""
    config = loaded.config
    warnings = start_notes(config, jsonl_rows(config), config.training.bf16 and lacks_bf16())
    said = [f"world size = {loaded.world_size} ({loaded.world_size_source})"]
    said += batch_arithmetic(config, loaded.world_size)
    said += [f"warning: {text}" for text in (*loaded.warnings, *warnings)]
    said += [f"note: would stop a real run: {text}" for text in loaded.notes]
    return to_toml(config) + "\n" + "\n".join(f"# {one_line(line)}" for line in said)
