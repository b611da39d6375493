"""Writes the debug model and the max_digit task that lie beside this script.

    python tests/assets/make_assets.py [folder]

Both are checked in; this script is how they were made and a test checks that it still makes them.

debug_model/  config and tokenizer of a small Qwen2 without weights (`[model] init = "random"`).
              The tokenizer has one token per character, so that decode(encode(x)) == x.
max_digit/    "which is the largest of these four digits?": prompt "3141=", label "4".
              Only prompts whose maximum is 4 to 9, equally many per maximum, so that the best
              constant answer earns 1/6. Copying the digit at one fixed place earns about a third
              (`copy_baseline`); more than that takes comparing digits.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
CHARACTERS = "\n 0123456789=+-*/.,?!:()abcdefghijklmnopqrstuvwxyz"
MAXIMA = range(4, 10)  # a maximum of 4 has 369 prompts, smaller ones too few for both splits
TRAIN_PER_LABEL = 300
EVAL_PER_LABEL = 60

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{{- '<eos>' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def make_tokenizer() -> Tokenizer:
    """One token per character: 56 of them, special tokens first, a multiple of 8 for tp_size.

    Byte-level BPE without merges, in exactly the form of Qwen2's own tokenizer: AutoTokenizer
    rebuilds that class for every folder with model_type qwen2 and takes only the vocabulary from
    the file. Characters outside the vocabulary (capitals, say) are dropped.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def model_config(vocab_size: int) -> dict[str, Any]:
    """Qwen2 with head_dim 32: less is refused by vLLM on the CPU."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "dtype": "float32",
    }


def write_debug_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = model_config(tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]},
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": config["max_position_embeddings"],
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_special_tokens": SPECIAL_TOKENS[3:],
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def max_digit_splits() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and evaluation rows: balanced over labels, shuffled, without a common prompt."""
    by_label: dict[int, list[dict[str, str]]] = defaultdict(list)
    for digits in itertools.product("0123456789", repeat=4):
        label = max(digits)
        by_label[int(label)].append({"prompt": "".join(digits) + "=", "label": label})
    generator = random.Random(0)
    train: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    for label_value in MAXIMA:
        rows = generator.sample(by_label[label_value], TRAIN_PER_LABEL + EVAL_PER_LABEL)
        train += rows[:TRAIN_PER_LABEL]
        evaluation += rows[TRAIN_PER_LABEL:]
    generator.shuffle(train)
    generator.shuffle(evaluation)
    return train, evaluation


def copy_baseline(rows: list[dict[str, str]]) -> float:
    """Reward of the best answer that copies the digit at one place, compared with none."""
    hits = [sum(row["prompt"][place] == row["label"] for row in rows) for place in range(4)]
    return max(hits) / len(rows)


def write_max_digit(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, evaluation = max_digit_splits()
    for name, rows in (("train", train), ("eval", evaluation)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    write_debug_model(target / "debug_model")
    write_max_digit(target / "max_digit")
