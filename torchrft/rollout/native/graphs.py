"""`generate` on a GPU: the decode step is one CUDA graph, so the host does nothing per token.

All state lies in tensors of fixed size, one row per slot. Every `_CHUNK` steps the host looks which
sequences have ended, takes their tokens, lets waiting ones in and, when few are left, goes over to
a graph for fewer slots. What a slot does between its end and that look is not recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models import attention
from torchrft.rollout.native.generation import Generation
from torchrft.rollout.native.kv_cache import attend_masked
from torchrft.rollout.native.sampler import sample

_CHUNK = 16  # steps between two looks: at most so many are run in vain for a sequence
_FEWEST = 8  # slots of the smallest graph
_ROOM = 64  # a slot's room is a multiple: fewer shapes to compile for
_PART, _BLOCKS = 64, 192  # keys of the smallest part; so many parts keep a GPU busy


def supports(model: Any, stop_strings: bool) -> bool:
    """Whether all of a step can be captured: flash attention in 16 bits of values as wide as keys,
    no sliding window, and no stop strings, which need the text of every token."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    weight = model.get_output_embeddings().weight
    return (
        weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and kinds == {"full_attention"}
        and (getattr(text, "sliding_window", None) is None or _is_off(text))
        and not stop_strings
        and not any(hasattr(text, name) for name in ("kv_lora_rank", "v_head_dim"))
    )


def _is_off(text: Any) -> bool:
    return getattr(text, "use_sliding_window", None) is False


