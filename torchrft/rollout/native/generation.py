"""One call of `generate`: admit, decode and retire sequences until none is left.

Requests are numbered prompt by prompt: request r is sample r % n of prompt r // n. A prompt is
prefilled once for its n samples. Every step decodes one token for each active sequence; sequences
that end leave at once and waiting ones take their slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchrft.models.attention import Layout
from torchrft.models.logprobs import product
from torchrft.models.vision import Vision, hidden_states
from torchrft.rollout.native.kv_cache import Decode, Prefill, SlotCache
from torchrft.rollout.native.lean import is_plain, lean_step
from torchrft.rollout.native.sampler import sample_among
from torchrft.tools import progress
from torchrft.types import Kept, Prompt, SamplingParams

_PREFILL_TOKENS = 16384  # of one prefill pass, its keys padded, which bounds its memory


@dataclass
class _Active:
    """State of the active sequences, slot by slot: int64 [B] each."""

    request: Tensor
    token: Tensor  # the last one sampled, not yet in the cache
    length: Tensor  # tokens in the cache
    generated: Tensor
    budget: Tensor
    seed: Tensor

    def select(self, rows: Tensor) -> _Active:
        return _Active(*torch.stack([getattr(self, n) for n in self.__dataclass_fields__])[:, rows])

    def extend(self, other: _Active) -> _Active:
        names = self.__dataclass_fields__
        return _Active(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in names))


class Generation:
    """The state of one `generate` call."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        stop_ids: tuple[int, ...],
        max_num_seqs: int,
        decode: Callable[[list[int]], str],
        vision: Vision | None = None,
    ) -> None:
        self.model, self.vision = model, vision
        self.base, self.head = model.get_decoder(), model.get_output_embeddings()
        self.plain, self.fp32_head = is_plain(self.base), False
        self.device = self.head.weight.device
        self.prompts, self.sampling, self.decode = prompts, sampling, decode
        stops = sorted({token for token in stop_ids if token < len(self.head.weight)})
        self.stop_ids = torch.tensor(stops, dtype=torch.long, device=self.device)
        count = len(prompts) * sampling.n
        self.slots = min(max_num_seqs, count)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        # One more than the longest sequence, since a slot is reserved for a token and the next.
        limit = max(length + sampling.budget(length) for length in lengths) + 1
        self.cache = SlotCache(self.slots, limit)
        self.waiting_prompts = deque(range(len(prompts)))
        self.waiting_samples: deque[tuple[int, int]] = deque()  # (row of the prefill, request)
        self.prefill = Prefill()
        self.prefill_logits = torch.empty(0)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.seeds, self.budgets = self._seeds(count), self._budgets()
        self.log: list[tuple[Tensor, Tensor, Tensor]] = []  # (request, token, logprob) by step
        self.kept: list[Kept] = []  # as the log, of sampling with `replay`
        self.tails: list[list[int]] = [[] for _ in range(count if sampling.stop else 0)]
        self.seen_stop = [False] * len(self.tails)  # a stop string may come before min_new_tokens
        self.shifts: Tensor | None = None  # by prompt, of the positions after it; None: no images
        if vision is not None and any(prompt.images for prompt in prompts):
            self.shifts = torch.tensor([vision.shift(p) for p in prompts], device=self.device)
        empty = torch.empty(0, dtype=torch.long, device=self.device)
        self.active = _Active(empty, empty, empty, empty, empty, empty)

    def _seeds(self, count: int) -> Tensor:
        if self.sampling.temperature == 0:  # nothing is drawn: the generators stay as they are
            return torch.zeros(count, dtype=torch.long, device=self.device)
        if self.sampling.seeds is None:
            return torch.randint(2**62, (count,)).to(self.device)
        flat = [seed for row in self.sampling.seeds for seed in row]
        return torch.tensor(flat, dtype=torch.long, device=self.device)

    def _budgets(self) -> Tensor:
        budgets = [self.sampling.budget(len(prompt.token_ids)) for prompt in self.prompts]
        return torch.tensor(budgets, device=self.device).repeat_interleave(self.sampling.n)

    @property
    def waiting(self) -> bool:
        return bool(self.waiting_prompts or self.waiting_samples)

    def run(self) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        """Tokens, log-probs and "ended by a stop" of every request."""
        n, count = self.sampling.n, len(self.budgets)
        while self.waiting or self.active.request.numel():
            left = len(self.waiting_prompts) * n + len(self.waiting_samples)
            progress.at(count - left - self.active.request.numel(), count, "samples")
            while self.admit():
                pass
            if self.active.request.numel():
                self.decode_step()
        request, token, logprob = (torch.cat(column) for column in zip(*self.log, strict=True))
        order = request.argsort(stable=True)  # the log is in order of time
        sizes = request.bincount(minlength=self.stopped.numel()).tolist()
        tokens = token[order].cpu().split(sizes)
        logprobs = logprob[order].cpu().split(sizes)
        return (
            [row.tolist() for row in tokens],
            [row.tolist() for row in logprobs],
            self.stopped.tolist(),
        )

    def kept_tokens(self) -> Sequence[Kept | None]:
        """By request, after `run`, the tokens that its draws were among; None without `replay`."""
        if not self.kept:
            return [None] * len(self.stopped)
        request = torch.cat([step[0] for step in self.log]).cpu()
        order, counts = request.argsort(stable=True), torch.cat([k.counts for k in self.kept])
        sizes = request.bincount(minlength=self.stopped.numel()).tolist()
        sets = torch.cat([kept.ids for kept in self.kept]).split(counts.tolist())
        # Copies: a view would keep all requests' tokens in memory, and in every checkpoint.
        return [
            Kept(torch.cat([sets[place] for place in places]), counts[places])
            for places in order.split(sizes)
        ]

    def admit(self) -> bool:
        """Fills free slots with waiting samples; false when there is nothing to admit."""
        first = self.active.request.numel()
        free = self.slots - first
        # A sixteenth of the slots at once, since every time costs some calls.
        if not free or not self.waiting or (first and free < self.slots // 16):
            return False
        if not self.waiting_samples:
            self.prefill_prompts()
        taken = [
            self.waiting_samples.popleft() for _ in range(min(free, len(self.waiting_samples)))
        ]
        rows = torch.tensor([row for row, _ in taken], device=self.device)
        request = torch.tensor([request for _, request in taken], device=self.device)
        lengths = [len(self.prompts[r // self.sampling.n].token_ids) for _, r in taken]
        self.cache.reserve(self.prefill.keys[0].shape[2] + 1, first, self.prefill)
        self.cache.admit(first, self.prefill, rows)
        new = _Active(
            request=request,
            token=request,  # replaced below
            length=torch.tensor(lengths, device=self.device),
            generated=torch.zeros_like(request),
            budget=self.budgets[request],
            seed=self.seeds[request],
        )
        old, self.active = self.active, new
        finished = self.take(self.prefill_logits[rows], self.sampling.first_token_temperature)
        self.active = old.extend(self.active)
        self.retire(torch.cat([torch.zeros_like(old.request, dtype=torch.bool), finished]))
        return True

    def prefill_prompts(self) -> None:
        """Runs the next waiting prompts, as many as fill all slots, and keeps their keys."""
        count = -(-self.slots // self.sampling.n)
        batch: list[int] = []
        longest = 0
        while self.waiting_prompts and len(batch) < count:
            longest = max(longest, len(self.prompts[self.waiting_prompts[0]].token_ids))
            if batch and longest * (len(batch) + 1) > _PREFILL_TOKENS:
                break
            batch.append(self.waiting_prompts.popleft())
        prompts, images = [self.prompts[index] for index in batch], None
        ids = [token for prompt in prompts for token in prompt.token_ids]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        ends = list(accumulate(lengths))
        self.prefill = Prefill(lengths, self.device)
        positions = self.prefill.row.positions[None]
        if self.vision is not None and any(prompt.images for prompt in prompts):
            spans = zip(prompts, [0, *ends], ends, strict=False)
            positions, images = self.vision.see(positions.cpu(), spans)
            positions, images = positions.to(self.device), images.to(self.device)
        row = torch.tensor([ids], device=self.device)
        hidden = hidden_states(self.model, row, positions, self.prefill, images)
        self.prefill_logits = self.logits(hidden[0, torch.tensor(ends, device=self.device) - 1])
        n = self.sampling.n
        self.waiting_samples.extend(
            (row, index * n + j) for row, index in enumerate(batch) for j in range(n)
        )

    def decode_step(self) -> None:
        """One token for every active sequence."""
        active = self.active
        self.cache.reserve(int(active.length.max()) + 1, active.length.numel(), self.prefill)
        layout = Decode(self.cache, active.length)
        positions = active.length
        if self.shifts is not None:
            positions = positions + self.shifts[active.request // self.sampling.n]
        hidden = self._forward(active.token[:, None], positions[:, None], layout)
        active.length = active.length + 1
        self.retire(self.take(self.logits(hidden[:, 0])))

    def _forward(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        if self.plain:
            return lean_step(self.base, ids[:, 0], positions, layout)[:, None]
        return hidden_states(self.model, ids, positions, layout, None)

    def logits(self, hidden: Tensor) -> Tensor:
        return product(hidden, self.head.weight) if self.fp32_head else self.head(hidden)

    def take(self, logits: Tensor, draw_temperature: float | None = None) -> Tensor:
        """Samples a token for every active sequence, records it, and says which have finished."""
        active, sampling = self.active, self.sampling
        forbidden = None
        if sampling.min_new_tokens > 0:
            early = active.generated < sampling.min_new_tokens
            forbidden = torch.zeros_like(logits, dtype=torch.bool)
            forbidden[:, self.stop_ids] = early[:, None]
        token, logprob, drawn = sample_among(
            logits,
            active.seed,
            active.generated,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            forbidden,
            draw_temperature=draw_temperature,
        )
        if sampling.replay:
            kept = (drawn > 0).scatter_(1, token[:, None], True)
            scaled = (logits.float() / sampling.temperature).masked_fill(~kept, -torch.inf)
            logprob = scaled.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
            self.kept.append(Kept(kept.nonzero()[:, 1].int().cpu(), kept.sum(1).cpu()))
        self.log.append((active.request, token, logprob))
        active.token, active.generated = token, active.generated + 1
        stopped = torch.isin(token, self.stop_ids)
        if sampling.stop:
            stopped |= self.ended_by_string()
        self.stopped[active.request] = stopped
        return stopped | (active.generated >= active.budget)

    def ended_by_string(self) -> Tensor:
        """Which active sequences hold one of the stop strings, and min_new_tokens tokens."""
        # A character may take up to four byte-level tokens.
        tail = 4 * max(len(stop) for stop in self.sampling.stop) + 4
        ended = []
        rows = zip(
            self.active.request.tolist(),
            self.active.token.tolist(),
            self.active.generated.tolist(),
            strict=True,
        )
        for request, token, generated in rows:
            tokens = self.tails[request] = [*self.tails[request][-tail:], token]
            text = self.decode(tokens)
            self.seen_stop[request] |= any(stop in text for stop in self.sampling.stop)
            ended.append(self.seen_stop[request] and generated >= self.sampling.min_new_tokens)
        return torch.tensor(ended, device=self.device)

    def retire(self, finished: Tensor) -> None:
        """Lets finished sequences go; the last others move into the holes."""
        left = (~finished).nonzero().squeeze(1)
        count = left.numel()
        if count == finished.numel():
            return
        holes = finished[:count].nonzero().squeeze(1)
        moved = left[count - holes.numel() :]
        if moved.numel():
            self.cache.move(moved, holes, int(self.active.length[moved].max()))
        order = torch.arange(count, device=self.device).index_copy_(0, holes, moved)
        self.active = self.active.select(order)
