"""From prompts to scored samples: generation, rewards, and the samples that are learned from."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeVar

from torchrft.config.job_config import Rollout, Training
from torchrft.data.loader import PromptLoader
from torchrft.metrics.timing import PhaseTimer
from torchrft.rewards.scorer import Scorer
from torchrft.rewards.shaping import RewardShaper
from torchrft.rollout.flight import Flight, without_seeds
from torchrft.tools import distributed
from torchrft.tools.distributed import DataRanks
from torchrft.tools.logging import logger
from torchrft.tools.seeds import derive_seed
from torchrft.types import Completion, Prompt, Sample, Sampler, SamplingParams

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """How many samples a rollout draws, how, and how ranks share them.

    `max_rounds` bounds the rounds of dynamic sampling; None is without. `samples_per_unit`
    consecutive samples stay on one rank. Each of the `ranks` has samples of its own, or shares them
    with other ranks of a model (tensor and sequence parallelism): `model_parallel_ranks` share one
    model, and divide its prompts among them. With `is_async` the next rollout is generated while
    the trainer updates.
    """

    sampling: SamplingParams
    seed: int
    prompts_per_rollout: int
    max_rounds: int | None
    samples_per_unit: int
    ranks: DataRanks
    model_parallel_ranks: int = 1
    is_async: bool = False

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        training: Training,
        sampling: SamplingParams,
        ranks: DataRanks,
        model_parallel_ranks: int,
    ) -> Self:
        """As the config's sections say."""
        # Whole prompts go to one rank, which computes each once. If an optimizer step takes parts
        # of groups, samples go one by one, so that any number of ranks takes the same.
        n = rollout.n_samples_per_prompt
        return cls(
            sampling,
            training.seed,
            rollout.rollout_batch_size,
            max_rounds=rollout.dynamic_sampling_max_rounds if rollout.dynamic_sampling else None,
            samples_per_unit=1 if training.train_batch_size % (n * ranks.size) else n,
            ranks=ranks,
            model_parallel_ranks=model_parallel_ranks,
            is_async=rollout.async_level > 0,
        )


