"""From a command line to a `JobConfig`: TOML, then flags, then every rule; all faults at once."""

import contextlib
import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from torchrft.config import flags as command_line
from torchrft.config.availability import missing, unavailable
from torchrft.config.deepspeed_fields import accumulation_fault, merge, wanted
from torchrft.config.deepspeed_json import Judged, read_json
from torchrft.config.fields import FIELDS, SECTIONS, did_you_mean, expected, one_line, show
from torchrft.config.flags import help_text, nearest_choice
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import silent_fields
from torchrft.config.reward_config import TABLES
from torchrft.config.validation import batch_arithmetic, check, data_parallel, smallest_world_size

__all__ = ["ConfigError", "LoadedConfig", "help_text", "load", "read", "to_toml"]


class ConfigError(Exception):
    """A config that cannot run; `faults` says why, one line each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = [one_line(fault) for fault in faults]
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


@dataclass
class _Draft:
    """Values on their way to a config: where each comes from, and which are known to be bad."""

    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {s: {} for s in SECTIONS})
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    is_partial: bool = False  # the TOML could not be read, so nothing can be said to be missing


Verify = Callable[[JobConfig], list[str]]  # faults that only the parts themselves can find


def read(argv: list[str], verify: Verify = lambda config: []) -> JobConfig:
    """The front door of the entry point: a config for a real run, or SystemExit.

    Exits with 0 after --help and --dry_run and with 2 after faults, one line each on stderr. In a
    job of several ranks only rank 0 prints.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    if command_line.wants_help(argv):
        if speaks:
            print(help_text())
        raise SystemExit(0)
    loaded = _load_or_exit(argv, speaks, verify)
    if loaded.dry_run:
        if speaks:
            print(dry_run_text(loaded))
        raise SystemExit(0)
    if speaks:
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return loaded.config


def check_only(argv: list[str], verify: Verify = lambda config: []) -> int:
    """Whether the job may start: 0, or 2 after printing faults; 10 after --help or --dry_run.

    For run_train.sh, which asks before it starts any process. Warnings are left to the job.
    """
    try:
        if command_line.wants_help(argv) or command_line.parse(argv).dry_run:
            read(argv, verify)  # which ends in SystemExit
        _load_or_exit(argv, True, verify)
    except SystemExit as done:
        return int(done.code or 0) or 10
    return 0


def _load_or_exit(argv: list[str], speaks: bool, verify: Verify) -> LoadedConfig:
    try:
        loaded = load(argv)
        with contextlib.redirect_stdout(sys.stderr):  # a file of the user's may print
            faults = verify(loaded.config)
        if faults:
            raise ConfigError(faults)
        return loaded
    except ConfigError as error:
        for fault in error.faults if speaks else []:
            print(f"error: {fault}", file=sys.stderr)
        raise SystemExit(2) from None


def load(argv: list[str], world_size: int | None = None) -> LoadedConfig:
    """Read flags and their TOML and judge them for `world_size` ranks (by default the job's).

    Raises ConfigError with all faults of the TOML, the flags and the rules together.
    """
    flags = command_line.parse(argv)
    draft = _Draft(faults=list(flags.faults), spoiled=set(flags.spoiled))
    if flags.config_file is not None:
        _merge_toml(flags.config_file, draft)
    for name, value in flags.values.items():
        draft.values[FIELDS[name].section][name] = value
        draft.origins[name] = flags.typed[name]
    given = None if world_size is None else (world_size, "given")
    known = given or _known_world_size(flags.dry_run, draft.faults)
    judged = _merge_deepspeed(draft, known)
    config = _build(draft)
    unknown = smallest_world_size(config), "the smallest that fits; set NGPU for another"
    world_size, source = known or unknown
    if judged is not None:
        dp = max(data_parallel(config, world_size), 1)
        draft.faults += accumulation_fault(judged, config, dp)
    findings = check(config, world_size)
    notes = unavailable(config) + missing(config)
    errors = findings.errors if flags.dry_run else findings.errors + notes
    if not draft.is_partial:
        # A message about a field whose own value is bad would only confuse; it waits its turn.
        draft.faults += [
            text for text in errors if draft.spoiled.isdisjoint(re.findall(r"\w+", text))
        ]
    if draft.faults:
        raise ConfigError(draft.faults)
    warnings = (*findings.warnings, *(judged.notes if judged else ()))
    return LoadedConfig(config, world_size, source, flags.dry_run, warnings, tuple(notes))


