"""Whole GRPO steps with images: seconds by phase, tokens/s and peak memory, by the trainer itself.

    python benchmarks/vlm_step.py [--engine vllm|native] [--gpus 1] [--engine_tp_size 1]
    python benchmarks/vlm_step.py --tiny [--engine native]                         # on a CPU

Random bf16 weights in the shape of Qwen2.5-VL-3B, written to a temporary folder (8 GB) and loaded
from it; 32 prompts x 8 samples x 512 tokens, one optimizer step a rollout. Every prompt has a line
drawing of its own, 240 to 640 pixels wide and 160 to 480 high as in geometry3k: 48 to 391 tokens.
Further flags go to torchrft.train as they are (`--compile`, `--freeze_vision`, `--adam_offload`).
The first step warms up; the table has the others' median, and the largest of all peaks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, machine, table
from grpo_step import medians, steps_of
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForImageTextToText

sys.path.append(str(REPOSITORY / "tests"))
from tiny_vlm import qwen_folder

QUESTION = "Find the measure of the angle marked x in the figure; answer with a number of degrees."
TEXT: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
    **{"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    **{"max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    },
    **{"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None},
}
TOWER: dict[str, Any] = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
    **{"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 2048},
}
PROCESSOR = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 1_003_520}


def model_folder(folder: Path, tiny: bool) -> None:
    """Writes a model with random weights, tokenizer and processor, of the larger vocabulary."""
    folder.mkdir()
    qwen_folder("qwen2_5_vl", folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.text_config.vocab_size = 512
    if not tiny:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {name: getattr(config, name) for name in names}
        config = AutoConfig.for_model(
            "qwen2_5_vl", text_config=TEXT, vision_config=TOWER, tie_word_embeddings=True, **ids
        )
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text()) | PROCESSOR | {"size": PIXELS}
        path.write_text(json.dumps(settings))
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes a minute
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.save_pretrained(folder)


def prompt_file(folder: Path, count: int, tiny: bool) -> str:
    """Prompts with a figure each, in files beside it: triangles, circles and letters."""
    draw, scale = random.Random(0), 8 if tiny else 1
    rows = []
    for index in range(count):
        size = draw.randint(240, 640) // scale, draw.randint(160, 480) // scale
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        corners = [(draw.randrange(size[0]), draw.randrange(size[1])) for _ in range(5)]
        pen.polygon(corners[:3], outline="black")
        pen.ellipse([*map(min, *corners[3:]), *map(max, *corners[3:])], outline="black")
        for name, corner in zip("ABCDE", corners, strict=True):
            pen.text(corner, name, fill="black")
        picture.save(folder / f"{index}.png")
        rows.append({"prompt": f"<image>{QUESTION}", "images": f"{index}.png"})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    longest = 192 if options.tiny else 512  # tokens of a prompt
    # In a process of its own, whose GPU memory goes with it.
    writer = get_context("spawn").Process(
        target=model_folder, args=(folder / "model", options.tiny)
    )
    writer.start()
    writer.join()
    flags = {
        "pretrain": folder / "model",
        "prompt_data": prompt_file(folder, options.prompts * (options.steps + 2), options.tiny),
        "images_key": "images",
        "apply_chat_template": "true",
        "save_path": folder / "run",
        "functions": f"{REPOSITORY}/tests/tiny_rewards.py:spread",
        "engine_type": options.engine,
        "max_num_seqs": options.prompts * 8 // options.gpus * options.tp,
        "max_steps": options.steps + 2,
        "rollout_batch_size": options.prompts,
        "n_samples_per_prompt": 8,
        "train_batch_size": options.prompts * 8,
        "max_len": longest + options.tokens,
        "prompt_max_len": longest,
        "max_new_tokens": options.tokens,
        "top_p": 1.0,
        "init_kl_coef": 0.0,
        "mismatch_alarm": 1.0,
        "packing_samples": "true",
        "max_tokens_per_microbatch": options.micro,
        "gradient_checkpointing": "true",
        "fused_linear_logprob": "true",
        "bf16": str(not options.tiny).lower(),
        "save_interval": 1000000,
    }
    if options.engine == "vllm":
        flags["engine_mem_util"], flags["engine_tp_size"] = options.engine_mem_util, options.tp
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.gpus)]
    fsdp = ["--fsdp"] if options.gpus > 1 else []
    return [sys.executable, *run, "-m", "torchrft.train", *words, *fsdp, *options.more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="vllm", choices=["vllm", "native"])
    parser.add_argument("--tiny", action="store_true", help="three layers, float32, small pictures")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--engine_tp_size", type=int, default=1, dest="tp")
    parser.add_argument("--engine_mem_util", type=float, default=0.3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro", type=int, default=8192, help="tokens of a micro-batch")
    options, options.more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        steps = steps_of(command(options, folder), folder / "run", options.steps + 1)
    found = medians(steps[1:])
    tokens = options.prompts * 8 * found["response_length/mean"]
    found["response tokens/s of the rollout"] = tokens / found["rollout s"]
    for key in ("memory/peak_gib", "memory/gpu_gib"):
        found[key] = max(step[key] for step in steps)
    shape = "tiny" if options.tiny else "Qwen2.5-VL-3B"
    print(
        f"{machine('torch', 'transformers')}; {shape}, {options.gpus} ranks, {options.engine}, "
        f"engine_tp_size {options.tp} {' '.join(options.more)}"
    )
    print(table(["", "median"], [[key, f"{value:,.4g}"] for key, value in found.items()]))


if __name__ == "__main__":
    main()