class Collector:
    """Collects rollouts on all ranks.

    `prompts` is the share of the endless stream of this rank's place. `shaper` adds the overlong
    penalty.
    """

    def __init__(
        self,
        plan: RolloutPlan,
        engine: Sampler,
        prompts: PromptLoader,
        scorer: Scorer,
        shaper: RewardShaper,
        timer: PhaseTimer,
    ) -> None:
        self.plan, self.engine, self.prompts = plan, engine, prompts
        self.scorer, self.shaper, self.timer = scorer, shaper, timer
        self.flight: Flight | None = None
        # Within it, a signal that asks the run to end may leave what hangs.
        self.abandonable: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.thread = ThreadPoolExecutor(1, "rollout")

    def collect(self, ahead: bool = False) -> tuple[list[Sample], dict[str, float]]:
        """All ranks' samples of a rollout, ordered by prompt, and what dynamic sampling did.

        Dynamic sampling (DAPO, arXiv:2503.14476) drops groups whose rewards are all equal and
        generates on until the rollout is full or its rounds are used up. The choice is made among
        all ranks' groups in the order of their prompts, so it is the same for any number of ranks.

        With `ahead` the next rollout's first round is started, by the weights of now, and this one
        may have been. `wait_for_flight` must then be called before the engine gets other weights.
        """
        size, max_rounds = self.plan.prompts_per_rollout, self.plan.max_rounds
        kept: list[list[Sample]] = []
        drawn: list[list[Sample]] = []
        for _ in range(max_rounds or 1):
            drawn += self._draw()
            kept = drawn if max_rounds is None else [g for g in drawn if _differ(g)]
            if len(kept) >= size:
                break
        metrics = {}
        if max_rounds is not None:
            metrics["dynamic_sampling/groups_drawn"] = float(len(drawn))
            metrics["dynamic_sampling/groups_missing"] = float(max(size - len(kept), 0))
            if not kept:  # every rank needs something to compute
                kept = [[dataclasses.replace(sample, filler=True) for sample in drawn[0]]]
        if ahead:
            prompts, places, sampling = self._next_round()
            completions = self.thread.submit(self.engine.generate, prompts, sampling)
            position, options = self.prompts.position, without_seeds(sampling)
            self.flight = Flight(position, places, options, completions)
        return [sample for group in kept[:size] for sample in group], metrics

    def wait_for_flight(self) -> None:
        """Wait until what is generated ahead is complete."""
        if (flight := self.flight) is not None:
            with self.timer.phase("rollout"):
                self._on_all(lambda: len(flight.completions.result()), "rollout")

    def _on_all(self, function: Callable[[], T], phase: str) -> list[T]:
        """As distributed.on_all: a fault of one rank is one of all, so that they save together."""

        def work() -> T:
            with self.abandonable():
                return function()

        return distributed.on_all(work, phase)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        completions: list[Completion] = []
        generate = self.engine.generate
        self._on_all(lambda: completions.extend(generate(prompts, sampling)), "rollout")
        return completions

    def flight_state(self, flight: Flight | None) -> dict[str, Any] | None:
        """What was generated ahead, of all ranks, as a checkpoint keeps it; collective."""
        if not self.plan.is_async:
            return None
        rows = None if flight is None else flight.rows()
        gathered = distributed.on_all(lambda: rows, "gather what was generated ahead")
        if flight is None or None in gathered:
            return None
        every = [row for rows_of_rank in gathered for row in rows_of_rank or ()]
        return {"place": flight.position, "sampling": flight.options, "rows": every}

    def load_flight(self, state: Mapping[str, Any] | None) -> None:
        """Takes over what `flight_state` returned, if this run would have generated it, too."""
        if state is None or not self.plan.is_async:
            return
        _, places, sampling = self._next_round()
        if state["sampling"] != without_seeds(sampling):
            text = "the rollout's options changed: what was generated ahead is generated anew"
            logger.warning(text)
            return
        self.flight = Flight.landed(state["place"], places, sampling, state["rows"])

    def split_over_ranks(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's samples out of all ranks'; all ranks get equally many.

        If the samples do not divide evenly, the last ones are repeated as fillers. Fillers do not
        count in the loss.
        """
        unit, ranks = self.plan.samples_per_unit, self.plan.ranks
        short = -len(samples) % (unit * ranks.size)
        fillers = [dataclasses.replace(s, filler=True) for s in samples[-unit:]] * short
        even = [*samples, *fillers[:short]]
        return [s for i, s in enumerate(even) if i // unit % ranks.size == ranks.rank]

    @property
    def splits_groups(self) -> bool:
        """Whether a group's samples may be on several ranks."""
        return self.plan.samples_per_unit == 1 < self.plan.ranks.size and self.plan.sampling.n > 1

    def gather_from_ranks(self, samples: Sequence[Sample]) -> list[Sample]:
        """All ranks' samples, of which `samples` is what `split_over_ranks` gave this rank."""
        gathered = self.plan.ranks.gather(samples)
        units = [
            _batched(samples_of_rank, self.plan.samples_per_unit) for samples_of_rank in gathered
        ]
        return [s for row in zip(*units, strict=True) for unit in row for s in unit]

    def to_rows(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """`samples` as a checkpoint keeps them: their prompts by their places in the stream."""
        names = ("completion", "score", "group", "filler")
        return [{name: getattr(sample, name) for name in names} for sample in samples]

    def from_rows(self, rows: Sequence[Any]) -> list[Sample]:
        """The samples of `rows`; those of earlier versions' checkpoints were samples already."""
        return [
            row if isinstance(row, Sample) else Sample(self.prompts.at(row["group"]), **row)
            for row in rows
        ]

    def evaluate(self, prompts: Sequence[Prompt]) -> float:
        """Mean reward of greedy completions of all ranks' `prompts`."""
        with self.timer.phase("eval"):
            greedy = dataclasses.replace(
                self.plan.sampling,
                n=1,
                temperature=0.0,
                first_token_temperature=None,
                replay=False,
            )
            completions = self._generate(prompts, greedy)
            parts = self._on_all(lambda: self.scorer.score(prompts, completions), "reward")
        return statistics.fmean(score.value for part in parts for score in part)

    def _draw(self) -> list[list[Sample]]:
        """One round: all ranks' groups, in the order of their prompts."""
        prompts, places, sampling = self._next_round()
        flight, self.flight = self.flight, None
        with self.timer.phase("rollout"):
            if flight is not None and flight.position == self.prompts.position:
                completions = flight.completions.result()
            else:
                completions = self._generate(prompts, sampling)
        self.prompts.next()
        with self.timer.phase("reward"):
            # A reward that fails on one rank ends the job on all.
            parts = self._on_all(lambda: self._score(prompts, completions, places), "reward")
        # In the order of the stream, so that statistics do not depend on the number of ranks.
        samples = sorted((s for part in parts for s in part), key=lambda s: s.group)
        groups: dict[int, list[Sample]] = {}
        for sample in self._shaped(samples, sampling):
            groups.setdefault(sample.group, []).append(sample)
        return list(groups.values())

    def _next_round(self) -> tuple[list[Prompt], list[int], SamplingParams]:
        """This rank's prompts at the stream's position, their places, and how to sample them."""
        plan, ranks = self.plan, self.plan.ranks
        first, prompts = self.prompts.position, self.prompts.peek()
        places = [first + index * ranks.size + ranks.rank for index in range(len(prompts))]
        own = slice(
            distributed.get_rank() % plan.model_parallel_ranks, None, plan.model_parallel_ranks
        )
        seeds = tuple(
            tuple(derive_seed(plan.seed, place, j) for j in range(plan.sampling.n))
            for place in places[own]
        )
        return prompts[own], places[own], dataclasses.replace(plan.sampling, seeds=seeds)

    def _score(
        self, prompts: Sequence[Prompt], completions: list[Completion], places: list[int]
    ) -> list[Sample]:
        scores = self.scorer.score(prompts, completions)
        return [
            Sample(prompts[c.prompt_index], c, score, group=places[c.prompt_index])
            for c, score in zip(completions, scores, strict=True)
        ]

    def _shaped(self, samples: Sequence[Sample], sampling: SamplingParams) -> list[Sample]:
        """All ranks' samples with what takes all of them, or comes on top of their rewards."""
        scores = self.scorer.normalized([sample.score for sample in samples])
        budgets = [sampling.budget(len(sample.prompt.token_ids)) for sample in samples]
        scores = self.shaper.penalize(scores, [sample.completion for sample in samples], budgets)
        return [
            sample if score is sample.score else dataclasses.replace(sample, score=score)
            for sample, score in zip(samples, scores, strict=True)
        ]


def _differ(group: Sequence[Sample]) -> bool:
    return len({sample.score.value for sample in group}) > 1


def _batched(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (samples[start : start + size] for start in range(0, len(samples), size))
