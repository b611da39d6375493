"""Writes the vision-language debug model and the color task that lie beside this script.

    python tests/assets/make_vlm_assets.py [folder]

Both are checked in; this script is how they were made and a test checks that it still makes them.

debug_vlm/  a small LLaVA (CLIP tower, Qwen2 language model) without weights (`[model] init =
            "random"`), its tokenizer, with one token per character, and its processor.
color/      "which color has the square?": a picture of 24 x 24 pixels, in base64, holds a square of
            one of six colors, of any size, anywhere, on any gray. The answer is the color's letter;
            all prompts are alike, so that the best answer without the picture earns 1/6.
"""

from __future__ import annotations

import base64
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import make_assets
from PIL import Image

SIDE, PATCH = 24, 8
COLORS = {
    "r": (220, 40, 40),
    "g": (40, 200, 60),
    "b": (50, 60, 220),
    "y": (225, 215, 40),
    "c": (40, 210, 215),
    "m": (215, 45, 210),
}
QUESTION = "color?"
TRAIN_PER_COLOR, EVAL_PER_COLOR = 160, 30
IMAGE_TOKEN = "<image>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<eos>' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def model_config() -> dict[str, Any]:
    """head_dim 32: less is refused by vLLM on the CPU."""
    text = make_assets.model_config(64)
    del text["architectures"], text["dtype"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        "image_token_index": len(make_assets.SPECIAL_TOKENS) + len(make_assets.CHARACTERS),
        "image_seq_length": (SIDE // PATCH) ** 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "eos_token_id": text["eos_token_id"],
        "pad_token_id": text["pad_token_id"],
        "dtype": "float32",
    }


def write_debug_vlm(folder: Path) -> None:
    make_assets.write_debug_model(folder)
    tokenizer = make_assets.make_tokenizer()
    tokenizer.add_special_tokens([make_assets.AddedToken(IMAGE_TOKEN, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["extra_special_tokens"].append(IMAGE_TOKEN)
    make_assets.write_json(path, settings)
    make_assets.write_json(folder / "config.json", model_config())
    size = {"height": SIDE, "width": SIDE}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_convert_rgb": True, "do_resize": True, "size": size, "resample": 3},
        **{"do_center_crop": False, "crop_size": size, "do_rescale": True},
        **{"rescale_factor": 1 / 255, "do_normalize": True},
        **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
    }
    make_assets.write_json(folder / "preprocessor_config.json", image_processor)
    processor = {
        "processor_class": "LlavaProcessor",
        **{"patch_size": PATCH, "num_additional_image_tokens": 1, "image_token": IMAGE_TOKEN},
        "vision_feature_select_strategy": "default",
    }
    make_assets.write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def picture(color: str, generator: random.Random) -> str:
    """A PNG in base64."""
    gray = generator.randint(0, 255)
    image = Image.new("RGB", (SIDE, SIDE), (gray, gray, gray))
    size = generator.randint(9, 18)
    left, top = (generator.randint(0, SIDE - size) for _ in range(2))
    shade = tuple(min(255, max(0, c + generator.randint(-25, 25))) for c in COLORS[color])
    image.paste(shade, (left, top, left + size, top + size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def color_splits() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and evaluation rows: balanced over colors, shuffled, without a common picture."""
    generator = random.Random(0)
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    for rows, count in ((train, TRAIN_PER_COLOR), (evaluation, EVAL_PER_COLOR)):
        for color in COLORS:
            for _ in range(count):
                image = picture(color, generator)
                while image in seen:
                    image = picture(color, generator)
                seen.add(image)
                rows.append({"prompt": QUESTION, "images": image, "label": color})
        generator.shuffle(rows)
    return train, evaluation


def write_color(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), color_splits(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    write_debug_vlm(target / "debug_vlm")
    write_color(target / "color")
