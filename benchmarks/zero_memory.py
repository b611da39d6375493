"""Bytes per rank of ZeRO stages 1 to 3: torchrft's shim, the paper's formulas and real DeepSpeed.

    pip install deepspeed        # for this benchmark only
    OMP_NUM_THREADS=1 python benchmarks/zero_memory.py [--stages 1 2 3]

Two gloo ranks train the same small decoder in float32, two micro-batches a step, with each library
in turn: `initialize`, `backward` and `step` are the only calls, the loop is the same. Counted are
the storages that hold parameters, gradients and optimizer state, each once, whatever tensors share
them; activations are not. Without DeepSpeed its columns are left out.

The formulas (arXiv:1910.02054, section 5) for P parameters on N ranks, in float32 and not in the
paper's mixed precision: parameters 4P, gradients 4P, and 8P of Adam's moments, or 12P with the copy
of the weights that DeepSpeed keeps even in float32; stage 1 divides the state by N, stage 2 the
gradients too, stage 3 the parameters too.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import machine, table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen2Config

RANKS, ACCUMULATION, MICRO, LENGTH, VOCABULARY = 2, 2, 2, 16, 512
PHASES = ("initialize", "forward", "1st backward", "last backward", "step")
KINDS = ("parameters", "gradients", "optimizer")


def build_model(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def configuration(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True},
        },
        # DeepSpeed's own default of 5e8 elements would be a buffer far larger than the model.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            "stage3_prefetch_bucket_size": 100_000,
            "stage3_param_persistence_threshold": 0,
        },
    }


def storages(root: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that `root` holds, with the names of the attributes that lead to them."""
    if id(root) in seen:
        return
    seen.add(id(root))
    if isinstance(root, DTensor):
        yield name, root.to_local().detach()
    elif isinstance(root, Tensor):
        yield name, root
    if isinstance(root, Tensor):
        for attribute, value in vars(root).items():  # DeepSpeed keeps shards on the parameters
            yield from storages(value, f"{name}.{attribute}", seen)
        if root.is_leaf and root.grad is not None:
            yield from storages(root.grad, f"{name}.grad", seen)
    elif isinstance(root, dict):
        for key, value in root.items():
            yield from storages(key, name, seen)
            yield from storages(value, name, seen)
    elif isinstance(root, list | tuple | set):
        for value in root:
            yield from storages(value, name, seen)
    elif type(root).__module__.startswith(("torch.distributed.fsdp", "deepspeed.runtime.zero")):
        attributes = dict(getattr(root, "__dict__", {}))
        for slot in getattr(type(root), "__slots__", ()):
            attributes[slot] = getattr(root, slot, None)
        for attribute, value in attributes.items():
            if not isinstance(value, nn.Module):
                yield from storages(value, f"{name}.{attribute}", seen)


def measure(engine: Any) -> dict[str, int]:
    """Bytes by kind on this rank. What is shared counts for the first kind below that has it."""
    seen: set[int] = set()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed wraps Adam
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    moments = [dict(state) for state in inner.state.values()]
    found["optimizer"] += [tensor for _, tensor in storages(moments, "", seen)]
    roots = [list(engine.module.parameters()), engine.optimizer]
    roots += [m._get_fsdp_state() for m in engine.module.modules() if hasattr(m, "_get_fsdp_state")]
    for name, tensor in storages(roots, "", seen):
        if "grad" in name or "ipg" in name:
            found["gradients"].append(tensor)
        elif "fp32" in name:
            found["optimizer"].append(tensor)
        else:
            found["parameters"].append(tensor)
    counted: set[int] = set()
    total = dict.fromkeys(KINDS, 0)
    # Parameters first: in float32 some of DeepSpeed's fp32 partitions are views of them.
    for kind in ("parameters", "optimizer", "gradients"):
        for tensor in found[kind]:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                total[kind] += storage.nbytes()
    return total


def train(rank: int, folder: str, library: str, stage: int, options: argparse.Namespace) -> None:
    """20 losses and the bytes of the second step's phases, into folder/result-rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's collectives, once a call
    logging.disable(logging.WARNING)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    if library == "deepspeed":
        import deepspeed
    else:
        from torchrft import deepspeed
    model = build_model(options.hidden)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=configuration(stage)
    )
    bytes_at, losses = {"initialize": measure(engine)}, []
    generator = torch.Generator().manual_seed(1)
    for step in range(options.steps):
        size = (ACCUMULATION, RANKS, MICRO, LENGTH)
        ids = torch.randint(VOCABULARY, size, generator=generator)[:, rank]
        total = 0.0
        for micro in range(ACCUMULATION):
            loss = engine(input_ids=ids[micro], labels=ids[micro], use_cache=False).loss
            total += loss.item() / ACCUMULATION
            if (step, micro) == (1, 0):
                bytes_at["forward"] = measure(engine)
            engine.backward(loss)
            if step == 1:
                bytes_at[PHASES[2 + micro]] = measure(engine)
            engine.step()
        losses.append(total)
        if step == 1:
            bytes_at["step"] = measure(engine)
    Path(folder, f"result-{rank}").write_bytes(pickle.dumps((losses, bytes_at)))
    dist.barrier()
    dist.destroy_process_group()


def run(library: str, stage: int, options: argparse.Namespace) -> Any:
    """Losses (means over ranks) and the bytes of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            train, args=(folder, library, stage, options), nprocs=RANKS, start_method="spawn"
        )
        ranks = [pickle.loads(Path(folder, f"result-{r}").read_bytes()) for r in range(RANKS)]
    losses = [sum(both) / RANKS for both in zip(*(losses for losses, _ in ranks), strict=True)]
    return losses, ranks[0][1]


def formula(kind: str, stage: int, count: int, per_parameter: int) -> int:
    """The paper's bytes per rank; `per_parameter` bytes of optimizer state."""
    first = {"optimizer": 1, "gradients": 2, "parameters": 3}[kind]  # stage that shards it
    whole = count * (per_parameter if kind == "optimizer" else 4)
    return whole // RANKS if stage >= first else whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    peer = importlib.util.find_spec("deepspeed") is not None
    libraries = ["torchrft", "deepspeed"] if peer else ["torchrft"]
    count = sum(parameter.numel() for parameter in build_model(options.hidden).parameters())
    print(machine("torch", "transformers", *libraries[1:]))
    print(f"{count:,} parameters, {RANKS} ranks; KiB per rank\n")
    rows, differences = [], []
    for stage in options.stages:
        found = {library: run(library, stage, options) for library in libraries}
        for kind in KINDS:
            for library, per_parameter in zip(libraries, (8, 12), strict=False):
                row = [str(stage), kind, library]
                row.append(f"{formula(kind, stage, count, per_parameter) / 1024:.0f}")
                row += [f"{found[library][1][phase][kind] / 1024:.0f}" for phase in PHASES]
                rows.append(row)
        if peer:
            pairs = zip(found["torchrft"][0], found["deepspeed"][0], strict=True)
            differences.append([str(stage), f"{max(abs(a - b) for a, b in pairs):.1e}"])
            differences[-1] += [f"{found['torchrft'][0][i]:.5f}" for i in (0, -1)]
    print(table(["stage", "", "library", "formula", *PHASES], rows))
    if peer:
        print(f"\nLosses of {options.steps} steps\n")
        print(table(["stage", "largest difference", "first", "last"], differences))
        assert all(float(row[1]) <= 1e-4 for row in differences), "losses are not DeepSpeed's"


if __name__ == "__main__":
    main()
