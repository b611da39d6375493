"""Parallelism, applied to a model from outside."""

from __future__ import annotations

import torch
from torch import nn

from torchrft.config.job_config import Parallel
from torchrft.parallel.fsdp import apply_fsdp, set_gradient_sync
from torchrft.parallel.mesh import ParallelDims
from torchrft.parallel.zero import sharding

__all__ = ["ParallelDims", "parallelize", "set_gradient_sync"]


def parallelize(
    model: nn.Module,
    dims: ParallelDims,
    config: Parallel,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Spreads `model` over the ranks of `dims`, in place, and returns it.

    Parameters keep their dtype (float32 master weights) and compute in `dtype`. One rank that
    computes in the parameters' own dtype has nothing to shard or to cast: the model stays as it is.
    """
    parameter = next(model.parameters())
    if dims.world_size > 1 or parameter.dtype != dtype:
        apply_fsdp(model, dims.mesh(parameter.device.type), sharding(config), dtype)
    return model
