"""A tiny config of every causal language model of the installed transformers.

`config("gemma2")` has two or four layers of width 32, windows of 4 tokens, and each kind of layer
that the family mixes. `python tests/families.py [NAME...]` holds families to transformers' own
forward in all ways (see `check`), and with `--table` before the names prints the table of
docs/models.md.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from helpers import run_ranks
from tiny import VOCABULARY, batch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from torchrft.checkpoint.hf_export import export_hf
from torchrft.config.job_config import Parallel
from torchrft.learn.packing import build as micro_batch
from torchrft.models.loader import load_config, load_model, load_tokenizer
from torchrft.models.policy import PolicyModel
from torchrft.models.sharded import ShardedWeights
from torchrft.models.support import auto_class, refuse_unsupported
from torchrft.parallel import ParallelDims, parallelize
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

TOLERANCE = 2e-5  # nats, in float32
WAYS = ("padded", "packed", "native", "two ranks", "export")
_TOKENIZER = Path(__file__).parent / "assets/debug_model"
GROUPS = [(3, [4, 1, 7]), (6, [2]), (1, [1, 5]), (11, [6, 12])]
PROMPTS = [(7, 8, 9), (20,), (5, 6) * 7, (30, 2, 40, 41, 9, 10, 22)]

# Every option that a config knows is set to this.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "attention_dropout": 0.0,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    # latent attention: values narrower than keys
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # mixers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_GEMMA4 = {
    **_WINDOWED,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "per_layer_config": {1: {"head_dim": 16}},
    "num_global_key_value_heads": 2,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}

# What a family needs beside, by its name; "name:variant" is another config of it.
OWN: dict[str, dict[str, Any]] = {
    "afmoe": {**_WINDOWED, "num_dense_layers": 1, "num_shared_experts": 1},
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "aria_text": {"moe_num_experts": 4, "moe_num_shared_experts": 1},
    "axk1": _LATENT,
    "bailing_hybrid": {**_LINEAR, **_LATENT, **_DENSE_SPARSE},
    "bamba": {"attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 1.0,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cwm": _WINDOWED,
    "cohere2": _WINDOWED,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma2": {**_WINDOWED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "gemma2:plain": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "gemma4": {},
    "mllama": {},
    "phi4_multimodal": {},
    "gemma4_unified": {},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": _LATENT,
    "dots1": {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "exaone4": _WINDOWED,
    "exaone_moe": {**_WINDOWED, **_DENSE_SPARSE},
    "gemma": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma3_text": _WINDOWED,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gemma4_text": _GEMMA4,
    "gemma4_text:shared keys": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text:experts": {
        **_WINDOWED,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "attention_k_eq_v": True,
        "per_layer_config": {1: {"head_dim": 16}},
    },
    "gemma4_unified_text": _WINDOWED,
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"use_qk_norm": True, "partial_rotary_factor": 0.5},
    "glm4_moe_lite": {"num_key_value_heads": 4, **_DENSE_SPARSE},
    "gpt_oss": {**_WINDOWED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {"logits_scaling": 6.0},
    "granitemoehybrid": {**_LINEAR, "logits_scaling": 6.0},
    "granitemoeshared": {"logits_scaling": 6.0},
    "hunyuan_v1_moe": {"moe_topk": [2, 2]},
    "hy_v3": _DENSE_SPARSE,
    "hyperclovax": {"logits_scaling": 2.0},
    "falcon_h1": {"mamba_d_ssm": 64},
    "kimi_linear": {**_LINEAR, **_LATENT, **_DENSE_SPARSE},
    "lfm2": {**_CONV, "full_attn_idxs": None},
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "lfm3": {
        **_CONV,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        },
    },
    "llama:dynamic": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": None,
        "num_key_value_heads": 4,
        "zero_expert_num": 2,
        "head_dim": 4,
    },
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention"],
        **_DENSE_SPARSE,
        "head_dim": 16,
    },
    "minicpm3": {"num_key_value_heads": 4},
    "minimax_m2": {"rotary_dim": 4},
    "minimax_m3_vl_text": {
        **_DENSE_SPARSE,
        "layer_types": ["full_attention"] * 2,
        "rotary_dim": 4,
        "dense_intermediate_size": 48,
    },
    "ministral": _WINDOWED,
    "ministral3": {"sliding_window": None},
    "ministral3:scaled by position": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "hunyuan_v1_dense:dynamic": {
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 1e4,
            "factor": 1.0,
            "alpha": 1000.0,
        },
    },
    "mixtral": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": None,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": {**_LINEAR, "linear_num_key_heads": 4},
    "olmo3": _WINDOWED,
    "phi3:longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.1, 2.0, 8.0, 30.0],
            "original_max_position_embeddings": 64,
        },
    },
    "phimoe": {"lm_head_bias": False, "router_jitter_noise": 0.0},
    "phimoe:no window": {
        "lm_head_bias": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    "qwen2_moe": {"qkv_bias": True, "layer_types": ["full_attention"] * 2},
    "qwen2_moe:window": {"qkv_bias": True, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {**_LINEAR, "partial_rotary_factor": 0.5},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "starcoder2": {"sliding_window": None},
    "starcoder2:window": {},
    "youtu": _LATENT,
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
}


# Families that say of themselves that they do not run here as they are configured, and why.
NOT_BUILT = {
    "emu3": "its text model has a config of another kind than its folder",
    "gemma4_unified_assistant": "it drafts from the keys of another model",
    "gemma3n": "its image tower is timm's, which is not installed",
    "got_ocr2": "its image tower has no sdpa attention",
    "modernbert-decoder": "its get_decoder() is its head",
    "musicgen": "it has two text configs",
    "musicgen_melody": "it has two text configs",
    "xmod": "its language adapters want a default language",
}


# Families that have no config of their own.
_PARTS = {"gemma4_assistant"}  # it drafts from the keys of another model


def names() -> list[str]:
    """Every family, and the variants."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    families = mapping._config_mapping.keys() & mapping._model_mapping.keys()
    return sorted({*families, *OWN} - _PARTS)


