"""The records that pass between the parts: one typed, frozen dataclass per boundary.

data --Prompt--> rollout --Completion--> reward --Sample--> trainer --RolloutBatch--> loss
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from torchrft.tools.images import Image

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the prompt file, tokenized.

    `row` is the row's number in its file (0-based), `text` is what was tokenized (after the chat
    template), `messages` are the chat that the template was given (none without one), `label` and
    `metadata` go to the reward functions untouched. Of `images`, `token_ids` hold an image token
    for each feature, while `text` has one placeholder for each.

    >>> Prompt(row=0, text="1 2=", token_ids=(3, 4, 5), label="2").metadata
    {}
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    label: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an engine samples. `temperature = 0` is greedy; `top_p = 1` and `top_k = 0` are off.

    `first_token_temperature` draws a response's first token (FIRE, arXiv:2410.21236); its log-prob
    is at `temperature` all the same.

    With `replay`, completions say which tokens their draws were among (`Completion.kept`).

    `seeds[i][j]` seeds sample j of prompt i: equal seeds and weights give equal tokens, whatever
    else is in the batch. `max_total_tokens` bounds prompt + response, `max_new_tokens` the response
    alone.

    >>> SamplingParams(n=2, max_total_tokens=64).budget(prompt_len=60)
    4
    """

    n: int = 1
    temperature: float = 1.0
    first_token_temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    max_total_tokens: int = 4096
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seeds: tuple[tuple[int, ...], ...] | None = None
    replay: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        good = {
            "n": self.n >= 1,
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "stop": "" not in self.stop,
            "replay": not (self.replay and self.temperature == 0),
        }
        for name in (name for name, is_good in good.items() if not is_good):
            raise ValueError(f"SamplingParams: {name} = {getattr(self, name)!r} is out of range")

    def budget(self, prompt_len: int) -> int:
        """Tokens that may be generated after a prompt of `prompt_len` tokens."""
        room = self.max_total_tokens - prompt_len
        return room if self.max_new_tokens is None else min(room, self.max_new_tokens)


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens that truncated sampling could draw, for each of T response tokens.

    `counts` int64 [T] are their numbers, `ids` int32 [sum of counts] the tokens, one response token
    after the other.
    `Kept(ids=[2, 4, 0], counts=[2, 1])`: tokens 2 and 4 for the first one, 0 for the second.
    """

    ids: Tensor
    counts: Tensor

    @classmethod
    def join(cls, parts: Sequence[Kept]) -> Kept:
        """The response tokens of all `parts`, in their order."""
        return cls(torch.cat([p.ids for p in parts]), torch.cat([p.counts for p in parts]))

    def part(self, rows: slice) -> Kept:
        """That of the response tokens `rows`, neighbors."""
        first, ends = int(self.counts[: rows.start or 0].sum()), self.counts[rows]
        return Kept(self.ids[first : first + int(ends.sum())], ends)

    def mask(self, size: int, start: int = 0) -> Tensor:
        """bool [T, size]: whether the tokens from `start` on are kept."""
        rows = torch.arange(len(self.counts), device=self.ids.device)
        rows, columns = rows.repeat_interleave(self.counts), self.ids.long() - start
        here = (columns >= 0) & (columns < size)
        mask = torch.zeros(len(self.counts), size, dtype=torch.bool, device=self.ids.device)
        mask[rows[here], columns[here]] = True
        return mask

    def to(self, device: torch.device | str) -> Kept:
        return Kept(self.ids.to(device), self.counts.to(device))


@dataclass(frozen=True, slots=True)
class Branch:
    """A training row of an episode: a prompt and T tokens after it, sampled or observed.

    `turn_ends[k]` is the place in `token_ids` behind the last sampled token of turn k;
    `turn_rewards[k]` and `versions[k]` are that turn's reward and the policy that sampled it.
    """

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]  # [T]: the loss mask
    logprobs: tuple[float, ...]  # [T], 0.0 where observed
    turn_ends: tuple[int, ...] = ()
    turn_rewards: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()

    def places(self) -> Tensor:
        """int64, where the sampled tokens are in prompt + token_ids."""
        return torch.tensor(self.sampled).nonzero()[:, 0] + len(self.prompt)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response, or all that was sampled in an episode.

    `token_ids` includes the stop token if one ended it; `logprobs` are the engine's, one per token,
    at the sampling temperature and before top-p / top-k, unless `kept` holds the tokens that these
    left: then the log-probs are over those alone. `policy_version` counts the weight updates
    the engine had received. `prompt_index` is the position in the list given to `generate`.

    An episode of several turns has `branches`, which are trained on: `token_ids` and `logprobs` are
    those of their sampled tokens, one branch after the other, and `text` is the last reply. Its
    `reward` and `metrics` are the environment's; with a `fault` of it there is no reward.

    >>> Completion(0, 0, (7, 1), (-0.1, -0.2), "7", "stop", policy_version=3).policy_version
    3
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int = 0
    kept: Kept | None = field(default=None, compare=False)
    branches: tuple[Branch, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    reward: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None


class Sampler(Protocol):
    """What samples completions: an engine, or a player of episodes on one."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """`sampling.n` completions of each prompt."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


