"""Keys and values of the sequences being decoded: one slot per sequence, active slots in front."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models.attention import padded

_GROWTH = 256  # tokens a slot has room for at first: growing later copies what is there
_CLEAN = 16  # columns are cleared so many at a time


class Prefill:
    """Attention layout that computes prompts padded on the right and keeps their keys and values.

    `keys[layer]` and `values[layer]` are [P, Hkv, L, D].
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        if layer != len(self.keys):
            raise ValueError(f"the model runs layer {layer} where {len(self.keys)} was expected")
        self.keys.append(key)
        self.values.append(value)
        return padded(layer, query, key, value, scale, window)


class SlotCache:
    """`keys[layer]`, `values[layer]`: [slots, Hkv, T, D]; T grows with the sequences to `limit`.

    Memory is cleared only as far as sequences come: fresh columns of the slots in use, and the rest
    of a slot when a prompt enters it. Cells behind a sequence's end are masked but still take part
    in products, so they must not hold NaN.
    """

    def __init__(self, slots: int, limit: int) -> None:
        self.slots, self.limit = slots, limit
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.clean = 0  # columns of the slots in use that hold numbers

    @property
    def capacity(self) -> int:
        """Tokens a slot holds."""
        return self.keys[0].shape[2] if self.keys else 0

    def reserve(self, length: int, used: int, like: Prefill) -> None:
        """Room for `length` tokens in every slot; what the first `used` slots hold stays."""
        if length > self.capacity:
            self._grow(min(max(length, int(self.capacity * 1.5), _GROWTH), self.limit), used, like)
        if length > self.clean:
            end = min(length + _CLEAN, self.capacity)
            for tensor in (*self.keys, *self.values):
                tensor[:used, :, self.clean : end] = 0
            self.clean = end

    def _grow(self, length: int, used: int, like: Prefill) -> None:
        grown: list[list[Tensor]] = []
        for old, example in ((self.keys, like.keys), (self.values, like.values)):
            new = []
            for layer, tensor in enumerate(example):
                _, heads, _, dim = tensor.shape
                slot = tensor.new_empty(self.slots, heads, length, dim)
                if old:
                    slot[:used, :, : self.clean] = old[layer][:used, :, : self.clean]
                    old[layer] = tensor.new_empty(0)  # free layer by layer
                new.append(slot)
            grown.append(new)
        self.keys, self.values = grown

    def admit(self, first_slot: int, prompts: Prefill, rows: Tensor) -> None:
        """Copies the prompts `rows` (int64 [k]) into the slots from `first_slot` on."""
        end = first_slot + rows.shape[0]
        for cache, source in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for slot, tensor in zip(cache, source, strict=True):
                slot[first_slot:end, :, : tensor.shape[2]] = tensor[rows]
                slot[first_slot:end, :, tensor.shape[2] : self.clean] = 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies the slots `source` to `target` (int64 [k] each), reading all before writing."""
        for tensor in (*self.keys, *self.values):
            held = tensor[:, :, : self.clean]
            held[target] = held[source]


class Decode:
    """Attention layout of one new token for each of the first B slots.

    `lengths` int64 [B] are the tokens a slot already holds: the new one is written there.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor) -> None:
        self.cache, self.lengths = cache, lengths
        self.slots = torch.arange(lengths.shape[0], device=lengths.device)
        self.width = int(lengths.max()) + 1
        self.columns = torch.arange(self.width, device=lengths.device)
        self.masks: dict[int | None, Tensor] = {}
        self.rows = torch.empty(0)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive [B, 1, 1, width]; made once per step, not once per layer."""
        if window not in self.masks:
            self.masks[window] = _mask(self.columns, self.lengths, window, dtype)
        return self.masks[window]

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
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.lengths] = key[:, :, 0]
        values[self.slots, :, self.lengths] = value[:, :, 0]
        # The query heads of a group become query tokens, so that keys are read once per group.
        query = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        mask, held = self.mask(window, query.dtype), keys[:batch, :, : self.width]
        if query.is_cuda or query.dtype not in (torch.float32, torch.float64):
            out = F.scaled_dot_product_attention(
                query, held, values[:batch, :, : self.width], attn_mask=mask, scale=scale
            )
        else:
            scores = torch.matmul(query * scale, held.transpose(-1, -2)).add_(mask)
            out = self.weigh(scores.softmax(-1), values)
        return out.reshape(batch, 1, heads, dim)

    def weigh(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sums of the values by weights [B, Hkv, G, width], for a CPU.

        A bag of embeddings reads each row ahead of its use: 2 to 4 times as fast as a matmul with
        few rows, and what is behind a sequence's end need not be read.
        """
        _, kv_heads, room, _ = values.shape
        if not self.rows.numel():  # numbers of the rows; int32 would do for 2^31 of them
            first = torch.arange(weights.shape[0] * kv_heads, dtype=torch.int32) * room
            column = self.columns.int().minimum(self.lengths[:, None].int())
            rows = first.view(-1, kv_heads, 1, 1) + column[:, None, None]
            self.rows = rows.expand_as(weights).reshape(-1, self.width)
        return F.embedding_bag(
            self.rows,
            values.view(-1, values.shape[-1]),
            mode="sum",
            per_sample_weights=weights.view_as(self.rows),
        )


def _mask(columns: Tensor, last: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, 1, columns]: those up to and with `last` [B], within the window."""
    outside = columns > last[:, None]
    if window is not None:
        outside |= columns <= last[:, None] - window
    zero = torch.zeros(outside.shape, dtype=dtype, device=outside.device)
    return zero.masked_fill_(outside, -torch.inf)[:, None, None, :]


def attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of query [B, Hkv, G, D] to keys [B, Hkv, T, D] up to and with column `lengths`."""
    mask = _mask(torch.arange(keys.shape[2], device=keys.device), lengths, None, query.dtype)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
