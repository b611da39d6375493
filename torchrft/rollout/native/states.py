"""States of mixers beside the KV cache: the last inputs of convolutions, and recurrent states.

Transformers' cache layers know which states a mixer has and update them in place. Here their
tensors have a row for each prompt, or for each slot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from torchrft.models.mixers import Mixer, rows_of

_KINDS = ("conv_states", "recurrent_states")


class States:
    """`layers[n]` is the cache layer of the mixer in layer n; tensors are [rows, ...]."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.layers: dict[int, Any] = {}

    def put(self, number: int, layer: Any, rows: Tensor, count: int) -> None:
        """Copies the states of `layer` to `rows` (int64 [k]) of `count`."""
        if number not in self.layers:
            self.layers[number] = _mapped(layer, lambda x: x.new_zeros(count, *x.shape[1:]))
        for held, new in zip(_tensors(self.layers[number]), _tensors(layer), strict=True):
            held[rows] = new

    def take(self, slots: Tensor, prompts: States, rows: Tensor, count: int) -> None:
        """Copies the states `rows` of prompts to `slots` (int64 [k] each) of `count`."""
        for number, layer in prompts.layers.items():
            self.put(number, _mapped(layer, lambda x: x[rows]), slots, count)

    def move(self, source: Tensor, target: Tensor) -> None:
        for layer in self.layers.values():
            for tensor in _tensors(layer):
                tensor[target] = tensor[source]

    def cache(self, batch: int | None = None) -> DynamicCache:
        """A cache for mixers: an empty one, or one of the first `batch` rows, to be updated."""
        cache = DynamicCache(config=self.config)
        if batch is not None:
            for number, layer in self.layers.items():
                cache.layers[number] = _mapped(layer, lambda x: x[:batch])
        return cache

    def prefill(
        self, mixer: Mixer, hidden: Tensor, options: dict[str, Any], cells: list[Tensor]
    ) -> Tensor:
        """The mixer's output [1, N, D] for a row of prompts, at `cells` int64 [length] each, whose
        states are kept. Those of one length run together: padding would change the states."""
        out = hidden.new_empty(hidden.shape[1:])
        by_length: dict[int, list[int]] = {}
        for prompt, places in enumerate(cells):
            by_length.setdefault(len(places), []).append(prompt)
        for prompts in by_length.values():
            at = torch.stack([cells[prompt] for prompt in prompts])
            given = {name: rows_of(x, at, hidden.shape[1]) for name, x in options.items()}
            cache = self.cache()
            out[at] = mixer.run(hidden[0][at], given, cache)
            rows = torch.tensor(prompts, device=hidden.device)
            self.put(mixer.layer, cache.layers[mixer.layer], rows, len(cells))
        return out.unsqueeze(0)


def _tensors(layer: Any) -> Iterator[Tensor]:
    for kind in _KINDS:
        yield from (x for x in getattr(layer, kind).values() if x is not None)


def _mapped(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The layer with other tensors as its states."""
    layer = copy.copy(layer)
    for kind in _KINDS:
        states = {i: x if x is None else change(x) for i, x in getattr(layer, kind).items()}
        setattr(layer, kind, states)
    return layer
