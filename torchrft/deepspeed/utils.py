"""`deepspeed.utils` and `deepspeed.runtime.utils`: what scripts call beside the engine."""

import logging
import weakref
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from torchrft.checkpoint.dcp_files import LoadPlanner, Reader, calling_dcp
from torchrft.deepspeed.accelerator import get_accelerator
from torchrft.deepspeed.checkpoint import folder_of
from torchrft.deepspeed.whole import shard_of, write
from torchrft.tools.logging import logger

clip_grad_norm_ = nn.utils.clip_grad_norm_

optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Those of all engines."""


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs `message` on `ranks`: rank 0 if left out, every rank for [-1]."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if (ranks is not None and -1 in ranks) or rank in (ranks or [0]):
        logger.log(level, "[Rank %d] %s", rank, message)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs the memory in use on rank 0, if `force`."""
    if force and (not dist.is_initialized() or dist.get_rank() == 0):
        used = get_accelerator().memory_allocated() / 2**30
        peak = get_accelerator().max_memory_allocated() / 2**30
        logger.info("%s: %.2f GiB, at most %.2f GiB", message, used, peak)


class RepeatingLoader:
    """Iterates over a data loader without end.

    >>> loader = RepeatingLoader([1, 2])
    >>> [next(loader) for _ in range(3)]
    [1, 2, 1]
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


def recursive_getattr(model: Any, module_name: str) -> Any:
    """The attribute of a dotted name: "encoder.0.weight"."""
    return reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Sets the attribute of a dotted name."""
    *parents, name = module_name.split(".")
    setattr(reduce(getattr, parents, model), name, module)


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: list[Any]) -> list[nn.Module]:
    """The modules of these classes. There is nothing to set: FSDP2 gathers whole layers."""
    return [m for m in model.modules() if isinstance(m, tuple(leaf_module_classes))]


# ---------------------------------------------------------------- whole tensors of a parameter


def safe_get_full_fp32_param(param: Tensor) -> Tensor:
    """The whole float32 weight, on every rank; collective."""
    return _whole(shard_of(param).detach())


def safe_get_full_grad(param: Tensor) -> Tensor | None:
    """The whole float32 gradient, None where there is none; collective."""
    grad = shard_of(param).grad
    return None if grad is None else _whole(grad)


def safe_get_full_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """The optimizer's whole state, such as "exp_avg", None before its first step; collective."""
    for optimizer in optimizers:
        if (value := optimizer.state.get(shard_of(param), {}).get(optim_state_key)) is not None:
            return _whole(value)
    return None


@torch.no_grad()
def safe_set_full_fp32_param(param: Tensor, value: Tensor) -> None:
    """Writes a whole weight, equal on all ranks, into the shards."""
    write(param, value)


@torch.no_grad()
def safe_set_full_grad(param: Tensor, value: Tensor) -> None:
    """Writes a whole gradient, equal on all ranks, into the shards."""
    if (grad := shard_of(param).grad) is not None:
        write(grad, value)


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).float()


# ---------------------------------------------------------------- weights out of a checkpoint


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: str | None = None
) -> dict[str, Tensor]:
    """The whole float32 weights of a checkpoint that `engine.save_checkpoint` wrote; one process.

    Raises ValueError for a folder without a checkpoint, and for a file that was forged.
    """
    latest = Path(checkpoint_dir) / "latest"
    if tag is None and not latest.is_file():
        raise ValueError(f"{latest} is not there: give the tag of the checkpoint")
    reader = Reader(folder_of(checkpoint_dir, tag))
    entries = reader.read_metadata().state_dict_metadata
    model = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    with calling_dcp():
        dcp.load(model, storage_reader=reader, planner=LoadPlanner(), no_dist=True)
    return {
        name.removeprefix("model."): value.float() if value.is_floating_point() else value
        for name, value in model.items()
    }


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str, tag: str | None = None
) -> nn.Module:
    """Loads a checkpoint's weights into a model that is not sharded, and returns it on the CPU."""
    model.cpu().load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag))
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str, output_file: str, tag: str | None = None
) -> None:
    """Writes a checkpoint's whole float32 weights as one state dict."""
    torch.save(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), output_file)
