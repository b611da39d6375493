"""FSDP2 on any transformers model."""

from typing import Any

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh

from torchrft.parallel.modules import decoder_layers, shares_weights, vocabulary_modules
from torchrft.parallel.zero import Sharding


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    sharding: Sharding,
    dtype: torch.dtype,
    cpu_offload: bool = False,
) -> None:
    """Shards embedding, head and every decoder layer, then what is left, in place.

    A layer that shares a weight with the rest, as BERT's embeddings with its head, stays with it.

    `mesh` has one dimension, or two: replicas of shards (HSDP). Parameters keep their dtype and are
    cast to `dtype` for computing; gradients are reduced in float32. With `cpu_offload` parameters,
    gradients and optimizer state live in (pinned) host memory.
    """
    pinned = mesh.device_type == "cuda"
    offload = fsdp.CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else fsdp.OffloadPolicy()
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    vocabulary = vocabulary_modules(model)
    again = sharding.reshard_after_forward
    options: dict[str, Any] = {"mp_policy": policy, "offload_policy": offload}
    layers = [m for m in decoder_layers(model) if not shares_weights(model, m)]
    for module in (*vocabulary, *layers, model):  # inner ones first
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=again, **options)
    for module in vocabulary:
        if hasattr(module, "logprobs"):  # a policy's head, instead of its forward
            fsdp.register_fsdp_forward_method(module, "logprobs")


def check_shardable(model: nn.Module) -> None:
    """Raises ValueError for a model that is sharded already, and for parameters of no dimension."""
    kind = type(model).__name__
    if any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise ValueError(f"{kind} is sharded already, which is done once: make the model anew")
    if scalars := [name for name, p in model.named_parameters() if p.dim() == 0]:
        raise ValueError(f"{scalars[0]} of {kind} is a scalar, which has no shards: make it [1]")


def reshard(model: nn.Module) -> None:
    """Frees gathered parameters, so that the next forward pass gathers those of now.

    A forward pass without backward leaves them gathered unless the sharding says otherwise: then
    `parameters()` are copies without gradients, and old ones after an optimizer step.
    """
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def reduce_unused(model: nn.Module) -> None:
    """Parameters without a gradient on some ranks count as zero there, instead of a deadlock.

    Without effect before torch 2.13, which has no such setting.
    """
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            setting = getattr(module, "set_reduce_scatter_unused_params", lambda *_, **__: None)
            setting(True, recurse=False)


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; nothing without FSDP."""
    if isinstance(model, fsdp.FSDPModule):
        model.set_requires_gradient_sync(sync)
