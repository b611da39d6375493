"""One writer for a folder: two jobs in one would destroy each other's checkpoints."""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from torchrft.tools.disk import writing
from torchrft.tools.logging import logger

FILE_NAME = ".lock"
SECONDS_TO_END = 10.0  # that a job which was just killed may take to let go
_held: dict[Path, IO[str]] = {}  # open as long as it is held
_made: set[Path] = set()  # folders that were not there before


def hold(folder: Path, option: str) -> None:
    """Holds `folder`, that of `option`, until `release`, or until this process ends in any way.

    The lock is the kernel's (POSIX), so it ends with its process, is not handed to children and
    works over NFS. A process may hold a folder twice. Where the file system has no locks, a
    warning says so. Raises ValueError if another process holds the folder.
    """
    if not folder.exists():
        _made.add(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / FILE_NAME).resolve()
    if path in _held:
        return  # to open and close it once more would end the lock
    until = time.monotonic() + SECONDS_TO_END
    file = path.open("a+", encoding="utf-8", errors="replace")
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
            file.close()  # who held it has removed it
            file = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                text = "%s has no locks (%s): see to it that no other job has the same %s"
                logger.warning(text, folder, error.strerror, option)
                break
            if time.monotonic() > until:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise ValueError(
                    f"{option} {folder} is in use by {holder}: two jobs in one folder destroy each "
                    f"other's files; wait for that one to end, or give this one another {option}"
                ) from None
            time.sleep(0.1)
    _held[path] = file
    with writing(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def release() -> None:
    """Others may have the folders that this process holds."""
    while _held:
        path, file = _held.popitem()
        with suppress(OSError):  # the folder may be gone
            path.unlink(missing_ok=True)
            if path.parent in _made:
                path.parent.rmdir()  # if the job has left nothing there
        file.close()