def config(name: str) -> PreTrainedConfig:
    """The tiny config. One that no tiny options fit is the family's default."""
    family = name.partition(":")[0]
    try:
        default = AutoConfig.for_model(family)
        options = {**_known(default, _COMMON), **OWN.get(name, {})}
        for part in ("text_config", "vision_config", "audio_config"):
            if (inner := getattr(default, part, None)) is not None:
                tiny = _known(inner, _COMMON if part == "text_config" else _TOWER)
                options[part] = {**tiny, **OWN.get(inner.model_type, {})}
        missing = [key for key, value in options.items() if value is None and key.startswith("num")]
        return AutoConfig.for_model(
            family, **{k: v for k, v in options.items() if k not in missing}
        )
    except Exception:  # each class has checks of its own
        if name in OWN:
            raise
        return AutoConfig.for_model(family)


def _known(default: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    known = {*default.to_dict(), *vars(default), *type(default).attribute_map}
    return {key: value for key, value in options.items() if key in known}


def tokenizer() -> Any:
    """That of the debug model, whose tokens all tiny models have."""
    return load_tokenizer(str(_TOKENIZER))


def model(name: str, implementation: str = "eager", seed: int = 0) -> Any:
    """The family's tiny model in float32, all its parameters and the buffers that files hold away
    from where they start."""
    made = copy.deepcopy(config(name))
    made._attn_implementation = implementation
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        built = auto_class(made).from_config(made, dtype=torch.float32).eval()
        for key, tensor in built.state_dict().items():  # biases and norms start at 0 and 1
            if tensor.is_floating_point() and (tensor.dim() <= 1 or "bias" in key):
                tensor.add_(0.15 * torch.randn(tensor.shape, generator=generator))
    return built


def refusal(name: str) -> str | None:
    """The sentence that refuses the family by its config, if one does."""
    try:
        refuse_unsupported(config(name), cache=True)
    except ValueError as error:
        return str(error)
    return None


def expected(built: Any, gradients: bool = False) -> Tensor:
    """Log-probs [M] of the responses in `tiny.batch`, each sample alone in a forward of its own."""
    logprobs = []
    samples = batch(GROUPS)
    with torch.set_grad_enabled(gradients):
        for row, sequence in enumerate(samples.sequences):
            logprobs.append(alone(built, sequence, int(samples.prompt_lens[row])))
    return torch.cat(logprobs)


def alone(built: Any, sequence: Tensor, prompt: int) -> Tensor:
    logits = built(input_ids=sequence[None], use_cache=False).logits[0, prompt - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, sequence[prompt:, None])[:, 0]


@torch.no_grad()
def distances(folder: Path, built: Any) -> dict[str, float]:
    """The largest differences in the ways that take one process."""
    samples, wanted = batch(GROUPS), expected(built)
    rows = list(range(len(samples)))
    policy = PolicyModel(load_model(str(folder)).eval())
    found = {}
    for way, packed in (("padded", False), ("packed", True)):
        got = policy(micro_batch(samples, rows, packed))[0]
        found[way] = float((got - wanted).abs().max())
    engine = NativeEngine(load_config(str(folder)), tokenizer(), (1,))
    engine.update_weights(named_full_tensors(policy.model), version=0)
    prompts = [Prompt(row=i, text="", token_ids=ids) for i, ids in enumerate(PROMPTS)]
    completions = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=12))
    found["native"] = max(
        float(
            (torch.tensor(c.logprobs) - alone(built, torch.tensor([*ids, *c.token_ids]), len(ids)))
            .abs()
            .max()
        )
        for ids, c in zip(PROMPTS, completions, strict=True)
    )
    return found


