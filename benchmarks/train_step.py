"""One optimizer step of the policy on a GPU: tokens/s, share of the matmul rate, peak memory.

    python benchmarks/train_step.py [--model 1.5b] [--tokens 16384] [--repeats 5]
    torchrun --nproc_per_node 2 benchmarks/train_step.py --layouts zero2 fsdp tp sp

Random weights in the shape of Qwen2.5, packed sequences, bf16 with float32 master weights; a step
is forward, loss, backward, clipping and AdamW. The matmul rate is that of 8192^3 in bf16, measured
in the same process; TFLOP/s counts what the mathematics asks for (recomputation not): 6 per
parameter of a matrix and token (head included), and causal attention. Then the head alone, at the
same V: log-probs and entropy with backward, plain, fused and with `fp32_head`. `--model tiny` runs
on a CPU.

Under torchrun, the same by layout: data parallel ranks have `--tokens` each, tensor and sequence
parallel ones share them. Tokens and TFLOP/s are a GPU's.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import machine, table
from transformers import AutoModelForCausalLM, Qwen2Config

from torchrft.config.job_config import Optimizer, Parallel
from torchrft.learn.packing import build
from torchrft.models import attention
from torchrft.models.logprobs import Head, fused_linear_logprob, head_logprob, linear_logprob
from torchrft.models.policy import PolicyModel
from torchrft.optim.optimizer import build_optimizer, clip_gradients
from torchrft.parallel import ParallelDims, parallelize
from torchrft.tools import distributed
from torchrft.types import RolloutBatch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
    | {"tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    | {"tie_word_embeddings": True},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936}
    | {"tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    | {"tie_word_embeddings": False},
}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "fused log-probs": {"fused": True},
    "compile": {"compile": True},
    "compile, fused": {"compile": True, "fused": True},
    "checkpointing, fused": {"checkpointing": "full", "fused": True},
    "checkpointing, fused, compile": {"checkpointing": "full", "fused": True, "compile": True},
    "selective, fused, compile": {"checkpointing": "selective", "fused": True, "compile": True},
    "padded, compile, fused": {"compile": True, "fused": True, "packed": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "fsdp": {"fsdp": True},
    "tp": {"tp_size": -1},
    "sp": {"sp_size": -1},
}


def timed(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, on the GPU by events; two calls warm up."""
    times = []
    for index in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end) / 1e3
        else:
            from common import seconds

            spent = seconds(function)
        if index >= 2:
            times.append(spent)
    return median(times)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of bf16 matrices of 8192 (256 on a CPU)."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device, 10)


