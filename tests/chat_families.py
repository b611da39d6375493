"""Tiny byte-level tokenizers with the chat templates and special tokens of known families.

The templates lie in tests/assets/chat_templates. With CHAT_TEMPLATES=folder those of that folder
are taken instead, by the names in `MAKERS_NAMES`, as far as it has them.
"""

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "assets" / "chat_templates"
# As the `trl` package names them.
MAKERS_NAMES = {"qwen3_5": "qwen3_8", "llama3": "llama3_1", "gpt_oss": "gptoss"}

_CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
_LLAMA = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|>"
_HARMONY = "<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|call|> <|return|>"
_MISTRAL = "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS]"
SPECIAL = {
    "chatml": _CHATML,
    "qwen2_5": _CHATML,
    "qwen3": _CHATML,
    "qwen3_5": _CHATML,
    "llama3": f"{_LLAMA} <|eot_id|> <|python_tag|>",
    "mistral": f"{_MISTRAL} [TOOL_RESULTS] [/TOOL_RESULTS] [ARGS] [CALL_ID]",
    "gpt_oss": f"<|endoftext|> {_HARMONY}",
}
EOS = {"llama3": "<|eot_id|>", "mistral": "</s>", "gpt_oss": "<|return|>"}
# Tokens that a tokenizer knows, but not as special ones.
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
MERGES = ["in", "th", "er", "Ċ" + "Ċ", "Ġ" + "a", "Ã" + "©", "ð" + "Ł"]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "string", "enum": ["C", "F"]},
                    "hours": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["place"],
            },
        },
    }
]


def tokenizer(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, a few merges, and the family's own tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate([*letters, *MERGES])}
    pairs = [(merge[0], merge[1:]) for merge in MERGES]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = SPECIAL[family].split()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    bos = {"llama3": "<|begin_of_text|>", "mistral": "<s>"}.get(family)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS.get(family, "<|im_end|>"), bos_token=bos
    )
    made.chat_template = chat_template(family) if template is None else template
    return made


def chat_template(family: str) -> str:
    path = FOLDER / f"{family}.jinja"
    if folder := os.environ.get("CHAT_TEMPLATES"):
        makers = Path(folder) / f"{MAKERS_NAMES.get(family, family)}.jinja"
        path = makers if makers.exists() else path
    return path.read_text(encoding="utf-8")