def sharded(rank: int, folders: list[str]) -> list[tuple[Tensor, str | None]]:
    """For `run_ranks`: log-probs of each folder's model over two ranks, which then export it."""
    samples = batch(GROUPS)
    rows = list(range(len(samples)))
    results: list[tuple[Tensor, str | None]] = []
    for folder in folders:
        weights = ShardedWeights.of(folder)
        loaded: Any = weights.model(torch.float32) if weights else load_model(folder)
        policy = PolicyModel(loaded.eval())
        parallelize(policy, ParallelDims(dp_shard=2), Parallel(), torch.float32)
        if weights is not None:
            weights.fill(policy, torch.device("cpu"))
        with torch.no_grad():
            logprobs = policy(micro_batch(samples, rows, True))[0]
        Path(folder, "export").mkdir(exist_ok=True)
        export_hf(policy.model, tokenizer(), Path(folder, "export"), torch.float32)
        results.append((logprobs, None))
    return results


def exported(folder: Path, built: Any) -> float:
    """The largest difference of the exported model from the one in `folder`."""
    again = auto_class(built.config).from_pretrained(folder / "export", dtype=torch.float32)
    again.set_attn_implementation("eager")
    return float((expected(again.eval()) - expected(built)).abs().max())


def check(chosen: list[str], root: Path, spread: bool = True) -> dict[str, dict[str, float]]:
    """What each of the families differs by in each way, refused ones left out; `spread`: over two
    ranks and in the export, too."""
    found: dict[str, dict[str, float]] = {}
    models = {name: model(name) for name in chosen if refusal(name) is None}
    for number, (name, built) in enumerate(models.items()):
        built.save_pretrained(root / str(number))
        found[name] = distances(root / str(number), built)
    if spread:
        folders = [str(root / str(number)) for number in range(len(models))]
        results = run_ranks(sharded, 2, folders)[0]
        for (name, built), folder, (logprobs, _) in zip(
            models.items(), folders, results, strict=True
        ):
            found[name]["two ranks"] = float((logprobs - expected(built)).abs().max())
            found[name]["export"] = exported(Path(folder), built)
    return found


if __name__ == "__main__" and sys.argv[1:2] == ["--table"]:
    import family_table

    family_table.main(sys.argv[2:])
elif __name__ == "__main__":
    for name in sys.argv[1:] or names():
        if (sentence := refusal(name)) is not None:
            print(f"{name:28} refused: {sentence}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            differences = check([name], Path(folder))[name]
        wrong = [way for way in WAYS if not differences[way] < TOLERANCE]
        table = "  ".join(f"{way} {differences[way]:.0e}" for way in WAYS)
        print(f"{name:28} {'WRONG' if wrong else 'equal'}: {table}", flush=True)
