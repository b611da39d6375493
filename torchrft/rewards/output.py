"""What the user's functions print, in bounds."""

import os
import sys
import threading

from torchrft.tools.logging import logger

_MOST = 4000  # bytes of a call that are shown


class Output:
    """A pipe for standard output and error of worker processes: `fd` is theirs to write to.

    What comes through is shown on this process's standard error, up to 4,000 bytes between two
    calls of `end_call`, which says how much was left out.
    """

    def __init__(self) -> None:
        self._reading, self.fd = os.pipe()
        self._count = 0
        threading.Thread(target=self._read, name="output of workers", daemon=True).start()

    def _read(self) -> None:
        while data := os.read(self._reading, 1 << 16):
            room = max(_MOST - self._count, 0)
            self._count += len(data)
            sys.stderr.write(data[:room].decode(errors="replace"))
        os.close(self._reading)

    def end_call(self) -> None:
        """Says what was left out, and shows output again."""
        cut, self._count = self._count - _MOST, 0
        if cut > 0:
            logger.warning(f"reward functions printed {cut} bytes more, which are left out")

    def close(self) -> None:
        """For a pipe whose workers have ended, or end soon."""
        os.close(self.fd)