class _SlotAttention:
    """Attention layout of one new token for each of the first slots.

    keys, values: [layers, slots, T, Hkv, D]; least: keys of the smallest part. `begin` is called at
    the start of every step. The layer is a number, or its row of `handles` where a compiled layer
    runs for all of them.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, batch: int, heads: int, least: int = _PART
    ) -> None:
        self.keys, self.values, self.batch = keys, values, batch
        _, self.slots, self.room, kv_heads, _ = keys.shape
        self.group = heads // kv_heads
        # With few sequences the keys of each are split in parts, which are merged afterwards.
        parts = max(1, min(_BLOCKS // (batch * kv_heads), self.room // least))
        self.size = -(-self.room // parts // _PART) * _PART
        self.cuts = list(range(0, self.room, self.size))  # a list's length is constant to compile
        layers = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
        places = torch.arange(batch + 1, device=keys.device)
        self.places = places[:-1]
        self.starts = torch.tensor(self.cuts, device=keys.device)
        self.sizes = (self.room - self.starts).clamp(max=self.size)
        first = (layers * self.slots + places[:, None]) * self.room + self.starts
        first = first.flatten(1)[:, : batch * len(self.cuts) + 1]
        # Rows of whole 16 bytes: compiled code would copy others.
        self.handles = F.pad(torch.cat([layers[:, 0], first], 1), (0, -(first.shape[1] + 1) % 4))
        self.handles = self.handles.int()
        ends = torch.arange(batch * len(self.cuts) + 1, device=keys.device)
        self.cu_queries = (ends * self.group).int()

    def begin(self, lengths: Tensor) -> None:
        self.lengths = lengths
        used = (lengths[:, None] + 1 - self.starts).clamp(min=0)  # [batch, parts]
        self.used = used.minimum(self.sizes).int()

    def __call__(
        self,
        layer: int | Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        batch, heads, _, dim = query.shape
        kv_heads, group, parts = key.shape[1], self.group, len(self.cuts)
        handle = layer if isinstance(layer, Tensor) else self.handles[layer]
        layer, cu_keys = handle[:1], handle[1 : 2 + batch * parts]
        # Into the whole cache: through a view, torch 2.11 would compile a copy of it.
        self.keys[layer, self.places, self.lengths] = key[:, :, 0]
        self.values[layer, self.places, self.lengths] = value[:, :, 0]
        # The query heads of a group become query tokens, so that keys are read once per group.
        grouped = query.view(batch, kv_heads, group, dim)
        if not query.is_cuda:
            width = int(self.lengths.max()) + 1
            keys, values = (
                held[int(layer)][:batch, :width].transpose(1, 2)
                for held in (self.keys, self.values)
            )
            out = attend_masked(grouped, keys, values, self.lengths, scale)
            return out.reshape(batch, 1, heads, dim)
        queries = grouped[:, None].expand(-1, parts, -1, -1, -1).transpose(2, 3)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            queries.reshape(-1, kv_heads, dim),
            self.keys.view(-1, kv_heads, dim),
            self.values.view(-1, kv_heads, dim),
            self.cu_queries,
            cu_keys,
            group,
            self.size,
            0.0,
            False,
            False,
            scale=scale,
            seqused_k=self.used.view(-1),
        )
        return merged(out, lse, self.used, parts).reshape(batch, 1, heads, dim)


def merged(out: Tensor, lse: Tensor, used: Tensor, parts: int) -> Tensor:
    """[B, Hkv, G, D], attention to all keys from attention to each part of them.

    Args: out [B * parts * G, Hkv, D] and lse float [Hkv, B * parts * G], its log-sum-exp; used
        int [B, parts], how many keys a part has.
    """
    _, kv_heads, dim = out.shape
    out = out.view(len(used), parts, -1, kv_heads, dim).transpose(2, 3)
    if parts == 1:
        return out[:, 0]
    by_part = lse.view(kv_heads, len(used), parts, -1).permute(1, 2, 0, 3)
    # Flash attention gives infinity for a part without keys.
    share = by_part.where(used[:, :, None, None] > 0, -torch.inf).softmax(1)
    return (share[..., None] * out).sum(1).to(out.dtype)


class GraphGeneration(Generation):
    """The state of one `generate` call, in tensors that a graph reads and writes.

    Without CUDA the same steps run one by one, so that they can be tested.
    """

    def __init__(self, *args: Any, compiled: bool, warm: set[tuple[float, ...]], **options: Any):
        super().__init__(*args, **options)
        self.warm = warm  # what steps of any call ran with before
        self.record_step = torch.compile(_record) if compiled else _record
        self.attention = attention.TRACED if compiled else attention.NAME
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
        self.is_stop[self.stop_ids] = True
        self.shift = zeros(slots) if self.shifts is not None else None
        self.keys = self.values = torch.empty(0)
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
        self.replays.clear()  # they refer to this object: only a garbage collection would free it
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
            self.prefill_prompts()
        if not self.keys.numel():
            self.keys, self.values = map(self.allocate, (self.prefill.keys, self.prefill.values))
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
        if self.shift is not None and self.shifts is not None:
            self.shift[slot] = self.shifts[request // self.sampling.n]
        first = self.sampling.first_token_temperature
        self.record(slot, self.prefill_logits[row], first)
        if max(slots) >= self.batch:  # a larger graph again
            self.batch = self.slots

    def allocate(self, like: list[Tensor]) -> Tensor:
        """The cache [layers, slots, T, Hkv, D]; `like` is [P, Hkv, L, D] of every layer."""
        (_, heads, _, dim), *others = (tensor.shape for tensor in like)
        if any((shape[1], shape[3]) != (heads, dim) for shape in others):
            raise ValueError(f"{type(self.base).__name__}: its layers differ in their heads")
        room = -(-self.cache.limit // _ROOM) * _ROOM
        return like[0].new_zeros(len(like), self.slots, room, heads, dim)

    # ---------------------------------------------------------------- one step

    def record(self, slots: Tensor, logits: Tensor, draw_temperature: float | None = None) -> None:
        """Samples a token for each of `slots` and keeps it where the sequence is live."""
        state = (self.live, self.by_stop, self.token, self.generated, self.budget, self.seed)
        log, stops = (self.out_token, self.out_logprob), (self.stop_ids, self.is_stop)
        how = self.sampling
        options = (how.temperature, how.top_p, how.top_k, how.min_new_tokens, draw_temperature)
        self.record_step(slots, logits, state, log, stops, options)

    def step(self, batch: int, layout: _SlotAttention, slots: Tensor) -> None:
        lengths = self.length[:batch]
        layout.begin(lengths)
        config = self.base.config
        config._attn_implementation = self.attention
        positions = lengths if self.shift is None else lengths + self.shift[:batch]
        hidden = self._forward(self.token[:batch, None], positions[:, None], layout)
        config._attn_implementation = attention.NAME
        # The token that was read is in the cache now; sequences that ended stay where they are.
        self.length[:batch] += self.live[:batch]
        self.record(slots, self.logits(hidden[:, 0]))

    def capture(self, batch: int) -> Callable[[], None]:
        """A function that runs a step of the first `batch` slots; on a GPU, a graph's replay."""
        heads = self.base.config.get_text_config().num_attention_heads
        # Merging takes eight kernels that are not compiled: parts must be worth it.
        least = _PART if self.attention == attention.TRACED else 8 * _PART
        layout = _SlotAttention(self.keys, self.values, batch, heads, least)
        for module in self.base.modules():
            if hasattr(module, "layer_index"):
                module.layer_index = layout.handles[module.layer_idx]
        slots = torch.arange(batch, device=self.device)

        def once() -> None:
            self.step(batch, layout, slots)

        self.replays[batch] = once
        if self.device.type == "cuda":
            self.warm_up(batch, once)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                once()
            self.pool = self.pool or graph.pool()

            def replay(_holds: object = once) -> None:  # a graph does not keep its tensors alive
                graph.replay()

            self.replays[batch] = replay
        return self.replays[batch]

    def warm_up(self, batch: int, once: Callable[[], None]) -> None:
        """The first run of a step compiles and allocates, which cannot be captured."""
        how = self.sampling
        kind = (how.temperature, how.top_p, how.top_k, how.min_new_tokens)
        # A first token of its own temperature compiles something else.
        first = how.first_token_temperature or 0.0
        key = (batch, *self.keys.shape, self.longest, len(self.stop_ids), first, *kind)
        if key in self.warm:
            return
        self.warm.add(key)
        state = (
            *(self.token, self.length, self.generated, self.live, self.by_stop),
            *(self.out_token, self.out_logprob),
        )
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

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
            *([] if self.shift is None else [self.shift]),
            *(self.live, self.by_stop, self.out_token, self.out_logprob),
            *self.keys,  # layer by layer
            *self.values,
        ):
            tensor[entered] = tensor[left]
        self.live[left] = False


