"""What is wrong with a file or a value, a line each."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrft.config.field_types import LARGEST
from torchrft.config.fields import did_you_mean, expected, nearest_choice, show
from torchrft.config.reward_config import TABLES

_PLAIN = {
    "finite_number": "must be finite",
    "string_unicode": "must be valid Unicode",
    "string_too_short": "must not be empty",
}


def toml_fault(path: str, error: Exception) -> str:
    """One line about a TOML file that cannot be read."""
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


def field_fault(name: str, detail: Mapping[str, Any], origin: str) -> str:
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
        hint = f"did you mean {near}?" if near else "valid: " + ", ".join(known)
        return f"{where}unknown key; {hint}"
    if len(inner) > 1:  # one of the options' types after the other has been tried
        return f"{where}expected text, number, true or false, or list of text"
    if inner:
        return f"{where}{detail['msg'][:1].lower()}{detail['msg'][1:]}"
    if kind == "value_error" and isinstance(value, str):
        return f"{where}{detail['ctx']['error']}; {want}"
    if kind in _PLAIN:
        return f"{where}{_PLAIN[kind]}; {want}"
    limits = detail.get("ctx", {})
    if limits.get("le") == LARGEST or limits.get("ge") == -LARGEST:
        return f"{where}must be within 1e9 of 0; {want}"
    near = nearest_choice(name, value)
    return f"{where}{want}" + (f"; did you mean {near}?" if near else "")
