"""Activations computed again in the backward pass instead of kept (arXiv:1604.06174)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.attention.varlen  # defines its operator
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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
_MATMULS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}


def apply_activation_checkpointing(model: nn.Module, selective: bool = False) -> None:
    """Keeps only the inputs of decoder layers; with `selective` also the outputs of attention and
    of every other matmul, which costs less time for more memory."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = _contexts
    for layer in decoder_layers(model):
        # The method is replaced, not the module, so that parameters keep their names.
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


def _contexts() -> Any:
    seen: dict[tuple[Any, bool], int] = {}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in _KEPT
        if op in _MATMULS:
            # The same ones in the forward pass and when it is computed again.
            turn = seen[op, context.is_recompute] = seen.get((op, context.is_recompute), 0) + 1
            kept = turn % 2 == 0
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
