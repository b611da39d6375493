"""Entry point: `python -m torchrft.train --config_file job.toml [--any.option value]`."""

import atexit
import os
import sys

from torchrft.config.manager import read
from torchrft.rewards.verify import reward_faults


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns 0, 2 for a job that cannot start, 1 for one that cannot go on, or
    128 + signal if one ended it."""
    config = read(sys.argv[1:] if argv is None else argv, reward_faults)

    # Only now, so that help and config errors come at once.
    from torchrft.rewards.source import RewardError
    from torchrft.rollout.canary import WeightSyncError
    from torchrft.tools import distributed
    from torchrft.tools.images import ImageError
    from torchrft.tools.logging import setup_logging
    from torchrft.trainer import Trainer

    of_ranks = (distributed.RankError, TimeoutError, ConnectionError)
    told = (RewardError, WeightSyncError, ImageError, *of_ranks)
    world = distributed.setup(config.parallel.collective_timeout)
    setup_logging(world.rank)
    try:
        try:
            trainer = Trainer(config, world)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            signum = trainer.train()
        except told as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if not distributed.comes_from_a_collective(error):
                raise
            phase = trainer.timer.failed or "training"
            print(f"error: {distributed.peer_error(error, phase)}", file=sys.stderr)
            return 1
        return 0 if signum is None else 128 + signum
    finally:
        distributed.teardown()


def _end(codes: list[int]) -> None:
    """Ends the process of a job that has ended, its exit code in `codes`, without torch's own
    destructors: threads of gloo that are still at it abort a rank there now and then, and torchrun
    then ends the others, whatever they are about to save."""
    sys.stdout.flush()
    sys.stderr.flush()
    if codes:
        os._exit(codes[0])


if __name__ == "__main__":
    ended: list[int] = []
    atexit.register(_end, ended)  # the first to be registered is the last to run
    ended.append(main())
    sys.exit(ended[0])
