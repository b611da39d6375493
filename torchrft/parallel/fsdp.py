"""FSDP2 on any transformers model."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from torchrft.parallel.zero import Sharding


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, as transformers names them in `_no_split_modules`."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, sharding: Sharding, dtype: torch.dtype) -> None:
    """Shards every decoder layer, then what is left, in place.

    Parameters keep their dtype and are cast to `dtype` for computing; gradients are reduced in
    float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(model), model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=sharding.reshard_after_forward,
        )


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; nothing without FSDP."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
