"""Faults of disks in a sentence: which path, what is wrong, and what to do."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OTHER = "name another folder"
_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): f"make room, lower max_ckpt_num, or {_OTHER}",
    (errno.EFBIG,): "raise the limit of a file's size (ulimit -f)",
    (errno.EROFS, errno.EACCES, errno.EPERM): f"make it writable, or {_OTHER}",
    (errno.ENAMETOOLONG,): "give a shorter path",
    (errno.ENOTDIR, errno.EEXIST, errno.EISDIR): f"move away what is in its place, or {_OTHER}",
    (errno.EMFILE, errno.ENFILE): "raise the limit of open files (ulimit -n)",
    (errno.EIO, errno.ESTALE): "look at the disk, or at the server of the file system",
    (errno.ELOOP,): "mend the links",
}
REMEDIES = {number: text for numbers, text in _REMEDIES.items() for number in numbers}


def disk_fault(error: OSError) -> str | None:
    """The sentence about a disk's fault, or None for another one, of a network say."""
    if error.errno not in REMEDIES:
        return None
    where = error.filename or "a file, or where the output goes"
    return f"{where!s:.300}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk's fault inside becomes an OSError with its path, by default `path`.

    Whoever wrote: safetensors and torch raise other errors, of which it is a text or a cause.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            told = re.search(r"os error (\d+)", str(cause))
            number = cause.errno if isinstance(cause, OSError) else told and int(told[1])
            if number in REMEDIES:
                where = getattr(cause, "filename", None) or path
                raise OSError(number, os.strerror(number), str(where)) from error
            cause = cause.__cause__ or cause.__context__
        raise
