"""What is wrong with a file, a key or a value, a line each."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchrft.config.field_types import LARGEST
from torchrft.config.fields import FIELDS, SECTIONS, branches, did_you_mean, expected, show
from torchrft.config.reward_config import TABLES

_REASONS = {
    "finite_number": "must be finite",
    "string_unicode": "must be valid Unicode",
    "string_too_short": "must not be empty",
}
# What papers call some presets; only for suggestions.
_COMMON_NAMES = {"grpo": "group_norm", "ppo": "gae", "reinforce++": "reinforce_plus_plus"}


def toml_fault(path: str, error: Exception) -> str:
    """One line about a TOML file that cannot be read."""
    if isinstance(error, OSError):
        siblings = [str(sibling) for sibling in Path(path).parent.glob("*.toml")]
        near = difflib.get_close_matches(str(Path(path)), siblings, n=1)
        remedy = f"did you mean {near[0]}?" if near else "give the path of a .toml file"
        return f"--config_file {path}: {str(error.strerror).lower()}; {remedy}"
    if isinstance(error, UnicodeDecodeError):
        return f"--config_file {path}: is not UTF-8 text at byte {error.start}; save it as UTF-8"
    at = re.search(r"at line (\d+)", str(error))
    if at:
        line = Path(path).read_text(errors="replace").split("\n")[int(at[1]) - 1]
        return f"{path}: line {at[1]}: {show(line.strip())}: TOML syntax error: {error}"
    return f"{path}: TOML syntax error: {error}; write [section] lines and key = value lines"


def hint(near: str | None, valid: Iterable[str]) -> str:
    """The remedy for an unknown name."""
    return f"did you mean {near}?" if near else "valid: " + ", ".join(valid)


def key_fault(name: str, section: str | None) -> tuple[str, str]:
    """What to say of a name that its section, or the top of the file, lacks; what it may mean."""
    known = SECTIONS[section].model_fields if section else SECTIONS
    near = did_you_mean(name, known) or did_you_mean(name, FIELDS)
    shown = f"[{near}]" if near in SECTIONS else near
    if near in FIELDS and FIELDS[near].section != section:
        shown = f"{near} under [{FIELDS[near].section}]"
    return f"unknown {'key' if section else 'section'}; {hint(shown, known)}", near or ""


def field_fault(name: str, detail: Mapping[str, Any], origin: str) -> str:
    """One line about a value that its field does not accept."""
    value, kind, limits = detail["input"], detail["type"], detail.get("ctx", {})
    entries = [f"[{step}]" for step in detail["loc"][2:] if isinstance(step, int)]
    table = TABLES.get(name)
    inner = [str(step) for step in detail["loc"][3:5] if table]
    path = "".join(entries) + "".join(f".{key}" for key in inner)
    want = f"expected {expected(name)}"
    if kind == "missing" and not inner:  # an entry of a tuple that is too short
        return f"{origin}: {want}"
    where = f"{origin}: {name}{path} = {show(value)}: " if path else f"{origin}: "
    if kind == "extra_forbidden":
        known = table.model_fields if table else {}
        return f"{where}unknown key; {hint(did_you_mean(inner[-1], known), known)}"
    if len(inner) > 1:  # one of the options' types after the other has been tried
        return f"{where}expected text, number, true or false, or list of text"
    if inner:
        return f"{where}{detail['msg'][:1].lower()}{detail['msg'][1:]}"
    reason = _REASONS.get(kind)
    if kind == "value_error" and isinstance(value, str):
        reason = str(limits["error"])
    elif LARGEST in (limits.get("le"), -limits.get("ge", 0)):
        reason = "must be within 1e9 of 0"
    choices = [str(one) for part in branches(FIELDS[name].schema) for one in part.get("enum", [])]
    word = str(value).lower()
    near = did_you_mean(_COMMON_NAMES.get(word, word), choices)
    return where + "; ".join(filter(None, [reason, want, near and f"did you mean {near}?"]))
