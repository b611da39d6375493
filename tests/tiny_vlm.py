"""Tiny vision-language models of several families, pictures for them, and what a processor does."""

from __future__ import annotations

import copy
import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from torchrft.models.loader import empty_model
from torchrft.models.vision import Vision
from torchrft.tools.images import Image
from torchrft.types import Completion, Prompt, Sample, Score

sys.path.append(str(Path(__file__).parent / "assets"))
import make_assets

VOCABULARY = 64
IMAGE, VISION_START, VISION_END, VIDEO = 60, 56, 57, 59
SAMPLED = 61  # stands for a sampled image token in transformers' own forward
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
PATCH = 4  # pixels; Qwen merges 2 x 2 patches into a token

# The guide's vision-language command, but for its model, engine_tp_size and engine_mem_util.
GUIDE = """
    --max_len 4096 --num_episodes 10 --actor_learning_rate 1e-6 --train_batch_size 64
    --micro_train_batch_size 1 --rollout_batch_size 32 --micro_rollout_batch_size 1
    --advantage_estimator group_norm --n_samples_per_prompt 4 --fsdp --fsdp_cpu_offload
    --gradient_checkpointing --mixed_mm_data --packing_samples
"""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN = {"depth": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        {"rope_parameters": _ROPE},
        {**_QWEN, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": _ROPE},
        {
            **(_QWEN | {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}),
            **{"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    "qwen3_vl": (
        {"rope_parameters": {**_ROPE, "mrope_interleaved": True}, "head_dim": 8},
        {
            **(_QWEN | {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}),
            **{"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
            "num_position_embeddings": 64,
        },
    ),
    "llava": (
        {"model_type": "qwen2"},
        {
            **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16},
            "patch_size": PATCH,
        },
    ),
}


def config(family: str) -> PreTrainedConfig:
    """Three layers with grouped queries, a tower of two."""
    text, tower = _PARTS[family]
    ids = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO}
    if family == "llava":
        ids = {"image_token_index": IMAGE, "vision_feature_select_strategy": "default"}
    else:
        ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
        ids.pop("image_token_index")
    return AutoConfig.for_model(
        family,
        text_config={**_TEXT, **text},
        vision_config={"initializer_range": 0.25, **tower},
        tie_word_embeddings=False,
        **ids,
    )


def model(family: str, seed: int = 0) -> Any:
    """A float32 model in eval mode, with torchrft's attention; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForImageTextToText.from_config(config(family), dtype=torch.float32)
        with torch.no_grad():  # so that the picture decides the most likely token
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            embedding = made.get_input_embeddings().weight
            embedding[SAMPLED] = embedding[IMAGE]
    return made.eval()


def ours(family: str, seed: int = 0) -> Any:
    """The same model with torchrft's attention."""
    made = empty_model(config(family), torch.float32)
    made.load_state_dict(model(family, seed).state_dict())
    return made.eval()


def picture(width: int, height: int, seed: int = 0) -> Image:
    """Random colors, as the bytes of a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "PNG")
    return Image(data=buffer.getvalue())


class Processor:
    """The standard interface on token ids: texts are ids in words, "I" stands for a picture."""

    def __init__(self, family: str) -> None:
        self.family, self.image_token_id = family, IMAGE
        if family == "llava":
            from transformers import CLIPImageProcessorPil

            size = {"height": 16, "width": 16}
            self.image_processor: Any = CLIPImageProcessorPil(size=size, do_center_crop=False)
        else:
            from transformers import Qwen2VLImageProcessorPil

            self.image_processor = Qwen2VLImageProcessorPil(
                **{"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2},
                size={"shortest_edge": 64, "longest_edge": 64 * 64},
            )

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, Any]:
        found = dict(self.image_processor(images=images, return_tensors="pt"))
        counts = [16] * len(images)
        if self.family != "llava":
            counts = [int(grid.prod()) // 4 for grid in found["image_grid_thw"]]
        number, ids = iter(counts), list[int]()
        for word in text[0].split():
            ids += [IMAGE] * next(number) if word == "I" else [int(word)]
        return {"input_ids": torch.tensor([ids]), "attention_mask": None, **found}


def vision(family: str) -> Vision:
    """The family's vision inputs, without files."""
    made = copy.deepcopy(config(family))
    return Vision(Processor(family), made)


def prompt(sees: Vision, text: str, *images: Image, row: int = 0) -> Prompt:
    """A prompt of ids in words; "I" stands for the next picture."""
    ids = sees.token_ids(text, images) if images else [int(word) for word in text.split()]
    return Prompt(row=row, text=text, token_ids=tuple(ids), images=images)


def samples(
    vision: Vision, seed: int = 0, sizes: tuple[int, int, int, int] = (3, 2, 1, 2)
) -> list[Sample]:
    """Prompts with one, no and two pictures, two of them of equal tokens; `sizes` samples of each.

    Responses hold image tokens, too: such a token is sampled like any other.
    """
    rng = random.Random(seed)
    prompts = [
        prompt(vision, "3 56 I 57 9 10", picture(16, 16, 1), row=0),
        prompt(vision, "3 11 12 13", row=1),
        prompt(vision, "3 56 I 57 9 10", picture(16, 16, 2), row=2),
        prompt(vision, "56 I 57 4 I 8", picture(24, 16, 3), picture(16, 8, 4), row=3),
    ]
    made = []
    for group, of in enumerate(prompts):
        for index in range(sizes[group]):
            tokens = tuple(rng.choice([*range(3, 56), IMAGE]) for _ in range(rng.randint(1, 6)))
            logprobs = (-1.0,) * len(tokens)
            completion = Completion(group, index, tokens, logprobs, "", "stop")
            made.append(Sample(of, completion, Score(rng.random()), group))
    return made


def reference(whole: Any, vision: Vision, samples: Sequence[Sample]) -> list[Tensor]:
    """Log-probs of the responses by transformers' own padded forward.

    Its merging of images would take a sampled image token for a placeholder, so the embedding of
    such a token is given another id, with the same weights.
    """
    rows, types, pixels = [], [], {}
    for sample in samples:
        ids = sample.prompt.token_ids
        response = [SAMPLED if t == IMAGE else t for t in sample.completion.token_ids]
        rows.append(torch.tensor([*ids, *response]))
        types.append(torch.tensor([*(int(t == IMAGE) for t in ids), *[0] * len(response)]))
        if sample.prompt.images:
            pictures = [image.open() for image in sample.prompt.images]
            made = vision.processor([sample.prompt.text], pictures)
            for name in made.keys() - {"input_ids", "attention_mask"}:
                pixels.setdefault(name, []).append(made[name])
    pad = torch.nn.utils.rnn.pad_sequence
    inputs: dict[str, Any] = {name: torch.cat(parts) for name, parts in pixels.items()}
    if vision.rope is not None and pixels:
        inputs["mm_token_type_ids"] = pad(types, batch_first=True)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    ids = pad(rows, batch_first=True)
    logits = whole(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
    found = []
    for row, sample in enumerate(samples):
        start, tokens = len(sample.prompt.token_ids), torch.tensor(sample.completion.token_ids)
        own = logits[row, start - 1 : start - 1 + len(tokens)].log_softmax(-1)
        found.append(own.gather(1, tokens[:, None])[:, 0])
    return found


def qwen_folder(family: str, path: Path) -> str:
    """A folder of a small Qwen model with its tokenizer and processor, without weights.

    Its processor needs torchvision. Heads are as large as vLLM wants them on a CPU.
    """
    from transformers import AutoProcessor

    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = make_assets.make_tokenizer()
    tokenizer.add_special_tokens([make_assets.AddedToken(token, special=True) for token in special])
    text, tower = _PARTS[family]
    rope = {**text["rope_parameters"], "mrope_section": [4, 6, 6]}
    text = {**_TEXT, **text, "hidden_size": 128, "rope_parameters": rope}
    text |= {"head_dim": 32} if "head_dim" in text else {}
    tower = {**tower, "hidden_size": 128 if family == "qwen2_vl" else 64}
    tower |= {"embed_dim": 64} if family == "qwen2_vl" else {"out_hidden_size": 128}
    ids = {token: tokenizer.token_to_id(token) for token in special}
    made = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config={"initializer_range": 0.25, **tower},
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    made.architectures = [AutoModelForImageTextToText._model_mapping[type(made)].__name__]
    make_assets.write_debug_model(path)
    made.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] += special
    make_assets.write_json(path / "tokenizer_config.json", settings)
    kind = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
    pixels = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 64, "longest_edge": 64 * 64}
    make_assets.write_json(
        path / "preprocessor_config.json",
        {
            "processor_class": kind.get(family, "Qwen3VLProcessor"),
            "image_processor_type": "Qwen2VLImageProcessor",
            **(pixels | {"size": size, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
        },
    )
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>{% for part in message.content %}"
        "{{ part.text if part.type == 'text' else "
        "'<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    AutoProcessor.from_pretrained(path)
    return str(path)
