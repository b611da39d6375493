"""Keys and values of the sequences being decoded: one slot per sequence, active slots in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models.attention import Packed
from torchrft.models.mixers import Mixer
from torchrft.models.scores import ScoreChange
from torchrft.rollout.native.states import States

_GROWTH = 256  # tokens a slot has room for at first: growing later copies what is there


class Prefill:
    """Attention layout of a row of prompts, one behind the other, that keeps their keys and values.

    `keys[order[layer]]` and `values[order[layer]]` are [P, Hkv, L, D]; behind a prompt's end they
    mean nothing. `states` are those of mixers, where the model has any.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (1,),
        device: torch.device | str = "cpu",
        states: States | None = None,
    ) -> None:
        self.row = Packed.of([(length, ()) for length in lengths]).to(torch.device(device))
        self.lengths, self.states = lengths, states
        self.order: dict[int, int] = {}  # of the layers with attention
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.logits = torch.empty(0)  # after each prompt [P, V]

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        change: ScoreChange | None = None,
    ) -> Tensor:
        self.check(layer)
        for kept, row in ((self.keys, key), (self.values, value)):
            kept.append(row[0][:, self.row.prefixes].transpose(0, 1))
        return self.row(layer, query, key, value, scale, window, change)

    def mix(self, mixer: Mixer, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        """A mixer's output for the row, see `States.prefill`."""
        assert self.states is not None
        cells = [row[:length] for row, length in zip(self.row.prefixes, self.lengths, strict=True)]
        return self.states.prefill(mixer, hidden, options, cells)

    @property
    def positions(self) -> Tensor:
        """int64 [N], of each token of the row in its prompt."""
        return self.row.positions

    def check(self, layer: int) -> None:
        """Gives a layer its place. Raises ValueError for one that has run already."""
        if self.order.setdefault(layer, len(self.keys)) != len(self.keys):
            raise ValueError(f"the model runs attention layer {layer} a second time")


class SlotCache:
    """Keys and values, in the `order` of the layers with attention: [slots, Hkv, T, D]; T grows
    with the sequences to `limit`. Beside them the states of mixers."""

    def __init__(self, slots: int, limit: int) -> None:
        self.slots, self.limit = slots, limit
        self.used = 0  # slots in front that may hold something
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.order: dict[int, int] = {}
        self.states: States | None = None

    @property
    def capacity(self) -> int:
        """Tokens a slot holds."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def is_even(self) -> bool:
        """Whether the layers are alike in their heads and widths."""
        return all(len({x.shape for x in layers}) == 1 for layers in (self.keys, self.values))

    def reserve(self, length: int) -> None:
        """Room for `length` tokens in every slot; what the used slots hold stays."""
        room = self.capacity
        if length <= room:
            return
        length = min(max(length, int(room * 1.5), _GROWTH), self.limit)
        for held in (self.keys, self.values):
            for layer, old in enumerate(held):
                # A CPU touches memory only as far as sequences come; others multiply what is behind
                # their ends by zero, so it must not be NaN.
                make = old.new_empty if _sums_bags(old) else old.new_zeros
                held[layer] = make(*old.shape[:2], length, old.shape[3])
                held[layer][: self.used, :, :room] = old[: self.used]

    def allocate(self, prompts: Prefill) -> None:
        """Slots without room, which `reserve` makes."""
        self.keys, self.values = (
            [x.new_empty(self.slots, x.shape[1], 0, x.shape[3]) for x in layers]
            for layers in (prompts.keys, prompts.values)
        )

    def admit(self, slots: Tensor, prompts: Prefill, rows: Tensor) -> None:
        """Copies the prompts `rows` (int64 [k]) into `slots`."""
        if not self.keys:
            self.allocate(prompts)
            self.order = prompts.order
        if prompts.states is not None:
            self.states = self.states or States(prompts.states.config)
            self.states.take(slots, prompts.states, rows, self.slots)
        length = prompts.keys[0].shape[2]
        self.reserve(length + 1)
        for cache, source in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for held, new in zip(cache, source, strict=True):
                held[slots, :, :length] = new[rows]
        self.used = max(self.used, int(slots.max()) + 1)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies `length` tokens of the slots `source` to `target` (int64 [k] each), reading all
        before writing."""
        for tensor in (*self.keys, *self.values):
            held = tensor[:, :, :length]
            held[target] = held[source]
        if self.states is not None:
            self.states.move(source, target)

    def layout(self, batch: int) -> Any:
        """The attention layout of a step of the first slots."""
        return Decode(self, batch)


def _sums_bags(tensor: Tensor) -> bool:
    """Whether attention to few queries is computed in parts, which a CPU does faster."""
    return not tensor.is_cuda and tensor.dtype in (torch.float32, torch.float64)


class Decode:
    """Attention layout of one new token for each of the first slots, which are all live.

    `begin` is called at the start of every step.
    """

    def __init__(self, cache: SlotCache, batch: int) -> None:
        self.cache, self.slots = cache, slice(0, batch)
        self.places = torch.arange(batch, device=cache.keys[0].device)
        self.outside: dict[int | None, Tensor] = {}  # bool [B, 1, 1, width], by window
        self.mixed = None if cache.states is None else cache.states.cache(batch)

    def begin(self, lengths: Tensor) -> None:
        """`lengths` int64 [B] are the tokens a slot already holds: the new one is written there."""
        self.lengths, self.width = lengths, int(lengths.max()) + 1
        self.cache.used = len(lengths)
        self.cache.reserve(self.width)
        self.columns = torch.arange(self.width, device=lengths.device)
        self.outside.clear()
        self.rows: dict[tuple[int, ...], Tensor] = {}  # of `weigh`, by key heads and their group

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        change: ScoreChange | None = None,
    ) -> Tensor:
        batch, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        place = self.cache.order.get(layer, layer)
        keys, values = self.cache.keys[place], self.cache.values[place]
        keys[self.places, :, self.lengths] = key[:, :, 0]
        values[self.places, :, self.lengths] = value[:, :, 0]
        # The query heads of a group become query tokens, so that keys are read once per group.
        query = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        if window not in self.outside:  # once per step, not once per layer
            self.outside[window] = _outside(self.columns, self.lengths, window)
        outside, held = self.outside[window], keys[:batch, :, : self.width]
        if _sums_bags(query) or change is not None:
            scores = torch.matmul(query * scale, held.transpose(-1, -2))
            if change is None:
                weights = scores.masked_fill_(outside, -torch.inf).softmax(-1)
            else:
                weights = change.weights(scores, outside)
            out = self.weigh(weights, values)
        else:
            out = F.scaled_dot_product_attention(
                query, held, values[:batch, :, : self.width], attn_mask=~outside, scale=scale
            )
        return out.reshape(batch, 1, heads, -1)  # MLA: values may be narrower than keys

    def mix(self, mixer: Mixer, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        """A mixer's output [B, 1, D] for a token of each slot, whose states it moves on."""
        return mixer.run(hidden, options, self.mixed)

    def weigh(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sums of the values by weights [B, Hkv, G, width].

        On a CPU, a bag of embeddings reads each row ahead of its use: 2 to 4 times as fast as a
        matmul with few rows, and what is behind a sequence's end need not be read.
        """
        if not _sums_bags(weights):
            return weights @ values[: len(weights), :, : self.width]
        _, kv_heads, room, _ = values.shape
        group = weights.shape[1:3]  # in which layers may differ
        if group not in self.rows:  # numbers of the rows; int32 would do for 2^31 of them
            first = torch.arange(weights.shape[0] * kv_heads, dtype=torch.int32) * room
            column = self.columns.int().minimum(self.lengths[:, None].int())
            rows = first.view(-1, kv_heads, 1, 1) + column[:, None, None]
            self.rows[group] = rows.expand_as(weights).reshape(-1, self.width)
        rows = self.rows[group]
        return F.embedding_bag(
            rows,
            values.view(-1, values.shape[-1]),
            mode="sum",
            per_sample_weights=weights.reshape(rows.shape),
        )


def _outside(columns: Tensor, last: Tensor, window: int | None) -> Tensor:
    """Bool [B, 1, 1, columns], true behind column `last` [B] or before the window."""
    outside = columns > last[:, None]
    if window is not None:
        outside |= columns <= last[:, None] - window
    return outside[:, None, None]