def samples(count: int, length: int, prompt: int, vocabulary: int) -> RolloutBatch:
    """`count` sequences of `length` tokens, of which the first `prompt` are the prompt."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(vocabulary, (count, length), generator=generator)
    shape = (count, length - prompt)
    return RolloutBatch(
        sequences=tuple(sequences),
        prompt_lens=torch.full((count,), prompt),
        mask=torch.ones(shape, dtype=torch.bool),
        rewards=torch.zeros(count),
        group=torch.arange(count),
        rollout_logprobs=torch.zeros(shape),
    )


def work(config: Qwen2Config, count: int, length: int) -> float:
    """FLOP of a step: forward and backward of the matrices, the head and causal attention."""
    heads = config.num_attention_heads
    dim = config.hidden_size // heads
    attention_width = config.hidden_size * (heads + config.num_key_value_heads) * 2 // heads
    per_layer = config.hidden_size * (attention_width + 3 * config.intermediate_size)
    matrices = config.num_hidden_layers * per_layer + config.hidden_size * config.vocab_size
    scores = config.num_hidden_layers * 2 * 2 * heads * dim * length**2 / 2
    return count * (6 * matrices * length + 3 * scores)


def step_row(
    name: str,
    way: dict[str, Any],
    options: argparse.Namespace,
    rate: float,
    parallel: Parallel = Parallel(),  # noqa: B008
) -> list[str]:
    device = options.world.device
    dims = ParallelDims.of(parallel, options.world.world_size)
    config = Qwen2Config(**SHAPES[options.model])
    config._attn_implementation = attention.NAME
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    policy = PolicyModel(model, fused=way.get("fused", False), chunk_size=options.chunk_size)
    parallelize(
        policy,
        dims,
        parallel,
        torch.bfloat16,
        gradient_checkpointing=way.get("checkpointing"),
        compile=way.get("compile", False),
    )
    optimizer = build_optimizer(policy, Optimizer(), 1e-6)
    batch = samples(options.tokens // options.length, options.length, 24, config.vocab_size)
    rows = list(range(len(batch)))
    micro = build(batch, rows, way.get("packed", True))
    for field in ("input_ids", "position_ids", "targets", "labels", "cells"):
        object.__setattr__(micro, field, getattr(micro, field).to(device))
    if micro.layout is not None:
        object.__setattr__(micro, "layout", micro.layout.to(device))  # type: ignore[attr-defined]

    def step() -> None:
        logprobs, entropy = policy(micro)
        (-logprobs.mean() - 0.001 * entropy.mean()).backward()
        clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
    spent = timed(step, device, options.repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    flops = work(config, len(batch), options.length) / spent / dims.model_ranks
    tokens = len(batch) * options.length / spent / dims.model_ranks
    return [name, f"{tokens:,.0f}", f"{flops / 1e12:.0f}", f"{flops / rate:.0%}", f"{peak:.1f}"]


def head_rows(options: argparse.Namespace) -> list[list[str]]:
    """Log-probs alone, forward and backward: seconds and memory beyond inputs and gradients."""
    device = options.world.device
    shape = SHAPES[options.model]
    rows, width, vocabulary = options.tokens, shape["hidden_size"], shape["vocab_size"]
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) * 0.02
    weight.requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=device)

    def run(function: Callable[..., Any], *more: Any) -> None:
        logprobs, entropy = function(hidden, weight, labels, *more)
        (logprobs.sum() + entropy.sum()).backward()
        hidden.grad = weight.grad = None

    found = []
    for name, function, more in (
        ("plain", linear_logprob, ()),
        *(
            (f"fused, {chunk}", fused_linear_logprob, (1.0, chunk))
            for chunk in (512, 1024, 2048, 4096)
        ),
        *(
            (f"fp32_head, fused, {chunk}", head_logprob, (Head(1.0, chunk, fp32=True),))
            for chunk in (512, 1024, 2048, 4096)
        ),
        ("fp32_head", head_logprob, (Head(1.0, rows, fp32=True),)),
    ):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        spent = timed(lambda f=function, m=more: run(f, *m), device, options.repeats)
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        found.append((name, spent, peak / 2**30))
    _, time, memory = found[0]
    return [
        [name, f"{1e3 * s:.1f}", f"{s / time:.2f}", f"{m:.2f}", f"{m / max(memory, 1e-9):.1%}"]
        for name, s, m in found
    ]


def rows_of(options: argparse.Namespace, rate: float) -> list[list[str]]:
    """One row for every way, on one GPU; for every layout, on several."""
    ranks, rows = options.world.world_size, []
    cases = [(way, way, Parallel()) for way in options.ways]
    if ranks > 1:
        cases = []
        for layout in options.layouts:
            sizes = {k: ranks if v == -1 else v for k, v in LAYOUTS[layout].items()}
            cases += [(f"{layout}: {way}", way, Parallel(**sizes)) for way in options.ways]
    for name, way, parallel in cases:
        try:
            rows.append(step_row(name, WAYS[way], options, rate, parallel))
        except torch.OutOfMemoryError:
            rows.append([name, "-", "-", "-", "out of memory"])
        except ValueError as error:  # refused on all ranks alike
            rows.append([name, "-", "-", "-", str(error)[:60]])
        if options.world.is_main:
            print(*rows[-1], flush=True)  # a run that is cut off keeps what it has
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="1.5b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk_size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    options = parser.parse_args()
    options.world = world = distributed.setup()
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "no GPU"
    rate = matmul_rate(world.device)
    rows = rows_of(options, rate)
    heads = head_rows(options) if world.world_size == 1 else []
    if world.is_main:
        print(f"{world.world_size} x {name}; {machine('torch', 'transformers')}")
        print(f"bf16 matmul: {rate / 1e12:.0f} TFLOP/s; {options.tokens} tokens a step")
        print(table(["step", "tokens/s", "TFLOP/s", "of matmul", "peak GiB"], rows))
        if heads:
            print("\n" + table(["head", "ms", "of plain", "GiB", "of plain"], heads))
    distributed.teardown()


if __name__ == "__main__":
    main()
