"""Projections that read the same input become one matrix product.

The parameters keep their names and shapes: they become parts of one tensor, which weights are
copied into as before.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order of their use


def join_projections(model: nn.Module) -> None:
    """Joins the plain linear layers of `model` that transformers names as siblings.

    For inference: the parameters share memory afterwards.
    """
    for module in list(model.modules()):
        for names in _SIBLINGS:
            linears = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                _join(cast(list[nn.Linear], linears))


def _join(linears: list[nn.Linear]) -> None:
    if len({linear.bias is None for linear in linears}) > 1:
        return
    first = linears[0]
    sizes = [linear.out_features for linear in linears]
    for name in ("weight", "bias"):
        parameters = [getattr(linear, name) for linear in linears]
        whole = None if parameters[0] is None else torch.cat([p.data for p in parameters])
        first.register_buffer(f"joined_{name}", whole, persistent=False)
        if whole is not None:
            for parameter, part in zip(parameters, whole.split(sizes), strict=True):
                parameter.data = part
    first.__class__ = _Leader
    for linear in linears[1:]:
        linear.__class__ = _Follower
        linear.__dict__["ready"] = (None, None)
    first.__dict__.update(sizes=sizes, followers=tuple(linears[1:]))


def is_joined(linear: nn.Module) -> bool:
    """Whether the layer's `whole(input)` gives its outputs and its followers'."""
    return isinstance(linear, _Leader)


class _Leader(nn.Linear):
    """Computes its own output and those of the layers that follow."""

    joined_weight: Tensor
    joined_bias: Tensor | None
    sizes: list[int]
    followers: tuple[_Follower, ...]

    def whole(self, input: Tensor) -> Tensor:
        """All outputs, one behind the other."""
        return F.linear(input, self.joined_weight, self.joined_bias)

    def forward(self, input: Tensor) -> Tensor:
        own, *others = self.whole(input).split(self.sizes, dim=-1)
        for follower, part in zip(self.followers, others, strict=True):
            follower.ready = (input, part)
        return own


class _Follower(nn.Linear):
    """Gives what the leader computed for it."""

    ready: tuple[Tensor, Tensor] | tuple[None, None]

    def forward(self, input: Tensor) -> Tensor:
        (source, part), self.ready = self.ready, (None, None)
        return part if part is not None and source is input else super().forward(input)
