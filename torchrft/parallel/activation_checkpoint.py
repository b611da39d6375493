"""Activations computed again in the backward pass instead of kept (arXiv:1604.06174)."""

import functools
from typing import Any

import torch
import torch.nn.attention.varlen  # defines its operator
from torch import nn
from torch.utils import checkpoint
from transformers import Cache

from torchrft.parallel.modules import decoder_layers

_aten = torch.ops.aten
# What is expensive to compute for the memory that it takes.
_KEPT = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._flash_attention_forward.default,
    torch.ops.torch_attn._varlen_attn.default,
}
_SAVE = checkpoint.CheckpointPolicy.MUST_SAVE
_RECOMPUTE = checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
_MATMULS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}


def apply_activation_checkpointing(model: nn.Module, selective: bool = False) -> None:
    """Keeps only the inputs of decoder layers; with `selective` also the outputs of attention and
    of every other matmul, which costs less time for more memory.

    Dropout draws the same masks again: where there is any, the state of the random generators is
    kept with the inputs.
    """
    draws = any(_has_dropout(module) for module in model.modules())
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    if selective:
        options["context_fn"] = _contexts
    for layer in decoder_layers(model):
        # The method is replaced, not the module, so that parameters keep their names.
        layer.forward = functools.partial(_checkpointed, layer.forward, options)


def _has_dropout(module: nn.Module) -> bool:
    """By dropout modules, or rates > 0 among attributes of the module and of its config."""
    if "Dropout" in type(module).__name__ and getattr(module, "p", 0.0) > 0:
        return True
    values = {**vars(module), **vars(getattr(module, "config", module))}
    rates = (v for name, v in values.items() if "drop" in name and isinstance(v, float | int))
    return any(rate > 0 for rate in rates)


def _checkpointed(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(v, Cache) for v in (*args, *kwargs.values())):
        raise ValueError(
            "gradient_checkpointing computes a layer twice, which would fill its KV cache twice; "
            "call the model with use_cache=False"
        )
    return checkpoint.checkpoint(forward, *args, **options, **kwargs)


def _contexts() -> Any:
    seen: dict[tuple[Any, bool], int] = {}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        kept = op in _KEPT
        if op in _MATMULS:
            # The same ones in the forward pass and when it is computed again.
            turn = seen[op, context.is_recompute] = seen.get((op, context.is_recompute), 0) + 1
            kept = turn % 2 == 0
        return _SAVE if kept else _RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)
