"""Folders of tiny scalar reward models, and what transformers says of single samples."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from tiny_job import MODEL
from transformers import AutoConfig, AutoModelForSequenceClassification

# Of the families that have no causal LM in tests/tiny.py.
_OTHERS = ("bert", "gpt2")
_OTHER: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "pad_token_id": 0,
}


def save(folder: Path, family: str = "qwen2", seed: int = 0, **options: Any) -> str:
    """A scalar reward model with large random weights and the debug model's tokenizer."""
    if family == "xlnet":
        config = AutoConfig.for_model(family, vocab_size=tiny.VOCABULARY, num_labels=1, **options)
    elif family in _OTHERS:
        config = AutoConfig.for_model(family, **{**_OTHER, "num_labels": 1, **options})
    else:
        config = tiny.config(family, **{"num_labels": 1, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def tokenizer(folder: Path) -> None:
    """Puts the debug model's tokenizer there."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(MODEL, name), folder)


@torch.no_grad()
def reference(folder: str, samples: Sequence[Sequence[int]]) -> list[float]:
    """transformers' own scores, one sample at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return [model(torch.tensor([list(sample)])).logits.item() for sample in samples]
