"""Tiny models of the families whose files hold trained constants beside their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoModelForCausalLM

from torchrft.models.loader import persistent_buffers

_MOE = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_MLA = {
    **_MOE,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
_FULL = ["full_attention", "full_attention"]
DENSE: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "final_logit_softcapping": None,
        "num_kv_shared_layers": 0,
        "tie_word_embeddings": True,
    },
    "apertus": {},
}
ROUTED: dict[str, dict[str, Any]] = {
    "glm4_moe": _MOE,
    "dots1": _MOE,
    "solar_open": _MOE,
    "hy_v3": {**_MOE, "num_experts": 4},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "exaone_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "num_shared_experts": 1,
        "layer_types": _FULL,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": _FULL,
    },
    "deepseek_v3": _MLA,
}
FAMILIES = DENSE | ROUTED


def model(family: str, implementation: str = "eager", seed: int = 0, **options: Any) -> Any:
    """A float32 model whose buffers are those of a trained one, and none a bfloat16 number."""
    made = tiny.model(family, implementation, seed, **{**FAMILIES[family], **options})
    generator = torch.Generator().manual_seed(seed)
    for _, buffer in persistent_buffers(made):
        with torch.no_grad():
            buffer.mul_(0.7).add_(torch.rand(buffer.shape, generator=generator))
    return made


def save(family: str, folder: Path | str, **options: Any) -> Any:
    """Its files in `folder`, and transformers' own model of them."""
    model(family, **options).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
