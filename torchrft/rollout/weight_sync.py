"""The trainer's weights, one full tensor at a time, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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

    Raises ValueError for an unknown name, another shape, or a parameter that got no value: the
    tensor that is wrong is named, and the weights must not be used.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = set(dict(model.named_parameters()))
    identity = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, tensor in named_tensors:
        if name not in parameters:
            raise ValueError(f'weight update: the engine\'s model has no parameter "{name}"')
        target = parameters[name]
        if target.shape != tensor.shape:
            raise ValueError(
                f'weight update: "{name}" is {tuple(tensor.shape)} in the trainer and '
                f"{tuple(target.shape)} in the engine"
            )
        target.copy_(tensor)
        missing.discard(identity[id(target)])
    if missing:
        raise ValueError(f'weight update: no value came for "{min(missing)}"')
