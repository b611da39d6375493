"""A decode step as one CUDA graph: the host does nothing per token.

A graph reads and writes tensors that stay where they are. The host looks only every `STEPS` steps
which sequences have ended; what a slot does between its end and that look is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models.support import changes_scores, mixers
from torchrft.rollout.native.kv_cache import Prefill, SlotCache
from torchrft.rollout.native.step import Step
from torchrft.types import SamplingParams

STEPS = 16  # between two looks: at most so many are run in vain for a sequence
_FEWEST = 8  # slots of the smallest graph
_ROOM = 64  # a slot's room is a multiple: fewer shapes to compile for
_PART, _BLOCKS = 64, 192  # keys of the smallest part; so many parts keep a GPU busy


def supports(model: Any, sampling: SamplingParams) -> bool:
    """Whether all of a step can be captured: flash attention in 16 bits of values as wide as keys,
    no sliding window, no changed scores, no mixers, no stop strings, which need the text of every
    token, and no `replay`: what draws were among has no fixed size."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    has_window_off = getattr(text, "use_sliding_window", None) is False
    weight = model.get_output_embeddings().weight
    return (
        weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and kinds == {"full_attention"}
        and (getattr(text, "sliding_window", None) is None or has_window_off)
        and not (sampling.stop or sampling.replay)
        and not changes_scores(model.config, type(model))
        and not mixers(model.config, type(model))
        and not any(hasattr(text, name) for name in ("kv_lora_rank", "v_head_dim"))
    )


class FixedCache(SlotCache):
    """Slots of one size, laid out as flash attention reads them: [layers, slots, T, Hkv, D].

    `keys` and `values` are views of it. heads: of the query; compiled: whether attention is.
    """

    def __init__(self, slots: int, limit: int, heads: int, compiled: bool) -> None:
        super().__init__(slots, -(-limit // _ROOM) * _ROOM)
        # Merging takes eight kernels that are not compiled: parts must be worth it.
        self.heads, self.least = heads, _PART if compiled else 8 * _PART

    def allocate(self, prompts: Prefill) -> None:
        shapes = {(x.shape[1], x.shape[3]) for x in (*prompts.keys, *prompts.values)}
        if len(shapes) > 1:
            raise ValueError(f"the layers differ in their heads and widths: {sorted(shapes)}")
        ((heads, dim),) = shapes
        size = len(prompts.keys), self.slots, self.limit, heads, dim
        self.whole = prompts.keys[0].new_zeros(size), prompts.keys[0].new_zeros(size)
        self.keys, self.values = ([layer.transpose(1, 2) for layer in x] for x in self.whole)

    def layout(self, batch: int) -> SlotAttention:
        return SlotAttention(*self.whole, batch, self.heads, self.least)


class SlotAttention:
    """Attention layout of one new token for each of the first slots, live or not.

    keys, values: [layers, slots, T, Hkv, D]; least: keys of the smallest part. `begin` is called at
    the start of every step. The layer is a number, or its row of `handles` where a compiled layer
    runs for all of them.
    """

    traced = True  # torch.compile may look into it

    def __init__(self, keys: Tensor, values: Tensor, batch: int, heads: int, least: int) -> None:
        self.keys, self.values = keys, values
        count, slots, room, kv_heads, _ = keys.shape
        self.group = heads // kv_heads
        # With few sequences the keys of each are split in parts, which are merged afterwards.
        parts = max(1, min(_BLOCKS // (batch * kv_heads), room // least))
        self.size = -(-room // parts // _PART) * _PART
        self.cuts = list(range(0, room, self.size))  # a list's length is constant to compile
        layers = torch.arange(count, device=keys.device)[:, None, None]
        places = torch.arange(batch + 1, device=keys.device)
        self.places = self.slots = places[:-1]
        self.starts = torch.tensor(self.cuts, device=keys.device)
        self.sizes = (room - self.starts).clamp(max=self.size)
        first = (layers * slots + places[:, None]) * room + self.starts
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
        layer: Any,
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
            keys, values = (x[layer[0], :batch].transpose(1, 2) for x in (self.keys, self.values))
            inside = torch.arange(keys.shape[2]) <= self.lengths[:, None, None, None]
            out = F.scaled_dot_product_attention(grouped, keys, values, inside, scale=scale)
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


class GraphRunner:
    """Runs a step as a CUDA graph, of so many slots that halving them leaves too few.

    Without CUDA the same steps run one by one, so that they can be tested.
    """

    least_free = 0

    def __init__(self, step: Step, warm: set[tuple[float, ...]]) -> None:
        self.step = step
        self.warm = warm  # what steps of any scheduler ran with before
        self.slots = len(step.state.token)
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool: Any = None

    def size(self, count: int) -> int:
        batch = self.slots
        while batch // 2 >= max(count, _FEWEST):
            batch //= 2
        return batch

    def run(self, batch: int) -> None:
        replay = self.replays.get(batch) or self._capture(batch)
        for _ in range(STEPS):
            replay()

    def _capture(self, batch: int) -> Callable[[], None]:
        """A function that runs a step of the first `batch` slots; on a GPU, a graph's replay."""
        step, layout = self.step, self.step.cache.layout(batch)
        for module in step.decoder.base.modules():
            if hasattr(module, "layer_index"):
                module.layer_index = layout.handles[module.layer_idx]
        once = partial(step, layout)
        self.replays[batch] = once
        if step.decoder.device.type == "cuda":
            self._warm_up(batch, once)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                once()
            self.pool = self.pool or graph.pool()

            def replay(_holds: object = once) -> None:  # a graph does not keep its tensors alive
                graph.replay()

            self.replays[batch] = replay
        return self.replays[batch]

    def _warm_up(self, batch: int, once: Callable[[], None]) -> None:
        """The first run of a step compiles and allocates, which cannot be captured."""
        how, state = self.step.sampling, self.step.state
        kind = (how.temperature, how.top_p, how.top_k, how.min_new_tokens)
        # A first token of its own temperature compiles something else.
        first = how.first_token_temperature or 0.0
        keys = self.step.cache.keys
        shape = (len(keys), *keys[0].shape, state.out_token.shape[1])
        key = (batch, *shape, len(self.step.stops[0]), first, *kind)
        if key in self.warm:
            return
        self.warm.add(key)
        before = [tensor.clone() for tensor in state.tensors()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state.tensors(), before, strict=True):
            tensor.copy_(value)
