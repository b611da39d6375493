"""The state that a run goes on from: captured after every step, saved whatever ends the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrft.checkpoint.dcp_files import reading
from torchrft.checkpoint.manager import CheckpointManager
from torchrft.collector import Collector
from torchrft.config.job_config import Checkpoint
from torchrft.learn.learner import Learner
from torchrft.tools.distributed import Agreement, get_rank
from torchrft.tools.logging import logger
from torchrft.tools.seeds import rng_state, set_rng_state
from torchrft.types import Sample


class RunState:
    """Everything a run needs to go on as if it had never stopped.

    Weights and optimizers are saved as they are. All else is small, and moves on while the next
    step's samples are made: `capture` keeps it as it is after a step, until `invalidate` says that
    the weights are about to change. All ranks make it together.
    """

    def __init__(self, options: Checkpoint, collector: Collector, learner: Learner) -> None:
        self.options, self.collector, self.learner = options, collector, learner
        plan = collector.plan
        self.batch_sizes = {  # they decide how samples become optimizer steps
            "rollout_batch_size": plan.prompts_per_rollout,
            "n_samples_per_prompt": plan.sampling.n,
            "train_batch_size": learner.policy.training.train_batch_size,
            "data_parallel_ranks": plan.ranks.size,
        }
        self.agreement = Agreement()
        self.small: dict[str, Any] = {"coefficients": learner, "data": collector.prompts}
        self.captured: dict[str, Any] | None = None
        for stepper in learner.steppers.values():
            stepper.before_change = self.invalidate
        self.capture(0, [], 0)

    def capture(
        self,
        step: int,
        pending: list[Sample],
        pending_rollouts: int,
        unlogged: Mapping[str, float] | None = None,
    ) -> None:
        """Keeps the state after `step`: `pending` samples wait, and its metrics are `unlogged`."""
        self.captured = {
            **{name: part.state_dict() for name, part in self.small.items()},
            "reward": {
                **self.learner.shaper.state_dict(),
                "sources": self.collector.scorer.state_dict(),
            },
            "progress": {
                "step": step,
                "pending": list(pending),
                "pending_rollouts": pending_rollouts,
                "batches": self.batch_sizes,
                "flight": self.collector.flight,
                "unlogged": None if unlogged is None else dict(unlogged),
            },
            "rng": {f"rank{get_rank()}": rng_state()},
        }

    def invalidate(self) -> None:
        """The weights are about to change: until the next `capture` there is nothing to save."""
        self.captured = None

    def mark_logged(self) -> None:
        """The metrics of the captured step are written down."""
        self.progress["unlogged"] = None

    @property
    def progress(self) -> dict[str, Any]:
        """Step, waiting samples and the like, as they were captured."""
        assert self.captured is not None
        return self.captured["progress"]  # type: ignore[no-any-return]

    @property
    def step(self) -> int | None:
        """The step whose state can be saved, or None in the middle of an update."""
        return None if self.captured is None else int(self.progress["step"])

    def state_dict(self) -> dict[str, Any]:
        """The captured state; all ranks call it together."""
        assert self.captured is not None
        progress, collector = self.progress, self.collector
        pending = collector.to_rows(collector.gather_from_ranks(progress["pending"]))
        progress = {
            **progress,
            "pending": pending,
            "flight": collector.flight_state(progress["flight"]),
        }
        progress = {name: value for name, value in progress.items() if value is not None}
        tensors = {name: part.state_dict() for name, part in self.learner.steppers.items()}
        return {**tensors, **self.captured, "progress": progress}

    def resume(self, checkpoints: CheckpointManager) -> bool:
        """Goes on from a checkpoint; False if there is none, or it is another run's: then what lies
        under save_path is not gone on with. Raises ValueError if it does not fit this run."""
        options = self.options
        source = options.ckpt_path
        if source is not None and checkpoints.began_from(source):
            logger.info("%s began from ckpt_path before and goes on", options.save_path)
            source = None
        path = checkpoints.resolve(source)
        if path is None:
            logger.info("no checkpoint under %s: starting from the beginning", options.save_path)
            return False
        with reading(path, (LookupError, TypeError, AttributeError)):
            self._load(checkpoints, path)
        own = path.resolve().parent == checkpoints.checkpoints.resolve()
        if own:  # what later steps left belongs to a course of training that is not gone on with
            checkpoints.tidy(self.progress["step"])
        logger.info("resumed from %s, after step %d", path, self.step)
        return own

    def _load(self, checkpoints: CheckpointManager, path: Path) -> None:
        state = self.state_dict()
        checkpoints.load(path, state)
        for name, part in {**self.learner.steppers, **self.small}.items():
            part.load_state_dict(state[name])
        self.learner.shaper.load_state_dict(state["reward"])
        self.collector.scorer.load_state_dict(state["reward"].get("sources", {}))
        progress, collector = state["progress"], self.collector
        saved, pending = progress["batches"], collector.from_rows(progress["pending"])
        waiting = " and holds samples that wait for their optimizer step" if pending else ""
        for name, value in self.batch_sizes.items():
            # A step is a rollout: with others, the steps done and those left would not add up.
            fixed = name == "rollout_batch_size" or (pending and name != "data_parallel_ranks")
            if fixed and saved[name] != value:
                raise ValueError(
                    f"{path} was saved with {name} = {saved[name]}{waiting}; this run has {value}: "
                    f"resume with {saved[name]}"
                )
        if saved["data_parallel_ranks"] != collector.plan.ranks.size:
            pending = [sample for sample in pending if not sample.filler]
        collector.load_flight(progress.get("flight"))
        with reading(path):
            set_rng_state(state["rng"][f"rank{get_rank()}"])
        own = collector.split_over_ranks(pending)
        self.capture(progress["step"], own, progress["pending_rollouts"], progress.get("unlogged"))
