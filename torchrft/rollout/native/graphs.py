"""`generate` on a GPU: the decode step is one CUDA graph, so the host does nothing per token.

All state lies in tensors of fixed size, one row per slot. Every `_CHUNK` steps the host looks which
sequences have ended, takes their tokens, lets waiting ones in and, when few are left, goes over to
a graph for fewer slots. What a slot does between its end and that look is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchrft.rollout.native.generation import Generation
from torchrft.rollout.native.kv_cache import Prefill, attend_masked
from torchrft.rollout.native.sampler import sample

_CHUNK = 16  # steps between two looks: at most so many are run in vain for a sequence
_FEWEST = 8  # slots of the smallest graph


def supports(model: Any, stop_strings: bool) -> bool:
    """Whether all of a step can be captured: flash attention in 16 bits, no sliding window, and no
    stop strings, which need the text of every token."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    weight = model.get_output_embeddings().weight
    return (
        weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and kinds == {"full_attention"}
        and (getattr(text, "sliding_window", None) is None or _is_off(text))
        and not stop_strings
    )


def _is_off(text: Any) -> bool:
    return getattr(text, "use_sliding_window", None) is False


class _SlotAttention:
    """Attention layout of one new token for each of the first slots.

    keys, values: per layer [slots, T, Hkv, D]; `begin` is called at the start of every step.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], batch: int) -> None:
        self.keys, self.values, self.batch = keys, values, batch
        device, self.room = keys[0].device, keys[0].shape[1]
        self.first = torch.arange(batch, device=device) * self.room
        self.cu_keys = (torch.arange(batch + 1, device=device) * self.room).int()
        self.cu_queries: dict[int, Tensor] = {}

    def begin(self, lengths: Tensor) -> None:
        self.rows = self.first + lengths
        self.used = (lengths + 1).int()
        self.lengths = lengths

    def _starts(self, group: int) -> Tensor:
        if group not in self.cu_queries:
            self.cu_queries[group] = self.cu_keys // self.room * group
        return self.cu_queries[group]

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        batch, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        group = heads // kv_heads
        keys, values = self.keys[layer], self.values[layer]
        for cache, new in ((keys, key), (values, value)):
            cache.view(-1, kv_heads, dim).index_copy_(0, self.rows, new[:, :, 0])
        # The query heads of a group become query tokens, so that keys are read once per group.
        query = query.view(batch, kv_heads, group, dim)
        if not query.is_cuda:
            width = int(self.lengths.max()) + 1
            keys, values = (t[:batch, :width].transpose(1, 2) for t in (keys, values))
            out = attend_masked(query, keys, values, self.lengths, scale)
            return out.reshape(batch, 1, heads, dim)
        out = torch.ops.aten._flash_attention_forward(
            query.transpose(1, 2).reshape(batch * group, kv_heads, dim),
            keys[:batch].view(-1, kv_heads, dim),
            values[:batch].view(-1, kv_heads, dim),
            self._starts(group),
            self.cu_keys,
            group,
            self.room,
            0.0,
            False,
            False,
            scale=scale,
            seqused_k=self.used,
        )[0]
        return out.view(batch, group, kv_heads, dim).transpose(1, 2).reshape(batch, 1, heads, dim)


class GraphGeneration(Generation):
    """The state of one `generate` call, in tensors that a graph reads and writes.

    Without CUDA the same steps run one by one, so that they can be tested.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        slots, device = self.slots, self.device
        self.longest = int(self.budgets.max())

        def zeros(*size: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.token, self.length, self.generated = zeros(slots), zeros(slots), zeros(slots)
        self.budget, self.seed = zeros(slots), zeros(slots)
        self.live, self.by_stop = (zeros(slots, dtype=torch.bool) for _ in range(2))
        self.out_token = zeros(slots, self.longest)
        self.out_logprob = zeros(slots, self.longest, dtype=torch.float32)
        count = len(self.stopped)
        self.tokens = zeros(count, self.longest)
        self.logprobs = zeros(count, self.longest, dtype=torch.float32)
        self.sizes = zeros(count)
        self.request = [-1] * slots  # by slot; -1: free
        # A table, since torch.isin sorts many ids, which cannot be captured.
        self.is_stop = zeros(self.head.weight.shape[0], dtype=torch.bool)
        self.is_stop[self.stop_ids[self.stop_ids < len(self.is_stop)]] = True
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.batch = slots
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool: Any = None

    def run(self) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        while True:
            while self.waiting and -1 in self.request:
                self.let_in()
            self.retire_ended()
            if self.waiting and -1 in self.request:
                continue
            if all(request < 0 for request in self.request):
                break
            self.shrink()
            replay = self.replays.get(self.batch) or self.capture(self.batch)
            for _ in range(_CHUNK):
                replay()
        sizes = self.sizes.tolist()
        tokens = [row[:n] for row, n in zip(self.tokens.tolist(), sizes, strict=True)]
        logprobs = [row[:n] for row, n in zip(self.logprobs.tolist(), sizes, strict=True)]
        return tokens, logprobs, self.stopped.tolist()

    def on_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    # ---------------------------------------------------------------- admission

    def let_in(self) -> None:
        """Waiting samples take free slots; their first tokens come from the prompts' logits."""
        free = [slot for slot, request in enumerate(self.request) if request < 0]
        if not self.waiting_samples:
            self.prefill_prompts(len(free))
        if not self.keys:
            self.allocate(self.prefill)
        count = min(len(free), len(self.waiting_samples))
        taken = [self.waiting_samples.popleft() for _ in range(count)]
        slots, rows, requests = free[:count], [row for row, _ in taken], [r for _, r in taken]
        for place, sample_of in zip(slots, requests, strict=True):
            self.request[place] = sample_of
        slot, row, request = map(self.on_device, (slots, rows, requests))
        for cache, source in ((self.keys, self.prefill.keys), (self.values, self.prefill.values)):
            for held, new in zip(cache, source, strict=True):
                held[slot, : new.shape[2]] = new[row].transpose(1, 2)
        lengths = [len(self.prompts[r // self.sampling.n].token_ids) for r in requests]
        self.length[slot] = torch.tensor(lengths, device=self.device)
        self.generated[slot] = 0
        self.budget[slot], self.seed[slot] = self.budgets[request], self.seeds[request]
        self.live[slot], self.by_stop[slot] = True, False
        first = self.sampling.first_token_temperature
        self.record(slot, self.prefill_logits[row], first)
        if max(slots) >= self.batch:  # a larger graph again
            self.batch = self.slots

    def allocate(self, like: Prefill) -> None:
        for new, cache in ((like.keys, self.keys), (like.values, self.values)):
            for tensor in new:
                _, heads, _, dim = tensor.shape
                cache.append(tensor.new_zeros(self.slots, self.cache.limit, heads, dim))

    # ---------------------------------------------------------------- one step

    def record(self, slots: Tensor, logits: Tensor, draw_temperature: float | None = None) -> None:
        """Samples a token for each of `slots` and keeps it where the sequence is live."""
        live, generated = self.live[slots], self.generated[slots]
        forbidden = None
        if self.sampling.min_new_tokens > 0:
            early = generated < self.sampling.min_new_tokens
            forbidden = torch.zeros_like(logits, dtype=torch.bool)
            forbidden[:, self.stop_ids] = early[:, None]
        token, logprob = sample(
            logits,
            self.seed[slots],
            generated,
            self.sampling.temperature,
            self.sampling.top_p,
            self.sampling.top_k,
            forbidden,
            draw_temperature=draw_temperature,
        )
        place = generated.clamp(max=self.longest - 1)
        kept = torch.where(live, token, self.out_token[slots, place])
        self.out_token[slots, place] = kept
        self.out_logprob[slots, place] = torch.where(live, logprob, self.out_logprob[slots, place])
        generated = generated + live
        stopped = live & self.is_stop[token]
        self.token[slots], self.generated[slots] = token, generated
        self.by_stop[slots] |= stopped
        self.live[slots] = live & ~stopped & (generated < self.budget[slots])

    def step(self, batch: int, attention: _SlotAttention, slots: Tensor) -> None:
        lengths = self.length[:batch]
        attention.begin(lengths)
        hidden = self._forward(self.token[:batch, None], lengths[:, None], attention)
        # The token that was read is in the cache now; sequences that ended stay where they are.
        self.length[:batch] += self.live[:batch]
        self.record(slots, self.head(hidden[:, 0]))

    def capture(self, batch: int) -> Callable[[], None]:
        """A function that runs a step of the first `batch` slots; on a GPU, a graph's replay."""
        attention = _SlotAttention(self.keys, self.values, batch)
        slots = torch.arange(batch, device=self.device)

        def once() -> None:
            self.step(batch, attention, slots)

        if self.device.type == "cuda":
            # A run ahead of the capture makes what is made once; it must not change the state.
            state = (self.token, self.length, self.generated, self.live, self.by_stop)
            before = [tensor.clone() for tensor in state]
            written = self.out_token.clone(), self.out_logprob.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                once()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                once()
            self.pool = self.pool or graph.pool()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            self.out_token.copy_(written[0])
            self.out_logprob.copy_(written[1])

            def replay(_holds: object = once) -> None:  # a graph does not keep its tensors alive
                graph.replay()

            self.replays[batch] = replay
        else:
            self.replays[batch] = once
        return self.replays[batch]

    # ---------------------------------------------------------------- between the steps

    def retire_ended(self) -> None:
        """Takes what ended sequences said, and frees their slots."""
        live = self.live.tolist()  # waits for the GPU
        ended = [s for s, r in enumerate(self.request) if r >= 0 and not live[s]]
        if not ended:
            return
        slot, request = map(self.on_device, (ended, [self.request[s] for s in ended]))
        self.tokens[request] = self.out_token[slot]
        self.logprobs[request] = self.out_logprob[slot]
        self.sizes[request] = self.generated[slot]
        self.stopped[request] = self.by_stop[slot]
        for s in ended:
            self.request[s] = -1

    def shrink(self) -> None:
        """Goes over to a graph for fewer slots once all sequences fit there."""
        if self.waiting:
            return
        busy = [slot for slot, request in enumerate(self.request) if request >= 0]
        batch = self.batch
        while batch // 2 >= max(len(busy), _FEWEST):
            batch //= 2
        if batch == self.batch:
            return
        self.batch = batch
        source = [slot for slot in busy if slot >= batch]
        target = [slot for slot in range(batch) if self.request[slot] < 0][: len(source)]
        if not source:
            return
        for old, new in zip(source, target, strict=True):
            self.request[new], self.request[old] = self.request[old], -1
        left, entered = map(self.on_device, (source, target))
        for tensor in (
            *(self.token, self.length, self.generated, self.budget, self.seed),
            *(self.live, self.by_stop, self.out_token, self.out_logprob),
            *self.keys,
            *self.values,
        ):
            tensor[entered] = tensor[left]
        self.live[left] = False
