"""Continuous batching: requests wait, take slots, are decoded step by step and leave.

A prompt is prefilled once for its n samples. Between two looks at the slots a runner decodes a few
tokens for each of them; sequences that ended then leave, and waiting ones take their slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from torchrft.rollout.native.kv_cache import Prefill
from torchrft.rollout.native.sessions import Held, Sessions
from torchrft.rollout.native.step import Step
from torchrft.types import Kept, Prompt

_PREFILL_TOKENS = 16384  # of one prefill pass, its keys padded, which bounds its memory


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt that gets a sample of at most `budget` tokens for each of the seeds."""

    number: int  # the caller's
    prompt: Prompt
    seeds: Sequence[int]
    budget: int
    shift: int = 0  # of the positions after the prompt, by its images
    session: Hashable = None  # the conversation that it is a turn of


@dataclass(eq=False)
class Sample:
    """A sample of a request: tokens, log-probs and how it ended are there once it is finished."""

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    sets: list[Tensor] = field(default_factory=list)  # with `replay`, of each token
    tail: list[int] = field(default_factory=list)  # the last tokens, where stop strings count
    seen_stop: bool = False  # a stop string may come before min_new_tokens

    @property
    def kept(self) -> Kept | None:
        """What the draws were among. A copy: views would keep all requests' tokens in memory."""
        if not self.sets:
            return None
        return Kept(torch.cat(self.sets), torch.tensor([len(ids) for ids in self.sets]))


class Runner(Protocol):
    """Runs a step, until the next look, for the first slots; see `EagerRunner`."""

    step: Step
    least_free: int

    def size(self, count: int) -> int: ...
    def run(self, batch: int) -> None: ...