def _merge_deepspeed(draft: _Draft, known: tuple[int, str] | None) -> Judged | None:
    """Fill what is not set from the DeepSpeed JSON, if there is one."""
    path = draft.values["parallel"].get("deepspeed_config")
    if not isinstance(path, str) or not path:
        return None
    sizes = [draft.values["parallel"].get(name, 1) for name in ("tp_size", "sp_size")]
    fits = known is not None and all(type(size) is int and size > 0 for size in sizes)
    ranks = known[0] // math.prod(sizes) if known is not None and fits else None
    try:
        judged = read_json(path)
        found = list(wanted(judged, ranks))
    except (OSError, ValueError, RecursionError) as error:
        draft.faults.append(f"{draft.origins['deepspeed_config']}: {error}")
        draft.is_partial = True
        return None
    draft.faults += merge(path, found, draft.values, draft.origins)
    return judged


def _merge_toml(path: str, draft: _Draft) -> None:
    """Add a TOML file's values to the draft; unknown sections and keys become faults."""
    try:
        document = tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        draft.is_partial = True
        draft.faults.append(_toml_fault(path, error))
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
            if isinstance(table, dict):
                what = f"[{section}]"
                draft.spoiled.update(table)
            near = did_you_mean(section, SECTIONS)
            hint = f"did you mean [{near}]?" if near else "valid: " + ", ".join(SECTIONS)
            fault = f"{what}: unknown section; {hint}"
        draft.faults.append(f"{path}: {fault}")


