"""From a command line to a `JobConfig`: TOML, then flags, then every rule; all faults at once."""

import contextlib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import tomli_w
from pydantic import ValidationError

from torchrft.config.availability import missing, unavailable
from torchrft.config.deepspeed_fields import accumulation_fault, merge, wanted
from torchrft.config.deepspeed_json import Judged, read_json
from torchrft.config.faults import field_fault, toml_fault
from torchrft.config.fields import FIELDS, SECTIONS, did_you_mean, expected, show
from torchrft.config.flags import Draft, parse, wants_help
from torchrft.config.help import help_text
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import idle_fields, silent_fields
from torchrft.config.start import jsonl_rows, lacks_bf16, start_notes, with_precision
from torchrft.config.validation import batch_arithmetic, check, data_parallel, smallest_world_size
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


Verify = Callable[[JobConfig], list[str]]  # faults that only the parts themselves can find


def read(argv: list[str], verify: Verify = lambda config: []) -> JobConfig:
    """The front door of the entry point: a config for a real run, or SystemExit.

    Exits with 0 after --help and --dry_run and with 2 after faults, one line each on stderr. In a
    job of several ranks only rank 0 prints.
    """
    if wants_help(argv):
        _say([help_text()])
        raise SystemExit(0)
    loaded = _load_or_exit(argv, verify)
    if loaded.dry_run:
        _say([dry_run_text(loaded)])
        raise SystemExit(0)
    _say([f"warning: {warning}" for warning in loaded.warnings], sys.stderr)
    return loaded.config


def _say(lines: Iterable[str], file: TextIO | None = None) -> None:
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, file=file)


def check_only(argv: list[str], verify: Verify = lambda config: []) -> int:
    """Whether the job may start: 0, or 2 after printing faults; 10 after --help or --dry_run.

    For launch.py, which asks before it starts any process. Warnings are left to the job.
    """
    try:
        if wants_help(argv) or parse(argv).dry_run:
            read(argv, verify)  # which ends in SystemExit
        _load_or_exit(argv, verify)
    except SystemExit as done:
        return int(done.code or 0) or 10
    return 0


def _load_or_exit(argv: list[str], verify: Verify) -> LoadedConfig:
    try:
        loaded = load(argv)
        with contextlib.redirect_stdout(sys.stderr):  # a file of the user's may print
            faults = verify(loaded.config)
        if faults:
            raise ConfigError(faults)
        return loaded
    except ConfigError as error:
        _say([f"error: {fault}" for fault in error.faults], sys.stderr)
        raise SystemExit(2) from None


def load(argv: list[str], world_size: int | None = None) -> LoadedConfig:
    """Read flags and their TOML and judge them for `world_size` ranks (by default the job's).

    Raises ConfigError with all faults of the TOML, the flags and the rules together.
    """
    draft = parse(argv)
    flags = dict(draft.values)
    if draft.config_file is not None:
        _merge_toml(draft.config_file, draft)
    given = None if world_size is None else (world_size, "given")
    known = given or _known_world_size(draft.dry_run, draft.faults)
    judged = _merge_deepspeed(draft, known)
    config = _build(draft)
    if idle := idle_fields(config, flags) & draft.values.keys():
        draft.values = {key: draft.values[key] for key in draft.values.keys() - idle}
        config = _build(draft)
    unknown = smallest_world_size(config), "the smallest that fits; set NGPU for another"
    world_size, source = known or unknown
    if judged is not None:
        dp = max(data_parallel(config, world_size), 1)
        draft.faults += accumulation_fault(judged, config, dp)
    findings = check(config, world_size)
    notes = unavailable(config) + missing(config)
    errors = findings.errors if draft.dry_run else findings.errors + notes
    if not draft.is_partial:
        # A message about a field whose own value is bad would only confuse; it waits its turn.
        clear = [text for text in errors if draft.spoiled.isdisjoint(re.findall(r"\w+", text))]
        draft.faults += clear
    if draft.faults:
        raise ConfigError(draft.faults)
    config = with_precision(config, lacks_bf16)
    warnings = (*findings.warnings, *(judged.notes if judged else ()))
    return LoadedConfig(config, world_size, source, draft.dry_run, warnings, tuple(notes))


