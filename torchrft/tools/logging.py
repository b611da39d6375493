"""The "torchrft" logger: legible on a terminal, plain lines in a file."""

import logging
import os
import sys
import warnings
from functools import cache

from rich.console import Console
from rich.logging import RichHandler

from torchrft.tools.text import LONGEST, redact, shorten

logger = logging.getLogger("torchrft")


@cache
def terminal() -> Console:
    """The one rich console; the progress bar and log lines share it so that neither tears."""
    return Console()


def on_terminal() -> bool:
    """Whether the output is a terminal (rather than a file or a pipe)."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class _Formatter(logging.Formatter):
    """Lines without secrets, and of a bounded length."""

    def format(self, record: logging.LogRecord) -> str:
        most = 20_000 if record.exc_info else LONGEST  # a traceback is a page or two
        return shorten(redact(super().format(record)), most)


def setup_logging(rank: int = 0) -> None:
    """Send torchrft's log to the terminal, or as plain lines to stderr.

    Rank 0 shows INFO and above, the others only warnings, each marked with its rank. Calling it
    again replaces the handler. Remarks of libraries that ask for nothing are left out.
    """
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # float32 is meant
    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    logger.handlers.clear()
    line = "%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    formatter = _Formatter(f"%(asctime)s %(levelname)s {line}", "%Y-%m-%d %H:%M:%S")
    if on_terminal():
        handler = RichHandler(console=terminal(), show_path=False)
        formatter = _Formatter(line, "%H:%M:%S")
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
