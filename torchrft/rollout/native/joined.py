"""Projections that read the same input become one matrix product.

The parameters keep their names and shapes: they become parts of one tensor, which weights are
copied into as before.
"""

from __future__ import annotations

from typing import Any

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
            linears: list[Any] = [getattr(module, name, None) for name in names]
            if not all(type(linear) is nn.Linear for linear in linears):
                continue
            if len({linear.bias is None for linear in linears}) == 1:
                leader = _Leader(linears)
                for name, linear in zip(names, (leader, *leader.followers), strict=True):
                    setattr(module, name, linear)


def is_joined(linear: nn.Module) -> bool:
    """Whether the layer's `whole(input)` gives its outputs and its followers'."""
    return isinstance(linear, _Leader)


class _Part(nn.Linear):
    """The layer `linear`, parameters and all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias


class _Follower(_Part):
    """Gives what the leader computed for it."""

    ready: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)

    def forward(self, input: Tensor) -> Tensor:
        (source, part), self.ready = self.ready, (None, None)
        return part if part is not None and source is input else super().forward(input)


class _Leader(_Part):
    """Computes its own output and those of the layers that follow."""

    joined_weight: Tensor
    joined_bias: Tensor | None

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__(linears[0])
        self.sizes = [linear.out_features for linear in linears]
        for name in ("weight", "bias"):
            parameters = [getattr(linear, name) for linear in linears]
            whole = None if parameters[0] is None else torch.cat([p.data for p in parameters])
            self.register_buffer(f"joined_{name}", whole, persistent=False)
            if whole is not None:
                for parameter, part in zip(parameters, whole.split(self.sizes), strict=True):
                    parameter.data = part
        # A tuple, so that they are not modules of this one, too.
        self.followers = tuple(_Follower(linear) for linear in linears[1:])

    def whole(self, input: Tensor) -> Tensor:
        """All outputs, one behind the other."""
        return F.linear(input, self.joined_weight, self.joined_bias)

    def forward(self, input: Tensor) -> Tensor:
        own, *others = self.whole(input).split(self.sizes, dim=-1)
        for follower, part in zip(self.followers, others, strict=True):
            follower.ready = (input, part)
        return own
