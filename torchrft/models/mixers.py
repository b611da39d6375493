"""Layers that mix tokens without attention: linear attention, state spaces, short convolutions.

Such a mixer runs along whole sequences, of which a packed row has several that share beginnings. So
each mixer's forward is wrapped: a layout with a method `mix` decides how it runs. `Packed` gathers
whole sequences into padded rows, the native engine keeps states for each slot. Transformers hands
`layout` to mixers as it does to attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

_CACHES = ("cache_params", "past_key_values")


@dataclass(frozen=True)
class Mixer:
    """A mixer's own forward, the number of its layer and the name under which it takes a cache."""

    forward: Callable[..., Any]
    layer: int
    cache_name: str

    def run(self, hidden: Tensor, options: dict[str, Any], cache: Any = None) -> Tensor:
        """Hidden states [B, L, D] of hidden states [B, L, D]; `cache` as of transformers."""
        return self.forward(hidden_states=hidden, **{**options, self.cache_name: cache})


def cache_name(module: nn.Module) -> str | None:
    """The parameter by which a module's forward takes transformers' cache."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _CACHES if name in parameters), None)


def gather_mixers(decoder: nn.Module, names: Sequence[str]) -> None:
    """Wraps the mixers of those names, in place; parameters keep their names. Twice is once."""
    for name in names:
        module: Any = decoder.get_submodule(name)
        if getattr(module.forward, "func", None) is _mixed:
            continue
        mixer = Mixer(module.forward, module.layer_idx, cache_name(module) or _CACHES[0])
        module.forward = partial(_mixed, mixer)


def _mixed(mixer: Mixer, hidden_states: Tensor, layout: Any = None, **options: Any) -> Tensor:
    mix = getattr(layout, "mix", None)
    options.pop(mixer.cache_name, None)  # a layout brings its own
    return mixer.run(hidden_states, options) if mix is None else mix(mixer, hidden_states, options)


def rows_of(value: Any, cells: Tensor, length: int) -> Any:
    """What runs along a row [1, length, ...], at `cells` int64 [S, L]: [S, L, ...]. Anything else
    stays."""
    if isinstance(value, tuple):
        return tuple(rows_of(part, cells, length) for part in value)
    along = isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, length)
    return value[0][cells] if along else value
