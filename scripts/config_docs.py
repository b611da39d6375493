"""The JSON schema of the TOML, for editors, and the table of fields in docs/configuration.md.

`python scripts/config_docs.py` writes both anew; a test fails when they are out of step.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torchrft.config.fields import FIELDS, SECTIONS, default_text, expected
from torchrft.config.job_config import JobConfig

ROOT = Path(__file__).parents[1]
SCHEMA_PATH = ROOT / "torchrft" / "config" / "schema.json"
DOCS_PATH = ROOT / "docs" / "configuration.md"
_BEGIN, _END = "<!-- fields: begin (generated) -->", "<!-- fields: end -->"


def schema_text() -> str:
    """The schema as it stands in schema.json."""
    schema = JobConfig.model_json_schema()
    for table in schema["properties"].values():
        table.pop("default", None)  # repeats every field's own default
    for definition in schema["$defs"].values():
        for entry in definition["properties"].values():
            entry.pop("title", None)
            if entry.get("default", "") is None:
                entry.pop("default")  # TOML has no null: leaving the key out is the default
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2) + "\n"


def fields_markdown() -> str:
    """One table a section: name, what it accepts, default, text."""
    lines: list[str] = []
    for section, model in SECTIONS.items():
        lines += [f"### [{section}]", "", str(model.__doc__), ""]
        lines += ["| field | accepts | default | |", "|---|---|---|---|"]
        for name, entry in FIELDS.items():
            if entry.section == section:
                doc = " ".join((entry.info.description or "").split())
                default = default_text(name).removeprefix("default: ")
                cells = [f"`{name}`", expected(name), default, doc]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def refreshed_docs(text: str) -> str:
    """`text` with the generated part between its markers made anew."""
    pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
    body = f"{_BEGIN}\n\n{fields_markdown()}\n{_END}"
    return re.sub(pattern, lambda _: body, text, flags=re.DOTALL)


def main() -> None:
    SCHEMA_PATH.write_text(schema_text())
    DOCS_PATH.write_text(refreshed_docs(DOCS_PATH.read_text()))


if __name__ == "__main__":
    main()
