"""The model inside a vLLM engine: where it holds the tensors of a Hugging Face model.

vLLM fuses projections (q, k, v; gate, up), splits them over the engine's ranks, pads the vocabulary
and, on a CPU, packs linear weights into a layout of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from torchrft.rollout.canary import Held, Packed


def held(model: nn.Module, name: str) -> list[Held]:
    """Where this rank holds (a part of) the Hugging Face parameter; [] if nobody can tell."""
    path, _, leaf = name.rpartition(".")
    found = _find(model, path)
    if found is None:
        return []
    places = [_place(*found, leaf)]
    head = getattr(model, "lm_head", None)
    if path.endswith("embed_tokens") and _is_tied(model) and isinstance(head, nn.Module):
        places.append(_place(head, None, leaf))  # packed on its own, it can stay behind
    return places


def logits_processors(model: nn.Module) -> list[nn.Module]:
    """The modules whose output are the logits that are sampled."""
    return [module for module in model.modules() if isinstance(module, LogitsProcessor)]


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _find(model: Any, path: str) -> tuple[nn.Module, int | None] | None:
    """The module at `path`, or the fused one that it is the i-th part of."""
    try:
        return model.get_submodule(path), None
    except AttributeError:
        parent, _, child = path.rpartition(".")
    for fused, children in (getattr(model, "packed_modules_mapping", None) or {}).items():
        if child in children:
            try:
                return model.get_submodule(f"{parent}.{fused}"), children.index(child)
            except AttributeError:
                continue
    return None


def _place(module: Any, part: int | None, leaf: str) -> Held:
    """Part `part` (None: the whole) of the module's parameter `leaf`."""
    at = dim = 0
    if isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        start = shard.org_vocab_start_index
        length = shard.org_vocab_end_index - start
    elif isinstance(module, RowParallelLinear) and leaf == "weight":
        dim, length = 1, module.input_size_per_partition
        start = module.tp_rank * length
    elif isinstance(module, ColumnParallelLinear):
        sizes, index, rank = module.output_partition_sizes, part or 0, module.tp_rank
        if isinstance(module, QKVParallelLinear) and index > 0:
            rank //= module.num_kv_head_replicas
        at, length = sum(sizes[:index]), sizes[index]
        start = rank * length
    else:
        return Held(lambda: getattr(module, leaf))
    columns = slice(None) if dim == 1 else slice(at, at + length)
    is_embedding = isinstance(module, VocabParallelEmbedding) and not isinstance(
        module, ParallelLMHead
    )
    if leaf == "weight" and hasattr(module, "cpu_linear") and not is_embedding:

        def apply(x: Tensor) -> Tensor:
            return module.cpu_linear(x, module.weight, None)[:, columns]

        inputs = module.embedding_dim if hasattr(module, "embedding_dim") else _inputs(module)
        return Packed(apply, dim, start, length, inputs, module.weight.dtype)
    return Held(lambda: getattr(module, leaf)[columns], dim, start, length)


def _inputs(module: Any) -> int:
    return getattr(module, "input_size_per_partition", module.input_size)
