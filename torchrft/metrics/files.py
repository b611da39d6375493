"""JSON lines and files that are never seen half-written."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchrft.tools.disk import writing
from torchrft.tools.payload import parse

METRICS_FILE = "metrics.jsonl"


def json_line(record: Mapping[str, Any]) -> str:
    """`record` as one line of strict JSON: NaN and infinity, which JSON lacks, become null.

    >>> json_line({"step": 1, "policy/loss": float("nan")})
    '{"step": 1, "policy/loss": null}\\n'
    """
    finite = json.loads(json.dumps(record, default=_plain), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False) + "\n"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path` and rename it there."""
    temporary = path.with_name(f".{path.name}.tmp")
    if isinstance(content, str):
        # A lone surrogate, which UTF-8 lacks, becomes the escape that JSON has for it.
        content = content.encode(errors="backslashreplace")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one line per record, atomically."""
    write_atomically(path, "".join(json_line(record) for record in records))


def read_metrics(log_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `log_dir`/metrics.jsonl; without a last line that a kill cut short.

    Raises:
        ValueError: another line is no record of a step; file and line are named.
    """
    path = Path(log_dir) / METRICS_FILE
    if not path.exists():
        return []
    # Only "\n" ends a line: splitlines() would also split at characters inside strings.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _record(line: str, where: str) -> dict[str, Any]:
    """JSON of a step, with numbers that a float holds, or null, beside it."""
    with suppress(ValueError):
        row = parse(line)
        if isinstance(row, dict) and type(row.get("step")) is int:
            numbers = [value for value in row.values() if value is not None]
            if all(isinstance(value, int | float) and abs(value) <= 1e308 for value in numbers):
                return row
    text = f"is no record of a step: {line:.80}; remove it, or move the file away"
    raise ValueError(f"{where} {text}")


def _plain(value: Any) -> Any:
    """What JSON has in place of a value that it lacks."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return list(value)
    return value.item() if hasattr(value, "item") else str(value)  # tensors, numpy scalars
