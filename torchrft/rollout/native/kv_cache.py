"""Keys and values of the sequences being decoded: one slot per sequence, active slots in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models.attention import padded

_GROWTH = 64  # slots grow by at least so many tokens, so that copies stay rare


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
    """`keys[layer]`, `values[layer]`: [slots, Hkv, T, D]; T grows with the sequences to `limit`."""

    def __init__(self, slots: int, limit: int) -> None:
        self.slots, self.limit = slots, limit
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def capacity(self) -> int:
        """Tokens a slot holds."""
        return self.keys[0].shape[2] if self.keys else 0

    def reserve(self, length: int, like: Prefill) -> None:
        """Room for `length` tokens in every slot; what the slots hold stays."""
        if self.capacity >= length:
            return
        length = min(max(length, int(self.capacity * 1.5), _GROWTH), self.limit)
        grown: list[list[Tensor]] = []
        for old, example in ((self.keys, like.keys), (self.values, like.values)):
            new = []
            for layer, tensor in enumerate(example):
                _, heads, _, dim = tensor.shape
                # Zeros, since a masked cell still takes part in products: NaN would spread.
                slot = tensor.new_zeros(self.slots, heads, length, dim)
                if old:
                    slot[:, :, : old[layer].shape[2]] = old[layer]
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

    def move(self, source: Tensor, target: Tensor) -> None:
        """Moves the slots `source` to `target` (int64 [k] each, disjoint)."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]


class Decode:
    """Attention layout of one new token for each of the first B slots.

    `lengths` int64 [B] are the tokens a slot already holds: the new one is written there.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor, longest: int) -> None:
        self.cache = cache
        self.lengths = lengths
        self.slots = torch.arange(lengths.shape[0], device=lengths.device)
        self.columns = torch.arange(longest + 1, device=lengths.device)
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive [B, 1, 1, longest + 1]; made once per step, not once per layer."""
        if window not in self.masks:
            position = self.lengths[:, None]
            outside = self.columns > position
            if window is not None:
                outside |= self.columns <= position - window
            zero = torch.zeros(outside.shape, dtype=dtype, device=outside.device)
            self.masks[window] = zero.masked_fill_(outside, -torch.inf)[:, None, None, :]
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
        longest = self.columns.shape[0]
        # The query heads of a group become query tokens, so that keys are read once per group.
        out = F.scaled_dot_product_attention(
            query.reshape(batch, kv_heads, heads // kv_heads, dim),
            keys[:batch, :, :longest],
            values[:batch, :, :longest],
            attn_mask=self.mask(window, query.dtype),
            scale=scale,
        )
        return out.reshape(batch, 1, heads, dim)
