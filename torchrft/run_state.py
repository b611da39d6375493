"""What a run goes on from: taken after every step, and saved whatever ends the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrft.checkpoint.manager import CheckpointManager
from torchrft.collector import Collector
from torchrft.config.job_config import JobConfig
from torchrft.rewards.scorer import Scorer
from torchrft.rewards.shaping import RewardShaper
from torchrft.tools.distributed import World
from torchrft.tools.logging import logger
from torchrft.tools.seeds import rng_state, set_rng_state
from torchrft.types import Sample


class RunState:
    """Everything a run needs to go on as if it had never stopped.

    Weights and optimizers (`steppers`) are saved as they are. All else is small, and moves on while
    the next step's samples are made: `take` keeps it as it is after a step, until `leave` says that
    the weights are about to change. `small` has what else has a state, by its name in checkpoints.
    """

    def __init__(
        self,
        config: JobConfig,
        world: World,
        collector: Collector,
        scorer: Scorer,
        shaper: RewardShaper,
        steppers: Mapping[str, Any],
        small: Mapping[str, Any],
    ) -> None:
        self.config, self.world, self.collector = config, world, collector
        self.scorer, self.shaper = scorer, shaper
        self.steppers, self.small = steppers, small
        self.taken: dict[str, Any] | None = None
        self.take(0, [], 0)

    def take(
        self,
        step: int,
        pending: list[Sample],
        pending_rollouts: int,
        unlogged: Mapping[str, float] | None = None,
    ) -> None:
        """Keeps the state after `step`: `pending` samples wait, and its metrics are `unlogged`."""
        self.taken = {
            **{name: part.state_dict() for name, part in self.small.items()},
            "reward": {**self.shaper.state_dict(), "sources": self.scorer.state_dict()},
            "progress": {
                "step": step,
                "pending": list(pending),
                "pending_rollouts": pending_rollouts,
                "batches": self._batches(),
                "flight": self.collector.flight,
                "unlogged": None if unlogged is None else dict(unlogged),
            },
            "rng": {f"rank{self.world.rank}": rng_state()},
        }

    def leave(self) -> None:
        """The weights are about to change: until the next `take` there is nothing to save."""
        self.taken = None

    def logged(self) -> None:
        """The metrics of the step that was taken are written down."""
        self.progress["unlogged"] = None

    @property
    def progress(self) -> dict[str, Any]:
        """Step, waiting samples and the like, as they were taken."""
        assert self.taken is not None
        return self.taken["progress"]  # type: ignore[no-any-return]

    @property
    def step(self) -> int | None:
        """The step whose state can be saved, or None in the middle of an update."""
        return None if self.taken is None else int(self.progress["step"])

    def state_dict(self) -> dict[str, Any]:
        """The state that was taken last; all ranks call it together."""
        assert self.taken is not None
        progress, collector = self.progress, self.collector
        pending = collector.rows(collector.unshare(progress["pending"]))
        progress = {
            **progress,
            "pending": pending,
            "flight": collector.flight_rows(progress["flight"]),
        }
        progress = {name: value for name, value in progress.items() if value is not None}
        tensors = {name: part.state_dict() for name, part in self.steppers.items()}
        return {**tensors, **self.taken, "progress": progress}

    def resume(self, checkpoints: CheckpointManager) -> bool:
        """Goes on from a checkpoint; False if there is none, or it is another run's: then what lies
        under save_path is not gone on with. Raises ValueError if it does not fit this run."""
        options = self.config.checkpoint
        source = options.ckpt_path
        if source is not None and checkpoints.began_from(source):
            logger.info("%s began from ckpt_path before and goes on", options.save_path)
            source = None
        path = checkpoints.resolve(source)
        if path is None:
            logger.info("no checkpoint under %s: starting from the beginning", options.save_path)
            return False
        self._load(checkpoints, path)
        own = path.resolve().parent == checkpoints.checkpoints.resolve()
        if own:  # what later steps left belongs to a course of training that is not gone on with
            checkpoints.tidy(self.progress["step"])
        logger.info("resumed from %s, after step %d", path, self.step)
        return own

    def _load(self, checkpoints: CheckpointManager, path: Path) -> None:
        state = self.state_dict()
        checkpoints.load(path, state)
        for name, part in {**self.steppers, **self.small}.items():
            part.load_state_dict(state[name])
        self.shaper.load_state_dict(state["reward"])
        self.scorer.load_state_dict(state["reward"].get("sources", {}))
        progress, collector = state["progress"], self.collector
        saved, pending = progress["batches"], collector.from_rows(progress["pending"])
        waiting = " and holds samples that wait for their optimizer step" if pending else ""
        for name, value in self._batches().items():
            # A step is a rollout: with others, the steps done and those left would not add up.
            fixed = name == "rollout_batch_size" or (pending and name != "data_parallel_ranks")
            if fixed and saved[name] != value:
                raise ValueError(
                    f"{path} was saved with {name} = {saved[name]}{waiting}; this run has {value}: "
                    f"resume with {saved[name]}"
                )
        if saved["data_parallel_ranks"] != collector.ranks.size:
            pending = [sample for sample in pending if not sample.filler]
        collector.load_flight(progress.get("flight"))
        set_rng_state(state["rng"][f"rank{self.world.rank}"])
        mine = collector.share(pending)
        self.take(progress["step"], mine, progress["pending_rollouts"], progress.get("unlogged"))

    def _batches(self) -> dict[str, int]:
        """What decides how pending samples become optimizer steps."""
        rollout = self.config.rollout
        return {
            "rollout_batch_size": rollout.rollout_batch_size,
            "n_samples_per_prompt": rollout.n_samples_per_prompt,
            "train_batch_size": self.config.training.train_batch_size,
            "data_parallel_ranks": self.collector.ranks.size,
        }
