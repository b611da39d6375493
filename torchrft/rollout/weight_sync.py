"""The trainer's weights, one full tensor at a time, by Hugging Face name."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchrft.models.loader import persistent_buffers
from torchrft.parallel import reshard
from torchrft.rollout.canary import Canary, Held


def named_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every parameter, gathered from its shards if it has any, and of
    every persistent buffer, which all ranks hold whole.

    Gathering is collective: with sharded parameters all ranks must exhaust the iterator together.
    Tied parameters come once, under their first name; only one gathered tensor is alive at a time.
    """
    reshard(model)  # a forward pass without backward may have left weights of its time gathered
    for name, parameter in (*model.named_parameters(), *persistent_buffers(model)):
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def buckets(pairs: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """The named tensors in parts, each full once it holds `size` bytes."""
    bucket: dict[str, Tensor] = {}
    for name, tensor in pairs:
        bucket[name] = tensor
        if sum(held.nbytes for held in bucket.values()) >= size:
            yield bucket
            bucket = {}
    if bucket:
        yield bucket


@torch.no_grad()
def copy_weights(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies every tensor into the model's parameter or buffer of that name, casting to its dtype.

    Raises ValueError for an unknown name, another shape, or one of them that got no value, and
    WeightSyncError if a copy is not what was sent: the tensor that is wrong is named, and the
    weights must not be used.
    """
    canary = Canary(model, lambda name: [Held(lambda: canary.expected[name])])
    for name, tensor in canary.watch(named_tensors):
        canary.expected[name].copy_(tensor)
    canary.check()


def layout(model: nn.Module) -> str:
    """A short digest of the weights' names and shapes, equal for the same model only."""
    tensors = (*model.named_parameters(), *persistent_buffers(model))
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in tensors)
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
