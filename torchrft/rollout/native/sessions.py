"""Conversations between their turns: their keys and values, and how a prefill continues them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.models.scores import ScoreChange
from torchrft.rollout.native.kv_cache import Prefill, SlotCache


class Held(NamedTuple):
    """What was computed of the first L tokens of a conversation."""

    token_ids: Sequence[int]
    keys: Tensor  # [layers, Hkv, L, D]
    values: Tensor  # the same, of another D where the model has it so

    def first(self, length: int) -> Held:
        """That of the first `length` tokens."""
        return Held(self.token_ids[:length], self.keys[:, :, :length], self.values[:, :, :length])


class Sessions:
    """Held conversations of at most `room` tokens; where that is not enough, the oldest go."""

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self.held: OrderedDict[Hashable, Held] = OrderedDict()

    def keep(
        self, session: Hashable, token_ids: Sequence[int], cache: SlotCache, slot: int
    ) -> None:
        """Copies a conversation out of the slot that it was decoded in."""
        self.drop(session)
        length = len(token_ids)
        if length > self.room or not cache.is_even or cache.states is not None:
            return
        while self.used + length > self.room:
            self.drop(next(iter(self.held)))
        keys, values = (
            torch.stack([layer[slot, :, :length] for layer in layers])
            for layers in (cache.keys, cache.values)
        )
        self.held[session] = Held(token_ids, keys, values)
        self.used += length

    def find(self, session: Hashable, token_ids: Sequence[int]) -> Held | None:
        """What is held of a session that `token_ids` begin with, all but their last one at most."""
        held = self.held.get(session)
        if held is None:
            return None
        length = min(len(held.token_ids), len(token_ids) - 1)
        if tuple(held.token_ids[:length]) != tuple(token_ids[:length]):  # a branch: where it leaves
            pairs = zip(held.token_ids, token_ids[:length], strict=False)
            length = next(i for i, (old, new) in enumerate(pairs) if old != new)
        return held.first(length) if length else None

    def drop(self, session: Hashable) -> None:
        """Forgets a session, if it is held."""
        if session in self.held:
            self.used -= len(self.held.pop(session).token_ids)


class Continuation(Prefill):
    """A `Prefill` of what follows on held conversations; its keys are those of all tokens.

    `lengths` are the new tokens of each prompt.
    """

    def __init__(self, lengths: Sequence[int], pasts: Sequence[Held]) -> None:
        device = pasts[0].keys.device
        super().__init__(lengths, device)
        starts = [past.keys.shape[2] for past in pasts]
        width = max(start + length for start, length in zip(starts, lengths, strict=True))
        self.whole_keys, self.whole_values = (
            _padded([getattr(past, name) for past in pasts], width) for name in ("keys", "values")
        )
        prompt = torch.repeat_interleave(
            torch.arange(len(pasts), device=device), torch.tensor(lengths, device=device)
        )
        start = torch.tensor(starts, device=device)
        # [N]: where each new token's key goes.
        self.cells = prompt, self.row.positions + start[prompt]
        queries = torch.arange(max(lengths), device=device)
        self.last = (start[:, None] + queries)[:, None, :, None]  # each query's own column
        self.columns = torch.arange(width, device=device)

    @property
    def positions(self) -> Tensor:
        return self.cells[1]

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
        prompt, position = self.cells
        place = self.order[layer]
        keys, values = self.whole_keys[place], self.whole_values[place]
        for whole, new in ((keys, key), (values, value)):
            whole[prompt, :, position] = new[0].transpose(0, 1)
        self.keys.append(keys)
        self.values.append(values)
        inside = self.columns <= self.last
        if window is not None:
            inside &= self.columns > self.last - window
        queries = query[0][:, self.row.prefixes].transpose(0, 1)  # [P, H, T, D]
        if change is not None:
            cells = change.attend(queries, keys, values, inside, scale)
            return cells.flatten(0, 1)[self.row.fold].unsqueeze(0)
        # The query heads of a group become query tokens: masked kernels know no grouped queries.
        group = queries.shape[1] // keys.shape[1]
        grouped = queries.unflatten(1, (-1, group)).flatten(2, 3)
        mask = inside.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
        cells = out.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2)  # [P, T, H, D]
        return cells.flatten(0, 1)[self.row.fold].unsqueeze(0)


def _padded(pasts: Sequence[Tensor], width: int) -> Tensor:
    """[layers, P, Hkv, width, D] of P tensors [layers, Hkv, L, D]."""
    layers, heads, _, dim = pasts[0].shape
    # What is behind an end is multiplied by zero, so it must not be NaN.
    padded = pasts[0].new_zeros(layers, len(pasts), heads, width, dim)
    for row, past in enumerate(pasts):
        padded[:, row, :, : past.shape[2]] = past
    return padded
