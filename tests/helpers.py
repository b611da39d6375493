"""Helpers that several test modules share."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Its processes are forked from one that has imported what most of them need, which takes seconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("torchrft.trainer", "torchrft.deepspeed", "torch.distributed.checkpoint"),
        *(f"transformers.models.{x}.modeling_{x}" for x in ("llama", "qwen2", "qwen3")),
        *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    ]
)


def _rank_main(
    rank: int,
    function: Callable[..., Any],
    nproc: int,
    folder: str,
    seconds: float,
    args: tuple,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # not what it was when the first of these processes started
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", nproc),
        rank=rank,
        world_size=nproc,
        timeout=timedelta(seconds=seconds),
    )
    try:
        result = function(rank, *args)
        Path(folder, f"result-{rank}.pkl").write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Gloo's threads may still be at it: an orderly end then aborts now and then.
    sys.stdout.flush()
    os._exit(0)


def run_ranks(
    function: Callable[..., Any], nproc: int, *args: Any, timeout: float = 400.0
) -> list[Any]:
    """Run `function(rank, *args)` in `nproc` new processes joined in a gloo group.

    `function` must be defined at a module's top level (the processes import it), its arguments
    and result must be picklable. Returns the results in rank order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; its traceback is the text.
        TimeoutError: a rank was not done after `timeout` seconds; all are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank_main,
            args=(function, nproc, folder, timeout, args, dict(os.environ)),
            nprocs=nproc,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks still running after {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [
            pickle.loads(Path(folder, f"result-{rank}.pkl").read_bytes()) for rank in range(nproc)
        ]
