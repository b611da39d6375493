"""A checkpoint's files with sizes and checksums, listed last: what has a manifest is complete."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
FORMAT = 2  # objects are JSON; they were pickled in format 1


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
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{FILE_NAME} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _own_digest(content):
        raise ValueError(f"{FILE_NAME} is damaged")
    if content["format"] not in (1, FORMAT):
        text = f"this version reads up to {FORMAT}"
        raise ValueError(f"{FILE_NAME} has format {content['format']}, {text}")
    return content


def find_fault(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first bad file of `files`, or None. Sizes are compared first."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != record["bytes"]:
            return f"{name} has {size} bytes instead of {record['bytes']}"
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
