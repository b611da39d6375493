"""Parallelism, applied to a model from outside."""

import torch
import torch.distributed as dist
from torch import nn

from torchrft.config.job_config import Parallel
from torchrft.parallel.compile import apply_compile
from torchrft.parallel.fsdp import apply_fsdp, check_shardable, reshard, set_gradient_sync
from torchrft.parallel.mesh import ParallelDims
from torchrft.parallel.modules import decoder_layers, refuse_split, transformers_part
from torchrft.parallel.zero import sharding

__all__ = ["ParallelDims", "parallelize", "reshard", "set_gradient_sync"]


def parallelize(
    model: nn.Module,
    dims: ParallelDims,
    config: Parallel,
    dtype: torch.dtype = torch.float32,
    *,
    gradient_checkpointing: str | None = None,
    compile: bool = False,
) -> nn.Module:
    """Spreads `model` over the ranks of `dims`, in place, and returns it.

    `model` is a transformers model or a module that holds one. In this order: tensor and sequence
    parallelism, activation checkpointing ("full" or "selective"), torch.compile, FSDP2. Parameters
    keep their dtype (float32 master weights) and compute in `dtype`. One rank that computes in the
    parameters' own dtype has nothing to shard or to cast: the model stays as it is. The model may
    be on the meta device; `torchrft.models.sharded` then fills its shards.

    A model whose forward takes part in the split (`PolicyModel`, `ValueModel`) has an attribute
    `mesh`, which is set to the `ModelMesh` of the ranks that see the same samples; its gradients
    add up over `sp` ranks, where FSDP2 takes their mean. A plain transformers model is called as
    before, `model(input_ids=ids, attention_mask=mask)` with the same ids on those ranks; it returns
    whole logits, and gradients are the mean over ranks with other samples, as on one process.

    Raises ValueError, before it changes the model, for options or sizes that do not fit it, a model
    that is sharded already or has scalar parameters to shard, and where more than one rank, another
    dtype or offloading need a process group and there is none, or there is one of another size.
    """
    parameter = next(model.parameters())
    shards = dims.world_size > 1 or parameter.dtype != dtype or config.fsdp_cpu_offload
    _check_layers(model, gradient_checkpointing, compile, dims.tp)
    if (inner := transformers_part(model)) is not None:
        refuse_split(inner.config, type(inner).__name__, dims.tp, dims.sp)
    if shards:
        check_shardable(model)
    if shards or dist.is_initialized():
        _check_ranks(dims, dtype)
    device = parameter.device.type
    if device == "meta":  # the weights come later, to where this job computes
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dims.model_ranks > 1:
        _split(model, dims, device)
    if gradient_checkpointing is not None:
        from torchrft.parallel.activation_checkpoint import apply_activation_checkpointing

        apply_activation_checkpointing(model, selective=gradient_checkpointing == "selective")
    if compile:
        apply_compile(model)
    if shards:
        names = ("dp_replicate", "fsdp") if dims.dp_replicate > 1 else "fsdp"
        mesh = dims.sharding_mesh(device)[names]
        apply_fsdp(model, mesh, sharding(config), dtype, config.fsdp_cpu_offload)
    return model


def _split(model: nn.Module, dims: ParallelDims, device: str) -> None:
    """Applies tensor and sequence parallelism."""
    from torchrft.parallel.plain import prepare_plain
    from torchrft.parallel.sequence_parallel import apply_sequence_parallel
    from torchrft.parallel.tensor_parallel import apply_tensor_parallel

    plain = not hasattr(model, "mesh")
    if plain:
        prepare_plain(model, dims.tp)
    ranks = dims.model_mesh(device)
    if dims.tp > 1:
        apply_tensor_parallel(model, dims.sharding_mesh(device)["tp"])
    apply_sequence_parallel(model, ranks, plain)
    if not plain:
        setattr(model, "mesh", ranks)  # noqa: B010


def _check_layers(model: nn.Module, mode: str | None, compile: bool, tp: int) -> None:
    if mode not in (None, "full", "selective"):
        raise ValueError(f'gradient_checkpointing = "{mode}" must be "full", "selective" or None')
    if compile and tp > 1 and mode is None:
        raise ValueError(
            f"compile with tp_size = {tp} needs gradient_checkpointing: without it, torch.compile "
            "does not end on DTensor's backward pass with dynamic lengths (torch 2.13)"
        )
    if (mode or compile) and not decoder_layers(model):
        what = "gradient_checkpointing" if mode else "compile"
        raise ValueError(
            f"{what} works on repeated layers, of which {type(model).__name__} has none that "
            "transformers names in _no_split_modules; leave it out"
        )


def _check_ranks(dims: ParallelDims, dtype: torch.dtype) -> None:
    if not dist.is_initialized():
        raise ValueError(
            f"{dims} in {dtype} needs FSDP2 and a process group: call "
            "torchrft.tools.distributed.setup() first, under torchrun for several ranks"
        )
    if dims.world_size != dist.get_world_size():
        raise ValueError(
            f"{dims} is for {dims.world_size} ranks, but the process group has "
            f"{dist.get_world_size()}; use ParallelDims.of(config, {dist.get_world_size()})"
        )
