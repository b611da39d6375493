"""Scores completions: the weighted sum of reward functions, each called once a completion."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from torchrft.config.job_config import RewardFunction
from torchrft.rewards import functions as functions
from torchrft.rewards.registry import REWARDS, RewardCallable, arguments_of
from torchrft.rewards.source import RewardError as RewardError
from torchrft.types import Completion, Prompt, Score


@dataclass(frozen=True, slots=True)
class RewardSource:
    """A reward function with its weight in the sum and the arguments it wants."""

    name: str
    weight: float
    function: RewardCallable
    arguments: tuple[str, ...]

    def __call__(self, prompt: Prompt, completion: Completion) -> float:
        """The unweighted reward; errors name this source and the prompt's row."""
        available: dict[str, Any] = {
            "prompt": prompt.text,
            "response": completion.text,
            "label": prompt.label,
            "token_ids": completion.token_ids,
            "metadata": prompt.metadata,
            "finish_reason": completion.finish_reason,
        }
        where = f"reward function {self.name!r}, prompt row {prompt.row}"
        try:
            value = self.function(**{name: available[name] for name in self.arguments})
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"{where}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error
        number = _as_float(value)
        if not math.isfinite(number):
            raise RewardError(f"{where}: a reward must be a finite number, got {value!r:.80}")
        return number


class Scorer:
    """The weighted sum of reward sources."""

    def __init__(self, sources: Sequence[RewardSource]) -> None:
        self.sources = tuple(sources)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in their order; `parts` are the unweighted rewards by name.

        Raises RewardError for a reward that is no finite number and for an exception in a reward
        function, naming the function and the prompt's row.
        """
        scores = []
        for completion in completions:
            prompt = prompts[completion.prompt_index]
            parts = {source.name: source(prompt, completion) for source in self.sources}
            value = sum(source.weight * parts[source.name] for source in self.sources)
            scores.append(Score(value, parts))
        return scores


def build_scorer(functions: Sequence[RewardFunction]) -> Scorer:
    """The scorer of `[reward] functions`.

    Raises ValueError, before anything has been generated, for an empty list, an unknown name, a
    name given twice, a file that does not load, or a parameter that nobody can fill.
    """
    if not functions:
        raise ValueError('no reward: set [reward] functions, as in [{ name = "exact_match" }]')
    sources: dict[str, RewardSource] = {}
    for entry in functions:
        if entry.name in sources:
            raise ValueError(f"reward function {entry.name!r} is listed twice; add up its weights")
        function = REWARDS.get(entry.name)
        arguments = arguments_of(function, entry.name)
        sources[entry.name] = RewardSource(entry.name, entry.weight, function, arguments)
    return Scorer(list(sources.values()))


def _as_float(value: Any) -> float:
    """A real number as a float, anything else as NaN."""
    if not isinstance(value, Real | np.bool_):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf
