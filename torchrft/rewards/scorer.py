"""Scores completions: asks every source that counts for them and adds up by weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchrft.config.reward_config import Reward
from torchrft.rewards.registry import as_float
from torchrft.rewards.rule_source import rule_sources
from torchrft.rewards.shaping import RunningNorm
from torchrft.rewards.source import RewardError, RewardRequest, RewardResult, RewardSource
from torchrft.tools import distributed
from torchrft.tools.logging import logger
from torchrft.tools.signals import Abandoned
from torchrft.types import Completion, Prompt, Score

_LARGEST = float(torch.finfo(torch.float32).max)
_RECENT = 64  # samples, at least, of which a share may end without a verdict


@dataclass(frozen=True, slots=True)
class Weighted:
    """A source and how it enters the sum."""

    source: RewardSource
    weight: float = 1.0
    normalize: bool = False


class Scorer:
    """The weighted sum of reward sources, with the `[reward]` section's recipes and gate.

    Raises ValueError for a name that two sources have, and for one that recipes or gate use and no
    source has.
    """

    def __init__(self, sources: Sequence[Weighted], reward: Reward | None = None) -> None:
        self.config = reward or Reward()
        for fault in self.config.name_faults([each.source.name for each in sources]):
            raise ValueError(fault)
        self.sources = {each.source.name: each.source for each in sources}
        self.weights = {each.source.name: each.weight for each in sources}
        self.norms = {each.source.name: RunningNorm() for each in sources if each.normalize}
        self.failures: dict[str, list[bool]] = {each.source.name: [] for each in sources}

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in their order; `parts` are the unweighted rewards by name.

        If a source is collective, all ranks must call this together; what a rank returns is then
        only good if no rank has raised. Raises RewardError, naming the source and the prompt's row,
        for a reward that is no finite number, a bug in a function, or a data source without recipe.
        """
        requests = [RewardRequest(prompts[c.prompt_index], c) for c in completions]
        found: list[dict[str, RewardResult]] = [{} for _ in requests]
        failure: BaseException | None = None
        try:
            counted = [self._counted(request.prompt) for request in requests]
            for source in self.sources.values():
                if not source.collective:
                    self._take(source.name, *self._ask(source, requests, counted), found)
        except (Exception, Abandoned) as error:
            failure = error
        together = [source for source in self.sources.values() if source.collective]
        if together and distributed.any_rank(failure is not None) and failure is None:
            return []
        if failure is not None:
            raise failure
        # All are asked before any answer is judged: a fault of one rank's must not part the ranks.
        answers = [self._ask(source, requests, counted) for source in together]
        for source, answer in zip(together, answers, strict=True):
            self._take(source.name, *answer, found)
        scores = [self._score(results) for results in found]
        for score, request in zip(scores, requests, strict=True):
            _check(score.value, "the weighted sum of rewards", request)
        return scores

    def normalized(self, scores: Sequence[Score]) -> list[Score]:
        """Scores of all ranks, anew with the z-scores of the sources that are normalized.

        All ranks must pass the same scores; they enter the running statistics first.
        """
        if not self.norms:
            return list(scores)
        zs: list[dict[str, float]] = [{} for _ in scores]
        for name, norm in self.norms.items():
            places = [place for place, score in enumerate(scores) if name in score.parts]
            values = torch.tensor([scores[i].parts[name] for i in places], dtype=torch.float64)
            norm.update(values)
            for place, z in zip(places, norm.normalize(values, minus_mean=True), strict=True):
                zs[place][name] = float(z)
        return [replace(s, value=self._mix(s.parts, z)) for s, z in zip(scores, zs, strict=True)]

    def check(self, prompts: Sequence[Prompt], option: str = "prompt_data") -> None:
        """Raises ValueError for prompts that a source can never judge, naming `option` and row."""
        try:
            counted = [self._counted(prompt) for prompt in prompts]
            for name, source in self.sources.items():
                if hasattr(source, "check"):
                    pairs = zip(prompts, counted, strict=True)
                    source.check([prompt for prompt, names in pairs if name in names])
        except (RewardError, ValueError) as error:
            raise ValueError(f"{option}: {error}") from error

    def close(self) -> None:
        """Ends what the sources have started."""
        for source in self.sources.values():
            source.close()

    def state_dict(self) -> dict[str, Any]:
        return {name: norm.state_dict() for name, norm in self.norms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, norm in self.norms.items():
            if name in state:
                norm.load_state_dict(state[name])

    def _counted(self, prompt: Prompt) -> list[str]:
        """The sources that count for a prompt."""
        key, recipes = self.config.source_key, self.config.recipes
        if key is None or not recipes:
            return list(self.sources)
        data_source = prompt.metadata.get(key)
        if not isinstance(data_source, str) or data_source not in recipes:
            raise RewardError(
                f"prompt row {prompt.row}: {key} = {data_source!r:.80} has no recipe; "
                f"[reward.recipes] has {', '.join(recipes)}"
            )
        return recipes[data_source]

    def _ask(
        self,
        source: RewardSource,
        requests: Sequence[RewardRequest],
        counted: Sequence[Sequence[str]],
    ) -> tuple[Sequence[RewardRequest], Sequence[RewardResult], Sequence[int]]:
        """The requests that the source counts for, its results, and those requests' places."""
        places = [place for place, names in enumerate(counted) if source.name in names]
        asked = [requests[place] for place in places]
        return asked, source.score(asked) if asked or source.collective else [], places

    def _take(
        self,
        name: str,
        requests: Sequence[RewardRequest],
        results: Sequence[RewardResult],
        places: Sequence[int],
        found: Sequence[dict[str, RewardResult]],
    ) -> None:
        """Checks the results of the source `name` and puts them to their places in `found`."""
        if len(results) != len(requests):
            first = f", the first of prompt row {requests[0].prompt.row}" if requests else ""
            raise RewardError(
                f"reward {name!r} gave {len(results)} rewards for {len(requests)} samples{first}"
            )
        errors = []
        for place, request, result in zip(places, requests, results, strict=True):
            if result.error is not None:
                errors.append(f"prompt row {request.prompt.row}: {result.error}")
                result = replace(result, score=self.config.error_reward)
            for number in (result.score, *result.parts.values(), *result.metrics.values()):
                _check(number, f"reward {name!r}", request)
            found[place][name] = result
        if errors:
            logger.warning(
                f"reward {name!r}: no verdict on {len(errors)} of {len(requests)} samples, which "
                f"get error_reward = {self.config.error_reward:g}; the first is {errors[0]}"
            )
        size, most = max(_RECENT, len(results)), self.config.max_reward_failures
        recent = [*self.failures[name], *(result.error is not None for result in results)][-size:]
        self.failures[name] = recent
        if sum(recent) > most * size:
            raise RewardError(
                f"reward {name!r}: no verdict on {sum(recent)} of the last {len(recent)} samples, "
                f"the last {errors[-1]}; mend it, or raise max_reward_failures = {most:g}"
            )

    def _score(self, results: Mapping[str, RewardResult]) -> Score:
        parts: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for name, result in results.items():
            parts[name] = float(result.score)
            parts |= {f"{name}/{part}": value for part, value in result.parts.items()}
            metrics |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
            if result.error is not None:
                metrics[f"{name}/errors"] = 1.0
        # Of the scores alone: a source's part may be called like another source.
        scores = {name: float(result.score) for name, result in results.items()}
        return Score(self._mix(scores, {}), parts, metrics)

    def _mix(self, parts: Mapping[str, float], normalized: Mapping[str, float]) -> float:
        gate = self.config.gate
        if gate and any(parts.get(name, 1.0) <= 0 for name in gate):
            return self.config.gate_reward
        return sum(
            weight * normalized.get(name, parts[name])
            for name, weight in self.weights.items()
            if name in parts
        )


def _check(number: Any, what: str, request: RewardRequest) -> None:
    if not abs(number if type(number) is float else as_float(number)) <= _LARGEST:
        raise RewardError(
            f"{what}, prompt row {request.prompt.row}: a reward must be a finite number, got "
            f"{number!r:.80}; float32 ends at 3.4e38"
        )


def build_scorer(reward: Reward, others: Sequence[Weighted] = ()) -> Scorer:
    """The scorer of the `[reward]` section: its functions, and `others` that were built elsewhere.

    Raises ValueError, before anything has been generated, for functions that cannot be used, for
    names that are given twice, and if there is no source at all.
    """
    rules = zip(rule_sources(reward), reward.functions, strict=True)
    weighted = [Weighted(rule, entry.weight, entry.normalize) for rule, entry in rules]
    weighted += others
    if not weighted:
        raise ValueError('no reward: set [reward] functions, as in [{ name = "exact_match" }]')
    return Scorer(weighted, reward)
