"""Tiny models of several architectures and batches of random samples, for tests on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from torchrft.models import attention
from torchrft.types import RolloutBatch

VOCABULARY = 56  # as the debug model's tokenizer

# Large weights, so that what a token attends to changes the most likely next token.
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
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    # One layer with a window and one without, each with its own rotary base.
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
}


def config(family: str, **options: Any) -> PreTrainedConfig:
    """A config of two layers with grouped queries; `mistral` has a window of 4 tokens."""
    return AutoConfig.for_model(family, **{**_COMMON, **_OWN.get(family, {}), **options})


def model(family: str, implementation: str = attention.NAME, seed: int = 0, **options: Any) -> Any:
    """A float32 model in eval mode; equal seeds and options give equal weights."""
    made = copy.deepcopy(config(family, **options))
    made._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


def batch(groups: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> RolloutBatch:
    """Random samples of `groups`: (prompt length, response lengths), in that order."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(2, VOCABULARY, (length,), generator=generator)

    sequences, prompt_lens, lengths, group = [], [], [], []
    for index, (prompt_len, responses) in enumerate(groups):
        prompt = tokens(prompt_len)
        for length in responses:
            sequences.append(torch.cat([prompt, tokens(length)]))
            prompt_lens.append(prompt_len)
            lengths.append(length)
            group.append(index)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return RolloutBatch(
        sequences=tuple(sequences),
        prompt_lens=torch.tensor(prompt_lens),
        mask=mask,
        rewards=torch.zeros(len(sequences)),
        group=torch.tensor(group),
        rollout_logprobs=torch.zeros(mask.shape),
    )