def _record(
    slots: Tensor,
    logits: Tensor,
    state: tuple[Tensor, ...],
    log: tuple[Tensor, Tensor],
    stops: tuple[Tensor, Tensor],
    options: tuple[float, float, int, int, float | None],
) -> None:
    """`GraphGeneration.record`, without its object, so that it is compiled as a whole."""
    live_of, by_stop, token_of, generated_of, budget, seed = state
    out_token, out_logprob = log
    stop_ids, is_stop = stops
    temperature, top_p, top_k, min_new_tokens, draw_temperature = options
    live, generated = live_of[slots], generated_of[slots]
    forbidden = None
    if min_new_tokens > 0:
        early = generated < min_new_tokens
        forbidden = torch.zeros_like(logits, dtype=torch.bool)
        forbidden[:, stop_ids] = early[:, None]
    token, logprob = sample(
        logits,
        seed[slots],
        generated,
        temperature,
        top_p,
        top_k,
        forbidden,
        draw_temperature=draw_temperature,
    )
    place = generated.clamp(max=out_token.shape[1] - 1)
    out_token[slots, place] = torch.where(live, token, out_token[slots, place])
    out_logprob[slots, place] = torch.where(live, logprob, out_logprob[slots, place])
    generated = generated + live
    stopped = live & is_stop[token]
    token_of[slots], generated_of[slots] = token, generated
    by_stop[slots] |= stopped
    live_of[slots] = live & ~stopped & (generated < budget[slots])
