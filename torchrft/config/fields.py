"""What the config's fields are called, what they accept and how messages write them.

Everything is read off the JSON schema of `JobConfig`, so that the command line, `--help`, faults
and docs/configuration.md cannot say anything else than editors do.
"""

import difflib
import json
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from torchrft.config.field_types import LARGEST
from torchrft.config.job_config import JobConfig, Section
from torchrft.tools.text import redact

Schema = dict[str, Any]
UNSET: tuple[Any, ...] = (None, [], {})


class ConfigField(NamedTuple):
    """A field's section, pydantic's description of it, and its JSON schema."""

    section: str
    info: FieldInfo
    schema: Schema


_DEFINITIONS: Schema = JobConfig.model_json_schema()["$defs"]
SECTIONS: dict[str, type[Section]] = JobConfig.__annotations__
FIELDS = {
    name: ConfigField(section, info, _DEFINITIONS[model.__name__]["properties"][name])
    for section, model in SECTIONS.items()
    for name, info in model.model_fields.items()
}
assert len(FIELDS) == sum(len(model.model_fields) for model in SECTIONS.values()), "equal names"


def branches(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, without null: leaving a field out is how one says null."""
    return [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]


def describe(schema: Schema) -> str:
    """What a field accepts, in words.

    >>> describe({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
    'number > 0 and <= 1'
    """
    parts = branches(schema)
    if len(parts) > 1:
        return " or ".join(dict.fromkeys(describe(part) for part in parts))
    (part,) = parts
    if "$ref" in part:
        needed = _DEFINITIONS[part["$ref"].rpartition("/")[2]]["required"]
        return f"{{ {', '.join(needed)}, weight }}"
    if "const" in part:
        return str(part["const"])
    if "enum" in part:
        return "one of " + ", ".join(str(choice) for choice in part["enum"])
    if "pattern" in part:
        return "path/to/file.py:function"
    if part["type"] == "object":
        return "table"
    if part["type"] == "array":
        if "prefixItems" in part:
            return f"{len(part['prefixItems'])} values, each {describe(part['prefixItems'][0])}"
        return f"list of {describe(part['items'])}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    told = [key for key in signs if key in part and abs(part[key]) != LARGEST]
    bounds = " and ".join(f"{signs[key]} {part[key]}" for key in told)
    words = {"boolean": "true or false", "string": "text"}
    return words.get(part["type"]) or f"{part['type']} {bounds}".rstrip()


def is_optional(name: str) -> bool:
    """Whether a field may be unset: it has no default value, or an empty list or table."""
    return FIELDS[name].info.default in UNSET


def default_text(name: str) -> str:
    """A field's default as `--help` shows it; the flag's word `none` means the same."""
    info = FIELDS[name].info
    default = "none" if is_optional(name) else show(info.default)
    return "required" if info.is_required() else f"default: {default}"


@cache
def expected(name: str) -> str:
    """What the field `name` accepts, in words."""
    return describe(FIELDS[name].schema)


def show(value: Any, limit: int = 90) -> str:
    """A value on one line, as TOML writes it where that is possible.

    >>> show("a\\nb"), show(True), show((0.9, 0.95))
    ('"a\\\\nb"', 'true', '[0.9, 0.95]')
    """
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
        if not text.isprintable():
            text = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or thousands of lists
        text = f"<{type(value).__name__} too large to show>"
    text = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)
    text = redact(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, if any is near; case and dashes do not count."""
    plain = name[:100].lower().replace("-", "_")
    near = difflib.get_close_matches(plain, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def value_of(config: JobConfig, name: str) -> Any:
    return getattr(getattr(config, FIELDS[name].section), name)


def is_set(config: JobConfig, name: str) -> bool:
    """Whether TOML or flags name the field, rather than its default standing in."""
    return name in getattr(config, FIELDS[name].section).model_fields_set


def label(config: JobConfig, name: str) -> str:
    """`[section] name = value`, as messages call a field; an unset one has no value."""
    value = value_of(config, name)
    return f"[{FIELDS[name].section}] {name}" + ("" if value in UNSET else f" = {show(value)}")
