"""What was generated in a step, for people to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrft.metrics.files import write_json_lines


def dump(log_dir: str | Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `rows`, as `dump_rows` makes them, to rollouts/step-N.jsonl, atomically."""
    path = Path(log_dir) / "rollouts" / f"step-{step}.jsonl"
    write_json_lines(path, rows)
    return path
