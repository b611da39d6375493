"""What a source of rewards is: rules, models, servers and judges look alike to the scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # rule workers import this file, and do without torch
    from torchrft.types import Completion, Prompt


class RewardError(RuntimeError):
    """A reward that cannot be had or used; the message names the source and the prompt's row."""


class SampleError(RewardError):
    """A sample that a source can never judge: a fault of the data."""


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """One completion to be judged."""

    prompt: Prompt
    completion: Completion


@dataclass(frozen=True, slots=True)
class RewardResult:
    """A source's verdict on one completion; a function of the user's may return it, too.

    `parts` are logged as reward_parts/<source>/<part>, `metrics` as reward/<source>/<metric>, both
    as means over a rollout. With `error`, there is no verdict: the score becomes `error_reward`,
    the sample is counted in reward/<source>/errors, and the first such text is logged.

    >>> RewardResult(0.5, parts={"brevity": 0.1}).metrics
    {}
    """

    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


class RewardSource(Protocol):
    """Judges completions.

    A `collective` source works on all ranks together (a model sharded over them). It is called on
    every rank equally often, also with no request at all.
    """

    name: str
    collective: bool

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """One result per request, in their order. Raises RewardError to stop the run."""
        ...

    def close(self) -> None:
        """Ends what the source has started."""
        ...
