"""`deepspeed.comm`: torch.distributed under DeepSpeed's name, and how a job is joined."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torchrft.tools import distributed


def __getattr__(name: str) -> Any:
    """all_reduce, barrier, get_rank and all the others."""
    return getattr(dist, name)


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta = timedelta(minutes=30),
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Joins the process group of the job, as torchrun describes it, unless that has been done.

    DeepSpeed's options that only say how to find the job have nothing to add to torchrun's. Raises
    ValueError for a backend that is not this machine's, and for a job described otherwise.
    """
    known = ["nccl", "cpu:gloo,cuda:nccl"] if torch.cuda.is_available() else ["gloo"]
    if dist_backend not in (None, *known):
        raise ValueError(
            f"dist_backend = {dist_backend!r} is not supported on this machine: use {known[0]!r}, "
            "or leave it out"
        )
    if (init_method or "env://", rank, world_size) != ("env://", -1, -1):
        raise ValueError(
            f"init_method = {init_method!r}, rank = {rank} and world_size = {world_size} are not "
            "supported: start the job with torchrun and leave them out"
        )
    if not dist.is_initialized():
        distributed.setup(timeout.total_seconds())


def get_local_rank() -> int:
    """This process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))
