"""From prompts to scored samples: generation, rewards, and which samples a step learns from."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torchrft.config.job_config import JobConfig
from torchrft.data.loader import PromptLoader
from torchrft.metrics.timing import PhaseTimer
from torchrft.rewards.scorer import Scorer
from torchrft.rewards.shaping import RewardShaper
from torchrft.rollout import RolloutEngine
from torchrft.tools import distributed
from torchrft.tools.distributed import DataRanks
from torchrft.tools.logging import logger
from torchrft.tools.seeds import derive_seed
from torchrft.types import Completion, Prompt, Sample, SamplingParams

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A round of generation that runs in another thread while the trainer computes."""

    place: int  # in the stream of prompts
    places: list[int]  # of this rank's prompts
    sampling: dict[str, Any]  # how it samples, but for the seeds
    completions: Future[list[Completion]]


class Collector:
    """Collects rollouts on all ranks.

    `prompts` is the share of the endless stream of this rank's place among `ranks`; what `helpers`
    ranks have the same place and samples (tensor and sequence parallelism) divide among them.
    `shaper` adds the overlong penalty.
    """

    def __init__(
        self,
        config: JobConfig,
        engine: RolloutEngine,
        prompts: PromptLoader,
        scorer: Scorer,
        shaper: RewardShaper,
        timer: PhaseTimer,
        ranks: DataRanks,
        helpers: int = 1,
    ) -> None:
        self.rollout, self.data, self.seed = config.rollout, config.data, config.training.seed
        # Whole prompts go to one rank, which computes each once; unless an optimizer step takes
        # parts of a group: then sample by sample, so that any number of ranks takes the same.
        n = config.rollout.n_samples_per_prompt
        self.unit = 1 if config.training.train_batch_size % (n * ranks.size) else n
        self.engine, self.prompts, self.timer = engine, prompts, timer
        self.scorer, self.shaper = scorer, shaper
        self.ranks, self.dp, self.helpers = ranks, ranks.size, helpers
        self.helper = distributed.get_rank() % helpers
        self.flight: _Flight | None = None
        # Within it, a signal that asks the run to end may leave what hangs.
        self.abandonable: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.thread = ThreadPoolExecutor(1, "rollout")

    def collect(self, ahead: bool = False) -> tuple[list[Sample], dict[str, float]]:
        """All ranks' samples of a rollout, ordered by prompt, and what dynamic sampling did.

        Dynamic sampling (DAPO, arXiv:2503.14476) drops groups whose rewards are all equal and
        generates on until the rollout is full or its rounds are used up. The choice is made among
        all ranks' groups in the order of their prompts, so it is the same for any number of ranks.

        With `ahead` the next rollout's first round is started, by the weights of now, and this one
        may have been. `wait` must then be called before the engine gets other weights.
        """
        size, rollout = self.rollout.rollout_batch_size, self.rollout
        rounds = rollout.dynamic_sampling_max_rounds if rollout.dynamic_sampling else 1
        kept: list[list[Sample]] = []
        drawn: list[list[Sample]] = []
        for _ in range(rounds):
            drawn += self._draw()
            kept = [g for g in drawn if _differ(g)] if rollout.dynamic_sampling else drawn
            if len(kept) >= size:
                break
        metrics = {}
        if rollout.dynamic_sampling:
            metrics["dynamic_sampling/groups_drawn"] = float(len(drawn))
            metrics["dynamic_sampling/groups_missing"] = float(max(size - len(kept), 0))
            if not kept:  # every rank needs something to compute
                kept = [[dataclasses.replace(sample, filler=True) for sample in drawn[0]]]
        if ahead:
            prompts, places, sampling = self._round()
            completions = self.thread.submit(self.engine.generate, prompts, sampling)
            position = self.prompts.position
            self.flight = _Flight(position, places, _without_seeds(sampling), completions)
        return [sample for group in kept[:size] for sample in group], metrics

    def wait(self) -> None:
        """Until nothing is generated any more."""
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

    def flight_rows(self, flight: _Flight | None) -> dict[str, Any] | None:
        """What was generated ahead, of all ranks, as a checkpoint keeps it; collective."""
        if not self.rollout.async_level:
            return None
        rows = None
        if flight is not None and flight.completions.done() and not flight.completions.exception():
            rows = [(flight.places[c.prompt_index], c) for c in flight.completions.result()]
        parts = distributed.on_all(lambda: rows, "gather what was generated ahead")
        if flight is None or None in parts:
            return None
        every = [row for part in parts for row in part or ()]
        return {"place": flight.place, "sampling": flight.sampling, "rows": every}

    def load_flight(self, state: Mapping[str, Any] | None) -> None:
        """Takes over what `flight_rows` returned, if this run would have generated it, too."""
        if state is None or not self.rollout.async_level:
            return
        _, places, sampling = self._round()
        if state["sampling"] != _without_seeds(sampling):
            text = "the rollout's options changed: what was generated ahead is generated anew"
            logger.warning(text)
            return
        index = {place: number for number, place in enumerate(places)}
        mine = [
            dataclasses.replace(completion, prompt_index=index[place])
            for place, completion in state["rows"]
            if place in index
        ]
        mine.sort(key=lambda completion: (completion.prompt_index, completion.sample_index))
        completions = Future[list[Completion]]()
        completions.set_result(mine)
        self.flight = _Flight(state["place"], places, state["sampling"], completions)

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's part of all ranks' samples; all ranks get equally many.

        Where these do not come out even, copies of the last ones fill up that do not count.
        """
        short = -len(samples) % (self.unit * self.dp)
        fillers = [dataclasses.replace(s, filler=True) for s in samples[-self.unit :]] * short
        even = [*samples, *fillers[:short]]
        return [s for i, s in enumerate(even) if i // self.unit % self.dp == self.ranks.rank]

    @property
    def splits_groups(self) -> bool:
        """Whether a group's samples may be on several ranks."""
        return self.unit == 1 < self.dp and self.rollout.n_samples_per_prompt > 1

    def unshare(self, samples: Sequence[Sample]) -> list[Sample]:
        """All ranks' samples, of which `samples` is what `share` gave this rank."""
        parts = [_batched(part, self.unit) for part in self.ranks.gather(samples)]
        return [s for units in zip(*parts, strict=True) for unit in units for s in unit]

    def rows(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
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
                self.sampling([]),
                n=1,
                temperature=0.0,
                first_token_temperature=None,
                seeds=None,
                replay=False,
            )
            completions = self._generate(prompts, greedy)
            parts = self._on_all(lambda: self.scorer.score(prompts, completions), "reward")
        return statistics.fmean(score.value for part in parts for score in part)

    def _draw(self) -> list[list[Sample]]:
        """One round: all ranks' groups, in the order of their prompts."""
        prompts, places, sampling = self._round()
        flight, self.flight = self.flight, None
        with self.timer.phase("rollout"):
            if flight is not None and flight.place == self.prompts.position:
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

    def _round(self) -> tuple[list[Prompt], list[int], SamplingParams]:
        """This rank's prompts at the stream's position, their places, and how to sample them."""
        first, prompts = self.prompts.position, self.prompts.peek()
        places = [first + index * self.dp + self.ranks.rank for index in range(len(prompts))]
        mine = slice(self.helper, None, self.helpers)
        return prompts[mine], places[mine], self.sampling(places[mine])

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

    def sampling(self, places: Sequence[int]) -> SamplingParams:
        """How to sample prompts at these places of the stream, which seed their samples."""
        rollout, n = self.rollout, self.rollout.n_samples_per_prompt
        return SamplingParams(
            n=n,
            temperature=rollout.temperature,
            first_token_temperature=rollout.first_token_temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_total_tokens=self.data.max_len,
            max_new_tokens=rollout.max_new_tokens,
            min_new_tokens=rollout.min_new_tokens,
            stop_token_ids=tuple(rollout.stop_token_ids),
            stop=tuple(rollout.stop),
            replay=rollout.truncation_replay,
            seeds=tuple(tuple(derive_seed(self.seed, p, j) for j in range(n)) for p in places),
        )


def _without_seeds(sampling: SamplingParams) -> dict[str, Any]:
    """The options of `sampling`, which seeds follow the prompts' places."""
    return dataclasses.asdict(dataclasses.replace(sampling, seeds=None))


def _differ(group: Sequence[Sample]) -> bool:
    return len({sample.score.value for sample in group}) > 1


def _batched(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (samples[start : start + size] for start in range(0, len(samples), size))
