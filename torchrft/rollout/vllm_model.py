"""The model inside a vLLM engine: where it holds the tensors of a Hugging Face model.

vLLM fuses projections (q, k, v; gate, up), splits them over the engine's ranks, pads the vocabulary
and, on a CPU, packs linear weights into a layout of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

from torchrft.rollout.canary import Canary, Held, Packed

Pairs = Iterable[tuple[str, Tensor]]


def load(
    model: Any, expected: nn.Module, pairs: Pairs, reload: Callable[[Pairs], object] | None
) -> None:
    """Loads all weights into vLLM's model and proves that it holds them.

    Args: expected, a Hugging Face model with the names, shapes and ties of `pairs`; reload, how to
        load on a CPU, where packed layers are unpacked, loaded and packed again.
    """
    canary = Canary(expected, lambda name: held(model, name))
    watched = canary.watch(pairs)
    if reload is None:
        model.load_weights(watched)
    else:
        reload(_with_head(expected, watched))
    canary.check()


def _with_head(expected: nn.Module, pairs: Pairs) -> Iterator[tuple[str, Tensor]]:
    """A tied head is packed by itself, so it is loaded by itself."""
    parameters = dict(expected.named_parameters(remove_duplicate=False))
    head = parameters.get("lm_head.weight")
    for name, tensor in pairs:
        yield name, tensor
        if name != "lm_head.weight" and parameters[name] is head:
            yield "lm_head.weight", tensor


def scale_logits(model: nn.Module, temperature: Callable[[], float]) -> None:
    """From now on the logits are divided by `temperature()` before vLLM sees them, so that its
    log-probs are those of the sampling temperature, and before top-p and top-k: the trainer's."""

    def scale(_module: Any, _inputs: Any, logits: Tensor | None) -> Tensor | None:
        # In float32, since another rounding to bfloat16 would be another policy.
        if logits is None or temperature() == 1.0:
            return logits
        return logits.float() / temperature()

    for module in model.modules():
        if isinstance(module, LogitsProcessor):  # its output are the logits that are sampled
            module.register_forward_hook(scale)


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
