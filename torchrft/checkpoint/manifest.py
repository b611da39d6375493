"""A checkpoint's files with sizes and checksums, listed last: what has a manifest is complete."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torchrft.checkpoint.dcp_files import DATA_FILE
from torchrft.checkpoint.objects import check_kind
from torchrft.tools.payload import parse

FILE_NAME = "manifest.json"
FORMAT = 2  # objects are JSON; they were pickled in format 1
_LIKE = {"format": FORMAT, "step": 0, "world_size": 1, "files": dict[str, Any](), "sha256": ""}


def fingerprint(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each named file, as they go into the manifest."""
    records = {}
    for name in names:
        path = folder / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return records


def write(folder: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of `folder` and force it, and the folder's entries, to disk."""
    content: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": world_size}
    content["files"] = dict(sorted(files.items()))
    content["sha256"] = _own_digest(content)
    (folder / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")
    sync(folder / FILE_NAME)
    sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`.

    Raises:
        ValueError: it is missing, unreadable or damaged; the text says which.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{FILE_NAME} is missing, so it was never completed")
    try:
        content = {**dict.fromkeys(_LIKE), **parse(path.read_bytes())}
        check_kind(content, _LIKE, "it")
        if content.pop("sha256") != _own_digest(content):
            raise ValueError("its own checksum is wrong")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{FILE_NAME} is damaged and cannot be read ({error})") from None
    if content["format"] > FORMAT:
        raise ValueError(f"{FILE_NAME} has format {content['format']}; update torchrft")
    return content


def find_fault(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first bad file of `files`, or None. Sizes are compared first."""
    for name, record in files.items():
        if not isinstance(record, dict) or not (DATA_FILE.fullmatch(name) or name == ".metadata"):
            return f"{FILE_NAME} names {name!r:.80}, which no checkpoint has, or not its checksum"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != (told := record.get("bytes")):
            return f"{name} has {size} bytes instead of {told!r:.80}"
    for name, record in files.items():
        if fingerprint(folder, [name])[name] != record:
            return f"{name} has a wrong checksum"
    return None


def sync(path: Path) -> None:
    """Force a file, or a folder's entries (names, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file below `folder`, and the entries, to disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
