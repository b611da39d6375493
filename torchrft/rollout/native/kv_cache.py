"""Keys and values of the sequences being decoded: one slot per sequence, active slots in front."""

from itertools import pairwise

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

    `lengths` int64 [B] are the tokens a slot already holds: the new one is written there. The first
    `split` slots may be longer than the others, which then are not read as far as those.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor, split: int = 0) -> None:
        self.cache = cache
        self.lengths = lengths
        self.slots = torch.arange(lengths.shape[0], device=lengths.device)
        cuts = [0, split, lengths.shape[0]]
        self.parts = [slice(*cut) for cut in pairwise(cuts) if cut[0] < cut[1]]
        self.widths = [int(lengths[part].max()) + 1 for part in self.parts]
        self.masks: dict[int | None, list[Tensor]] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """Additive [B, 1, 1, width], part by part; made once per step, not once per layer."""
        if window not in self.masks:
            masks = []
            for part, width in zip(self.parts, self.widths, strict=True):
                position = self.lengths[part, None]
                columns = torch.arange(width, device=position.device)
                outside = columns > position
                if window is not None:
                    outside |= columns <= position - window
                zero = torch.zeros(outside.shape, dtype=dtype, device=outside.device)
                masks.append(zero.masked_fill_(outside, -torch.inf)[:, None, None, :])
            self.masks[window] = masks
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
        outs = [
            _attend(query[part], keys[part, :, :width], values[part, :, :width], mask, scale)
            for part, width, mask in zip(
                self.parts, self.widths, self.mask(window, query.dtype), strict=True
            )
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.reshape(batch, 1, heads, dim)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    if query.is_cuda or query.dtype not in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # Two matmuls are up to 1.3 times as fast as the CPU's SDPA for so few queries.
    scores = torch.matmul(query * scale, keys.transpose(-1, -2)).add_(mask)
    return torch.matmul(scores.softmax(-1), values)


def attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of query [B, Hkv, G, D] to keys [B, Hkv, T, D] up to and with column `lengths`."""
    outside = torch.arange(keys.shape[2], device=keys.device) > lengths[:, None]
    zero = torch.zeros(outside.shape, dtype=query.dtype, device=query.device)
    mask = zero.masked_fill_(outside, -torch.inf)[:, None, None, :]
    return _attend(query, keys, values, mask, scale)
