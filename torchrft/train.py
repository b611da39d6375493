"""Entry point: `python -m torchrft.train --config_file job.toml [--any.option value]`."""

import atexit
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from torchrft.tools.signals import SecondKeyboardInterrupt, end_with_launcher, exit_on_signal

# All else is imported late, so that Ctrl-C is heard, and that help and config errors come at once.


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns 0, 2 for a job that cannot start, 1 for one that cannot go on, or
    128 + signal if one ended it. A fault is one line; the traceback of a bug goes to a file."""
    from torchrft.build.preflight import job_faults
    from torchrft.config.manager import read
    from torchrft.sources import SOURCES

    config = read(sys.argv[1:] if argv is None else argv, job_faults, sources=SOURCES)

    from torchrft.tools.logging import on_terminal, setup_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or they remark on every later fork
    if os.environ.get("RANK", "0") != "0" or not on_terminal():
        for library in ("HUB", "DATASETS"):  # in a file, or from all ranks, bars are heaps of lines
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    from torchrft.rewards.source import RewardError
    from torchrft.rollout.canary import WeightSyncError
    from torchrft.tools import distributed
    from torchrft.tools.disk import disk_fault
    from torchrft.tools.images import ImageError
    from torchrft.tools.progress import told
    from torchrft.trainer import Trainer

    of_ranks = (distributed.RankError, TimeoutError, ConnectionError)
    faults = (RewardError, WeightSyncError, ImageError, *of_ranks)
    crashes = Path(config.checkpoint.save_path, "crashes")
    trainer = None
    try:
        world = distributed.setup(config.parallel.collective_timeout)
        setup_logging(world.rank)
        try:
            with told("start"):
                trainer = Trainer(config, world)
        except ValueError as error:
            return _end_of_rank(error, 2)
        signum = trainer.train()
        return 0 if signum is None else 128 + signum
    except faults as error:
        return _end_of_rank(error)
    except OSError as error:
        return _end_of_rank(disk_fault(error) or _crash(error, crashes))
    except SecondKeyboardInterrupt:
        return _end_of_rank("stopped by a second Ctrl-C, without saving", 130)
    except (Exception, KeyboardInterrupt) as error:  # a user's function may raise the latter
        if isinstance(error, RuntimeError) and distributed.comes_from_a_collective(error):
            phase = (trainer and trainer.timer.failed) or "training"
            return _end_of_rank(distributed.peer_error(error, phase))
        return _end_of_rank(_crash(error, crashes))
    finally:
        distributed.teardown()


def _end_of_rank(fault: object, code: int = 1) -> int:
    """Prints the one line with which a rank ends."""
    from torchrft.tools.text import one_line

    text, rank = one_line(str(fault)), os.environ.get("RANK")
    several = os.environ.get("WORLD_SIZE", "1") != "1" and rank is not None
    with suppress(OSError):  # a full disk takes the line, but not the exit code
        # In one piece, since ranks write at the same time.
        sys.stderr.write(f"error: {text}" + (f" (rank {rank})\n" if several else "\n"))
    return code


def _crash(error: BaseException, folder: Path) -> str:
    """What a bug raised, and where; its traceback goes to a file, or is printed if none can be."""
    from torchrft.tools.text import redact

    lines = redact("".join(traceback.format_exception(error)))
    file = folder / f"rank-{os.environ.get('RANK', '0')}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(lines, encoding="utf-8", errors="backslashreplace")
    except OSError:
        print(lines, file=sys.stderr)
        return f"{type(error).__name__}: {error}"
    text = f"{type(error).__name__}: {redact(str(error)):.300}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}"
    return f"{text} ({where}; the traceback is in {file})"


def _end(codes: list[int]) -> None:
    """Ends the process of a job that has ended, its exit code in `codes`, without torch's own
    destructors: threads of gloo that are still at it abort a rank there now and then, and its
    launcher then ends the others, whatever they are about to save."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # its disk may be full
            stream.flush()
    if codes:
        os._exit(codes[0])


def run(argv: list[str] | None = None) -> NoReturn:
    """`main` as the whole program."""
    end_with_launcher()
    exit_on_signal()
    ended: list[int] = []
    atexit.register(_end, ended)  # the first to be registered is the last to run
    try:
        ended.append(main(argv))
    except SystemExit as done:  # a signal's, or that of a dry run
        ended.append(int(done.code or 0))
    sys.exit(ended[0])


if __name__ == "__main__":
    run()