class Serving(Protocol):
    """An engine as it answers single requests, while others come; all are sampled alike.

    Where several ranks share the engine, each of them calls `advance` as often as the others, and
    `close` in the end.
    """

    def submit(
        self, prompt: Prompt, seed: int | None, session: Hashable = None
    ) -> Future[Completion]:
        """Asks for one completion, with prompt and sample number 0.

        A `session` is a conversation: the engine may keep what it has computed of it until its next
        request. Raises ValueError for a prompt that leaves no room for a response.
        """
        ...

    def advance(self) -> bool:
        """Runs the engine on for a moment, if it runs in the calling thread and has work."""
        ...

    def release(self, session: Hashable) -> None:
        """Drops what is kept of a session that has ended."""
        ...

    def close(self, failed: bool = False) -> None:
        """Ends what is under way; ranks that share the engine first end their own, unless one of
        them has `failed`."""
        ...


@runtime_checkable
class Serves(Protocol):
    """An engine that takes single requests."""

    def serve(self, sampling: SamplingParams, at_once: int) -> Serving:
        """Opens it for about `at_once` requests at a time; `n` and `seeds` of `sampling` have no
        effect. Close it before anything else is asked of the engine."""
        ...


@dataclass(frozen=True, slots=True)
class Score:
    """A sample's reward, the parts it is the weighted sum of, and what else its sources measured.

    >>> Score(1.5, {"exact_match": 1.0, "format": 0.5}).value
    1.5
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """A scored completion with its prompt. `group` is equal for the completions of one prompt.

    A `filler` only gives its rank something to compute: it does not count in the loss.
    """

    prompt: Prompt
    completion: Completion
    score: Score
    group: int
    filler: bool = False


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """What the loss needs of B samples, in response-aligned tensors of shape [B, T].

    T is the longest response of the batch; column t belongs to response token t. `sequences[i]`
    holds prompt + response of sample i as int64 [prompt_lens[i] + response_lens[i]]. Of an episode,
    column t belongs to its sampled token t, whatever branch that is in, and `sequences[i]` is its
    first branch: so an episode counts as one sequence.
    """

    sequences: tuple[Tensor, ...]
    prompt_lens: Tensor  # int64 [B], on the host like the sequences
    mask: Tensor  # bool [B, T], true on response tokens
    rewards: Tensor  # float32 [B]
    group: Tensor  # int64 [B]
    rollout_logprobs: Tensor  # float32 [B, T]
    advantages: Tensor | None = None  # float32 [B, T]
    returns: Tensor | None = None  # float32 [B, T]
    old_logprobs: Tensor | None = None  # float32 [B, T]; None means "the policy's own, detached"
    ref_logprobs: Tensor | None = None  # float32 [B, T]
    old_values: Tensor | None = None  # float32 [B, T], the critic's
    entropy: Tensor | None = None  # float32 [B, T], of the old policy
    keep: Tensor | None = None  # bool [B, T]: whose policy loss counts; None means all
    filler: Tensor | None = None  # bool [B]: of samples that do not count; None means of none
    prompts: tuple[Prompt, ...] | None = None  # of the samples; None if none of them has images
    kept: tuple[Kept, ...] | None = None  # of the samples, where log-probs are over those tokens
    branches: tuple[tuple[Branch, ...], ...] | None = None  # of the samples; None without episodes

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: list[int]) -> RolloutBatch:
        """The samples `rows`, in that order; T stays as it is."""

        def taken(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(value[row] for row in rows)
            return None if value is None else value[rows]

        return RolloutBatch(*(taken(getattr(self, name)) for name in self.__dataclass_fields__))
