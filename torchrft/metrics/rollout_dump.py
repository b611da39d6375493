"""What was generated in a step, for people to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrft.metrics.files import write_json_lines

REQUIRED = ("prompt", "response", "reward", "reward_parts", "length", "finish_reason")


def dump(log_dir: str | Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `rows` to rollouts/step-N.jsonl, atomically, and return the path.

    A row holds at least `prompt`, `response`, `reward`, `reward_parts` (by name), `length` (tokens
    of the response) and `finish_reason`; the trainer adds `label`, `group` and `policy_version`.

    Raises:
        ValueError: a row lacks one of them.
    """
    for number, row in enumerate(rows):
        missing = [key for key in REQUIRED if key not in row]
        if missing:
            raise ValueError(f"rollout row {number} of step {step} lacks {', '.join(missing)}")
    path = Path(log_dir) / "rollouts" / f"step-{step}.jsonl"
    write_json_lines(path, rows)
    return path
