"""One token of each sequence through a plain decoder on a CPU, in as few calls as possible.

A small model's step is bound by Python, modules and single operations, not by arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from torchrft.models.attention import Layout
from torchrft.rollout.native.joined import is_joined


def is_plain(decoder: nn.Module) -> bool:
    """Whether `lean_step` computes what the decoder's own forward does, and is faster."""
    if type(decoder) not in (LlamaModel, Qwen2Model, Qwen3Model):
        return False
    on_cpu = decoder.get_parameter("norm.weight").device.type == "cpu"
    leaders = [m for n, m in decoder.named_modules() if n.endswith((".q_proj", ".gate_proj"))]
    return on_cpu and all(map(is_joined, leaders))


def lean_step(decoder: Any, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Hidden states [B, hidden] of ids int64 [B] at positions int64 [B, 1]."""
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, positions)  # [B, 1, D], both halves equal
    half = sin.shape[-1] // 2
    rotation = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
    for layer in decoder.layers:
        normed = _norm(layer.input_layernorm, hidden)
        hidden = hidden + _attention(layer.self_attn, normed, rotation, layout)
        mlp, normed = layer.mlp, _norm(layer.post_attention_layernorm, hidden)
        gate, up = mlp.gate_proj.whole(normed).chunk(2, -1)
        hidden = hidden + F.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight, mlp.down_proj.bias)
    return _norm(decoder.norm, hidden)


def _attention(
    module: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    cos, sin = rotation
    batch, dim = len(hidden), module.head_dim
    parts = module.q_proj.whole(hidden).split(module.q_proj.sizes, -1)
    query, key, value = (part.view(batch, -1, dim) for part in parts)
    if hasattr(module, "q_norm"):
        query, key = _norm(module.q_norm, query), _norm(module.k_norm, key)
    query, key = (
        (x * cos).addcmul_(x.roll(dim // 2, -1), sin).unsqueeze(2)  # [B, H, 1, D]
        for x in (query, key)
    )
    window = getattr(module, "sliding_window", None)
    out = layout(module.layer_idx, query, key, value.unsqueeze(2), module.scaling, window)
    return F.linear(out.reshape(batch, -1), module.o_proj.weight, module.o_proj.bias)


def _norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