class Scheduler:
    """Requests and the slots of one state.

    >>> scheduler.add(Request(0, prompt, seeds=[1, 2], budget=8))      # doctest: +SKIP
    >>> while scheduler.busy:                                          # doctest: +SKIP
    ...     for sample in scheduler.advance():
    ...         print(sample.index, sample.tokens)
    """

    def __init__(
        self, runner: Runner, decode: Callable[[list[int]], str], sessions: Sessions | None = None
    ) -> None:
        self.runner, self.step, self.state = runner, runner.step, runner.step.state
        self.decode, self.sessions = decode, sessions or Sessions(0)
        self.prefilled = 0  # prompt tokens that were run
        self.requests: deque[Request] = deque()
        self.prefill = Prefill()
        self.waiting: deque[tuple[int, Sample]] = deque()  # by row of the prefill
        self.samples: dict[int, Sample] = {}  # by slot

    def add(self, request: Request) -> None:
        """Its samples take slots as these become free."""
        self.requests.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.waiting or self.samples)

    def advance(self) -> list[Sample]:
        """One look: waiting samples take free slots, steps run; returns the samples that ended."""
        finished = []
        while self._admit():
            finished += self._retire()
        if self.samples:
            batch = self._fit()
            self.runner.run(batch)
            self._note(range(batch))
            finished += self._retire()
        return finished

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self.state.token.device)

    def _admit(self) -> bool:
        """Fills free slots with waiting samples; false when there is nothing to admit."""
        slots = len(self.state.token)
        free = slots - len(self.samples)
        if not free or not (self.requests or self.waiting):
            return False
        if self.samples and free < self.runner.least_free:
            return False
        if not self.waiting:
            self._prefill(slots)
        taken = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        rows, samples = [row for row, _ in taken], [sample for _, sample in taken]
        places = [slot for slot in range(slots) if slot not in self.samples][: len(taken)]
        self.samples.update(zip(places, samples, strict=True))
        slot, row = self._tensor(places), self._tensor(rows)
        self.step.cache.admit(slot, self.prefill, row)
        state, requests = self.state, [sample.request for sample in samples]
        state.length[slot] = self._tensor([len(r.prompt.token_ids) for r in requests])
        state.budget[slot] = self._tensor([r.budget for r in requests])
        state.seed[slot] = self._tensor([s.request.seeds[s.index] for s in samples])
        if state.shift is not None:
            state.shift[slot] = self._tensor([r.shift for r in requests])
        state.generated[slot] = 0
        state.live[slot], state.by_stop[slot] = True, False
        first = self.step.sampling.first_token_temperature
        self.step.take(slot, slot, self.prefill.logits[row], first)
        self._note(places)
        return True

    def _prefill(self, slots: int) -> None:
        """Runs the next prompts, as many as fill all slots, and keeps their keys.

        Equal prompts are run once. Those that continue a session run by themselves.
        """
        rows: dict[int | tuple[int, ...], int] = {}  # by what is equal
        prompts: list[Prompt] = []
        pasts: list[Held] = []
        longest = 0
        while self.requests and len(self.waiting) < slots:
            request = self.requests[0]
            prompt = request.prompt
            past = self.sessions.find(request.session, prompt.token_ids)
            if prompts and (past is None) == bool(pasts):
                break
            key = id(prompt) if prompt.images or past else prompt.token_ids
            if key not in rows:
                longest = max(longest, len(prompt.token_ids))
                if prompts and longest * (len(prompts) + 1) > _PREFILL_TOKENS:
                    break
                rows[key] = len(prompts)
                prompts.append(prompt)
                pasts += [past] if past else []
            self.requests.popleft()
            self.sessions.drop(request.session)  # its slot has it soon
            samples = [Sample(request, index) for index in range(len(request.seeds))]
            self.waiting += [(rows[key], sample) for sample in samples]
        self.prefill = self.step.decoder.prefill(prompts, pasts)
        held = sum(len(past.token_ids) for past in pasts)
        self.prefilled += sum(len(prompt.token_ids) for prompt in prompts) - held

    def _note(self, slots: Iterable[int]) -> None:
        """What the host alone keeps of the new tokens: what they were among, the text's end."""
        sampling = self.step.sampling
        if sampling.replay:
            for slot, ids in zip(slots, self.step.draw.sets, strict=True):
                self.samples[slot].sets.append(ids)
        if sampling.stop:
            tokens, generated = self.state.token.tolist(), self.state.generated.tolist()
            ended = [
                slot
                for slot in slots
                if self._holds_stop(self.samples[slot], tokens[slot])
                and generated[slot] >= sampling.min_new_tokens
            ]
            self.state.live[ended], self.state.by_stop[ended] = False, True

    def _holds_stop(self, sample: Sample, token: int) -> bool:
        """Whether one of the stop strings came, with this token or before."""
        stops = self.step.sampling.stop
        # A character may take up to four byte-level tokens.
        tail = 4 * max(len(stop) for stop in stops) + 4
        sample.tail = [*sample.tail[-tail:], token]
        text = self.decode(sample.tail)
        sample.seen_stop |= any(stop in text for stop in stops)
        return sample.seen_stop

    def _retire(self) -> list[Sample]:
        """Takes what ended sequences said, and frees their slots."""
        state, live = self.state, self.state.live.tolist()  # waits for the device
        ended = [slot for slot in self.samples if not live[slot]]
        if not ended:
            return []
        slot, finished = self._tensor(ended), [self.samples.pop(slot) for slot in ended]
        sizes = state.generated[slot].tolist()
        tokens, logprobs = (
            log[:, : max(sizes)][slot].tolist() for log in (state.out_token, state.out_logprob)
        )
        for row, stopped in enumerate(state.by_stop[slot].tolist()):
            sample, size = finished[row], sizes[row]
            sample.tokens, sample.logprobs = tokens[row][:size], logprobs[row][:size]
            sample.stopped = stopped
            if (session := sample.request.session) is not None:
                # The last token was sampled, but not read.
                read = (*sample.request.prompt.token_ids, *sample.tokens[:-1])
                self.sessions.keep(session, read, self.step.cache, ended[row])
        return finished

    def _fit(self) -> int:
        """Slots of the next steps, as few as hold all; those behind them move into holes."""
        batch = self.runner.size(len(self.samples))
        source = sorted(slot for slot in self.samples if slot >= batch)
        if source:
            target = [slot for slot in range(batch) if slot not in self.samples][: len(source)]
            for old, new in zip(source, target, strict=True):
                self.samples[new] = self.samples.pop(old)
            left, entered = self._tensor(source), self._tensor(target)
            self.step.cache.move(left, entered, int(self.state.length[left].max()))
            self.state.move(left, entered)
        return batch