def _toml_fault(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        siblings = [str(found) for found in Path(path).parent.glob("*.toml")]
        near = difflib.get_close_matches(str(Path(path)), siblings, n=1)
        hint = f"did you mean {near[0]}?" if near else "give the path of a .toml file"
        return f"--config_file {path}: no such file; {hint}"
    if isinstance(error, OSError):
        return f"--config_file {path}: cannot be read ({error.strerror}); give a .toml file"
    if isinstance(error, UnicodeDecodeError):
        return f"--config_file {path}: is not UTF-8 text at byte {error.start}; save it as UTF-8"
    at = re.search(r"at line (\d+)", str(error))
    if at:
        line = Path(path).read_text(errors="replace").split("\n")[int(at[1]) - 1]
        return f"{path}: line {at[1]}: {show(line.strip())}: TOML syntax error: {error}"
    return f"{path}: TOML syntax error: {error}; write [section] lines and key = value lines"


def _place(path: str, section: str, key: str, value: Any, draft: _Draft) -> None:
    """Put one key of the TOML into the draft, or note that there is no such key."""
    at = f"{path}: [{section}] {key} = {show(value)}"
    if key in FIELDS and FIELDS[key].section == section:
        draft.values[section][key] = value
        draft.origins[key] = at
        return
    if key in FIELDS:
        hint = f"it belongs under [{FIELDS[key].section}]"
        draft.spoiled.add(key)
    else:
        near = did_you_mean(key, SECTIONS[section].model_fields) or did_you_mean(key, FIELDS)
        home = (
            f" under [{FIELDS[near].section}]" if near and FIELDS[near].section != section else ""
        )
        valid = ", ".join(SECTIONS[section].model_fields)
        hint = f"did you mean {near}{home}?" if near else f"valid: {valid}"
        draft.spoiled.update([near] if near else [])
    draft.faults.append(f"{at}: unknown key; {hint}")


def _build(draft: _Draft) -> JobConfig:
    """Validate field by field; where a value is bad its default stands in, to check the rest."""
    try:
        return JobConfig.model_validate(draft.values)
    except ValidationError as error:
        for detail in error.errors():
            section, key = str(detail["loc"][0]), str(detail["loc"][1])
            if detail["type"] == "missing" and len(detail["loc"]) == 2:
                # A key that was misspelt or refused elsewhere is not missing as well.
                if not draft.is_partial and key not in draft.spoiled:
                    draft.faults.append(
                        f"[{section}] {key} is missing; set it there or pass --{key} "
                        f"({expected(key)})"
                    )
            else:
                fault = _field_fault(key, detail, draft.origins[key])
                draft.faults += [] if fault in draft.faults else [fault]
            draft.spoiled.add(key)
            draft.values[section].pop(key, None)
    for name, entry in FIELDS.items():
        if entry.info.is_required():
            draft.values[entry.section].setdefault(name, 1 if name != "pretrain" else "missing")
    return JobConfig.model_validate(draft.values)


def _field_fault(name: str, detail: Mapping[str, Any], origin: str) -> str:
    """One line about a value that its field does not accept."""
    value, kind = detail["input"], detail["type"]
    path = [part for part in detail["loc"][2:] if isinstance(part, int)]
    table = TABLES.get(name)
    inner = [str(part) for part in detail["loc"][3:5] if table]
    place = "".join(f"[{part}]" for part in path) + "".join(f".{part}" for part in inner)
    where = f"{origin}: {name}{place} = {show(value)}: " if place else f"{origin}: "
    want = f"expected {expected(name)}"
    if kind == "missing" and not inner:  # an entry of a tuple that is too short
        return f"{origin}: {want}"
    if kind == "extra_forbidden":
        known = table.model_fields if table else {}
        near = did_you_mean(inner[-1], known)
        valid = "valid: " + ", ".join(known)
        return f"{where}unknown key; " + (f"did you mean {near}?" if near else valid)
    if len(inner) > 1:  # one of the options' types after the other has been tried
        return f"{where}expected text, number, true or false, or list of text"
    if inner:
        return f"{where}{detail['msg'][:1].lower()}{detail['msg'][1:]}"
    if kind == "finite_number":
        return f"{where}must be finite; {want}"
    if kind == "value_error" and isinstance(value, str):
        return f"{where}{detail['ctx']['error']}; {want}"
    if kind == "string_unicode":
        return f"{where}must be valid Unicode; {want}"
    if kind == "string_too_short":
        return f"{where}must not be empty; {want}"
    near = nearest_choice(name, value)
    return f"{where}{want}" + (f"; did you mean {near}?" if near else "")


def _known_world_size(dry_run: bool, faults: list[str]) -> tuple[int, str] | None:
    """The job's ranks: torchrun's, else what run_train.sh would start; a dry run may not know."""
    if "WORLD_SIZE" in os.environ:
        return _count("WORLD_SIZE", faults), "WORLD_SIZE"
    if dry_run and "NGPU" in os.environ:
        nodes = _count("NNODES", faults) if "NNODES" in os.environ else 1
        return _count("NGPU", faults) * nodes, "NGPU x NNODES"
    return None if dry_run else (1, "no torchrun")


def _count(variable: str, faults: list[str]) -> int:
    text = os.environ[variable]
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
    tables: dict[str, Any] = {}
    for section, table in config.model_dump(exclude_none=True).items():
        kept = {k: v for k, v in table.items() if k not in silent}
        if kept:
            tables[section] = kept
    return tomli_w.dumps(tables)


def dry_run_text(loaded: LoadedConfig) -> str:
    """The resolved TOML, then what follows from it in comments, so that the whole stays TOML."""
    said = [f"world size = {loaded.world_size} ({loaded.world_size_source})"]
    said += batch_arithmetic(loaded.config, loaded.world_size)
    said += [f"warning: {text}" for text in loaded.warnings]
    said += [f"note: would stop a real run: {text}" for text in loaded.notes]
    return to_toml(loaded.config) + "\n" + "\n".join(f"# {one_line(line)}" for line in said)