def _merge_deepspeed(draft: Draft, known: tuple[int, str] | None) -> Judged | None:
    """Fill what is not set from the DeepSpeed JSON, if there is one."""
    path = draft.values.get("deepspeed_config")
    if not isinstance(path, str) or not path:
        return None
    sizes = [draft.values.get(name, 1) for name in ("tp_size", "sp_size")]
    fits = known is not None and all(type(size) is int and size > 0 for size in sizes)
    ranks = known[0] // math.prod(sizes) if known is not None and fits else None
    try:
        judged = read_json(path)
        found = list(wanted(judged, ranks))
    except (OSError, ValueError, RecursionError) as error:
        draft.faults.append(f"{draft.origins['deepspeed_config']}: {error}")
        draft.is_partial = True
        return None
    merge(path, found, draft)
    return judged


def _merge_toml(path: str, draft: Draft) -> None:
    """Add a TOML file's values to the draft; unknown sections and keys become faults."""
    try:
        document = tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        draft.is_partial = True
        draft.faults.append(toml_fault(path, error))
        return
    for section, table in document.items():
        what = f"{section} = {show(table)}"
        if section in SECTIONS and isinstance(table, dict):
            for key, value in table.items():
                _place(path, section, key, value, draft)
            continue
        if section in SECTIONS:
            fault = f"{what}: must be a table; write [{section}]"
        elif section in FIELDS:
            fault = f"{what}: outside its section; put it under [{FIELDS[section].section}]"
            draft.spoiled.add(section)
        else:
            near = did_you_mean(section, SECTIONS)
            hint = f"did you mean [{near}]?" if near else "valid: " + ", ".join(SECTIONS)
            is_table = isinstance(table, dict)
            fault = f"{f'[{section}]' if is_table else what}: unknown section; {hint}"
            draft.spoiled.update(table if is_table else [])
        draft.faults.append(f"{path}: {fault}")


def _place(path: str, section: str, key: str, value: Any, draft: Draft) -> None:
    """Put one key of the TOML into the draft, or note that there is no such key."""
    at = f"{path}: [{section}] {key} = {show(value)}"
    if key in FIELDS and FIELDS[key].section == section:
        draft.put(key, value, at)
        return
    if key in FIELDS:
        hint = f"it belongs under [{FIELDS[key].section}]"
        draft.spoiled.add(key)
    elif near := did_you_mean(key, SECTIONS[section].model_fields) or did_you_mean(key, FIELDS):
        home = FIELDS[near].section
        hint = f"did you mean {near}{'' if home == section else f' under [{home}]'}?"
        draft.spoiled.add(near)
    else:
        hint = "valid: " + ", ".join(SECTIONS[section].model_fields)
    draft.faults.append(f"{at}: unknown key; {hint}")


def _build(draft: Draft) -> JobConfig:
    """Validate field by field; where a value is bad its default stands in, to check the rest."""
    try:
        return _made(draft.values)
    except ValidationError as error:
        for detail in error.errors():
            section, key = str(detail["loc"][0]), str(detail["loc"][1])
            if len(draft.faults) > _MOST_FAULTS and key not in draft.values:
                continue  # a list of very many wrong entries
            if detail["type"] == "missing" and len(detail["loc"]) == 2:
                fault = f"[{section}] {key} is missing; set it there or pass --{key} "
                fault += f"({expected(key)})"
                # A key that was misspelt or refused elsewhere is not missing as well.
                is_known = draft.is_partial or key in draft.spoiled
            else:
                fault = field_fault(key, detail, draft.origins[key])
                is_known = fault in draft.faults
            draft.faults += [] if is_known else [fault]
            draft.spoiled.add(key)
            draft.values.pop(key, None)
    for name, entry in FIELDS.items():
        if entry.info.is_required():
            draft.values.setdefault(name, 1 if name != "pretrain" else "missing")
    return _made(draft.values)


def _made(values: dict[str, Any]) -> JobConfig:
    tables: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if value is not None:  # which a flag's `none` is: the field stays as if nobody had set it
            tables[FIELDS[name].section][name] = value
    return JobConfig.model_validate(tables)


def _known_world_size(dry_run: bool, faults: list[str]) -> tuple[int, str] | None:
    """The job's ranks: torchrun's, else what run_train.sh would start; a dry run may not know."""
    if "WORLD_SIZE" in os.environ:
        return _count("WORLD_SIZE", faults), "WORLD_SIZE"
    if dry_run and "NGPU" in os.environ:
        return _count("NGPU", faults) * _count("NNODES", faults), "NGPU x NNODES"
    return None if dry_run else (1, "no torchrun")


def _count(variable: str, faults: list[str]) -> int:
    text = os.environ.get(variable, "1")
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        return int(text)
    faults.append(f"environment variable {variable} = {show(text)}: expected integer > 0")
    return 1


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
