"""Keys and values of the sequences being decoded: one slot per sequence, active slots in front."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models.attention import Packed

_GROWTH = 256  # tokens a slot has room for at first: growing later copies what is there


class Prefill:
    """Attention layout of a row of prompts, one behind the other, that keeps their keys and values.

    `keys[layer]` and `values[layer]` are [P, Hkv, L, D]; behind a prompt's end they mean nothing.
    """

    def __init__(self, lengths: Sequence[int] = (1,), device: torch.device | str = "cpu") -> None:
        self.row = Packed.of([(length, ()) for length in lengths]).to(torch.device(device))
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
        for kept, row in ((self.keys, key), (self.values, value)):
            kept.append(row[0][:, self.row.prefixes].transpose(0, 1))
        return self.row(layer, query, key, value, scale, window)


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

    def reserve(self, length: int, used: int, like: Prefill) -> None:
        """Room for `length` tokens in every slot; what the first `used` slots hold stays."""
        room = self.capacity
        if length > room:
            length = min(max(length, int(room * 1.5), _GROWTH), self.limit)
            self.keys = _grown(self.keys, like.keys, used, self.slots, length)
            self.values = _grown(self.values, like.values, used, self.slots, length)

    def admit(self, first_slot: int, prompts: Prefill, rows: Tensor) -> None:
        """Copies the prompts `rows` (int64 [k]) into the slots from `first_slot` on."""
        end = first_slot + rows.shape[0]
        for cache, source in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for slot, tensor in zip(cache, source, strict=True):
                slot[first_slot:end, :, : tensor.shape[2]] = tensor[rows]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies `length` tokens of the slots `source` to `target` (int64 [k] each), reading all
        before writing."""
        for tensor in (*self.keys, *self.values):
            held = tensor[:, :, :length]
            held[target] = held[source]


def _grown(
    old: list[Tensor], like: list[Tensor], used: int, slots: int, length: int
) -> list[Tensor]:
    """Layer by layer, [slots, Hkv, length, D]; the old memory is freed meanwhile."""
    new = []
    for layer, tensor in enumerate(like):
        _, heads, _, dim = tensor.shape
        # A CPU touches memory only as far as sequences come; others multiply what is behind their
        # ends by zero, so it must not be NaN.
        make = tensor.new_empty if _sums_bags(tensor) else tensor.new_zeros
        new.append(make(slots, heads, length, dim))
        if old:
            new[layer][:used, :, : old[layer].shape[2]] = old[layer][:used]
            old[layer] = tensor.new_empty(0)
    return new


def _sums_bags(tensor: Tensor) -> bool:
    """Whether attention to few queries is computed in parts, which a CPU does faster."""
    return not tensor.is_cuda and tensor.dtype in (torch.float32, torch.float64)


class Decode:
    """Attention layout of one new token for each of the first B slots.

    `lengths` int64 [B] are the tokens a slot already holds: the new one is written there.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor) -> None:
        self.cache, self.lengths = cache, lengths
        self.slots = torch.arange(lengths.shape[0], device=lengths.device)
        self.width = int(lengths.max()) + 1
        self.columns = torch.arange(self.width, device=lengths.device)
        self.outside: dict[int | None, Tensor] = {}  # bool [B, 1, 1, width], by window
        self.rows = torch.empty(0)

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
        if window not in self.outside:  # once per step, not once per layer
            self.outside[window] = _outside(self.columns, self.lengths, window)
        outside, held = self.outside[window], keys[:batch, :, : self.width]
        if _sums_bags(query):
            scores = torch.matmul(query * scale, held.transpose(-1, -2))
            out = self.weigh(scores.masked_fill_(outside, -torch.inf).softmax(-1), values)
        else:
            out = F.scaled_dot_product_attention(
                query, held, values[:batch, :, : self.width], attn_mask=~outside, scale=scale
            )
        return out.reshape(batch, 1, heads, -1)  # MLA: values may be narrower than keys

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


def _outside(columns: Tensor, last: Tensor, window: int | None) -> Tensor:
    """Bool [B, 1, 1, columns], true behind column `last` [B] or before the window."""
    outside = columns > last[:, None]
    if window is not None:
        outside |= columns <= last[:, None] - window
    return outside[:, None, None]


def attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of query [B, Hkv, G, D] to keys [B, Hkv, T, D] up to and with column `lengths`."""
    inside = ~_outside(torch.arange(keys.shape[2], device=keys.device), lengths, None)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=inside, scale=scale)
