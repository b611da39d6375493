"""The trainer's weights, one full tensor at a time, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchrft.rollout.canary import Canary, Held


def named_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every parameter, gathered from its shards if it has any.

    Gathering is collective: with sharded parameters all ranks must exhaust the iterator together.
    Tied parameters come once, under their first name; only one gathered tensor is alive at a time.
    """
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_weights(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies every tensor into the model's parameter of that name, casting to its dtype.

    Raises ValueError for an unknown name, another shape, or a parameter that got no value, and
    WeightSyncError if a copy is not what was sent: the tensor that is wrong is named, and the
    weights must not be used.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    canary = Canary(model, lambda name: [Held(lambda: parameters[name])])
    for name, tensor in canary.watch(named_tensors):
        parameters[name].copy_(tensor)
    canary.check()
