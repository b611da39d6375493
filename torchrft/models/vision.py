"""What a vision-language model needs beside token ids: pixels, where they go, and positions.

The image tower runs once for each picture of a forward pass, and its features take the places of
the prompt's image tokens in the embedded sequence. Only those of the prompt: an image token that a
policy samples is a token like any other. The language model then runs as it does for text.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel

from torchrft.models.loader import load_config
from torchrft.models.support import from_config, sees_images
from torchrft.models.tokenizer import without_second_bos
from torchrft.tools.hub import hub_fault, trusts_code_of
from torchrft.tools.images import Image, ImageError
from torchrft.types import Prompt

_THINNEST = 200  # long side to short side, as the processors of the Qwen family have it
_CACHE_BYTES = 1 << 30  # of pixels, which several passes of a step need again


@dataclass(frozen=True)
class ImageBatch:
    """The distinct pictures of a forward pass.

    `tensors` are the arguments of the model's `get_image_features`. Feature number `rows[k]` goes
    to position `places[k]` of the flattened token ids; without places the pictures only give the
    tower something to do. `count` is the number of features, None if unknown.
    """

    tensors: dict[str, Tensor]
    places: Tensor  # int64 [K]
    rows: Tensor  # int64 [K]
    count: int | None = None

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return ImageBatch(tensors, self.places.to(device), self.rows.to(device), self.count)


@dataclass(frozen=True)
class _PromptImages:
    tensors: dict[str, Tensor]
    places: Tensor  # int64 [K], of the image tokens in the prompt
    positions: Tensor | None  # int64 [3, L] where the model has three (M-RoPE)
    length: int  # tokens of the prompt's text without what a tokenizer puts in front

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def load_processor(source: str, remedy: str) -> Any:
    """The processor of a folder or hub id. Raises ValueError, with `remedy`, where none loads."""
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=trusts_code_of(source))
    except (OSError, ValueError, ImportError, AttributeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            hub_fault(source, error)
            or f'no image processor can be made from "{source}": {first} ({remedy}; most need '
            "`pip install pillow torchvision`)"
        ) from error


class Vision:
    """The processor of a model and what its language model has to know of images.

    Pictures are scaled, their shape kept, to between `min_pixels` and `max_pixels` before the
    processor sees them.

    >>> vision = Vision.load("Qwen/Qwen2.5-VL-3B-Instruct")          # doctest: +SKIP
    >>> ids = vision.token_ids(text, images)                         # doctest: +SKIP

    Raises ValueError for a model that torchrft cannot feed with images.
    """

    def __init__(
        self,
        processor: Any,
        config: PreTrainedConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.processor, self.min_pixels, self.max_pixels = processor, min_pixels, max_pixels
        self.source: str | None = None
        with torch.device("meta"):  # for its methods: positions depend on its config alone
            model: Any = from_config(config)
        refuse_without_images(model)
        self.image_token_id = int(config.image_token_id)
        self.placeholder: str | None = getattr(processor, "image_token", None)  # of one, in a text
        self.names = inspect.signature(model.get_image_features).parameters.keys()
        self.rope = getattr(model.base_model, "get_rope_index", None)
        self.cache: OrderedDict[tuple[str, tuple[Image, ...]], _PromptImages] = OrderedDict()
        self.room = _CACHE_BYTES
        self.sizes: dict[tuple[int, int], list[int]] = {}  # tokens of a picture of that size
        self.by_size: bool | None = None  # whether these are right; None: not compared yet

    @classmethod
    def load(
        cls,
        pretrain: str,
        processor: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Vision:
        """That of the model in `pretrain`; its processor lies there too, or in `processor`."""
        config = load_config(pretrain)
        if not sees_images(config):
            raise ValueError(
                f'pretrain = "{pretrain}" is a {config.model_type} model, which sees no images; '
                "leave images_key, mixed_mm_data and processor out, or take a vision-language model"
            )
        source = processor or pretrain
        made = load_processor(source, "name one by `processor`")
        if getattr(made, "image_processor", None) is None:
            raise ValueError(f'"{source}" holds no image processor; name a folder by `processor`')
        vision = cls(made, config, min_pixels, max_pixels)
        vision.source = source
        return vision

    # ---------------------------------------------------------------- prompts

    def teller(self, tokenizer: Any) -> Any:
        """What writes chats: the processor, or `tokenizer` if that one has no chat template."""
        return self.processor if getattr(self.processor, "chat_template", None) else tokenizer

    def open(self, image: Image) -> Any:
        """The picture as a PIL image within the bounds. Raises ImageError, see `Image.open`."""
        picture = image.open()
        short, long = sorted(picture.size)
        if long > _THINNEST * short:  # which a processor may scale up without bound
            thin = f"is {picture.width} x {picture.height}: one side is over {_THINNEST} times"
            raise ImageError(f"{image.name} {thin} the other")
        pixels = picture.width * picture.height
        scale = 1.0
        if self.max_pixels is not None and pixels > self.max_pixels:
            scale = (self.max_pixels / pixels) ** 0.5
        elif self.min_pixels is not None and pixels < self.min_pixels:
            scale = (self.min_pixels / pixels) ** 0.5
        if scale == 1.0:
            return picture
        # Rounded to the side of the bound that was crossed.
        rounded = [int(side * scale + (scale > 1)) for side in (picture.width, picture.height)]
        return picture.resize([max(side, 1) for side in rounded])

    def pictures(self, prompt: Prompt) -> list[Any]:
        """Those of `open`. Raises ImageError naming the row, as for a file that is gone."""
        try:
            return [self.open(image) for image in prompt.images]
        except ImageError as error:
            raise ImageError(f"prompt row {prompt.row}: {error}") from error

    def token_ids(self, text: str, images: Sequence[Image], special: bool = False) -> list[int]:
        """The text's tokens, with as many image tokens as the pictures have features.

        `special`: the tokenizer adds its own special tokens. Raises ImageError for pictures that
        cannot be used, and ValueError where their number is not that of the text's placeholders.
        """
        pictures = [self.open(image) for image in images]
        short = self._expanded(text, pictures, special) if self.by_size is not False else None
        if short is None or self.by_size is None:  # the first time, both
            made = self._process(text, pictures, special)["input_ids"][0].tolist()
            self.by_size = made == short
            short = list(made)
        return without_second_bos(self.processor.tokenizer, [short])[0] if special else short

    def _expanded(self, text: str, pictures: list[Any], special: bool) -> list[int] | None:
        """`token_ids` from the pictures' sizes alone, without their pixels; None: not known."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or self.placeholder is None:
            return None
        mark = tokenizer.convert_tokens_to_ids(self.placeholder)
        bare = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if bare.count(mark) != len(pictures):
            return None
        rest, ids = iter(pictures), list[int]()
        for token in bare:
            ids += self._tokens_of(next(rest).size) if token == mark else [token]
        return ids

    def _tokens_of(self, size: tuple[int, int]) -> list[int]:
        if size not in self.sizes:
            from PIL import Image as Pillow

            made = self._process(str(self.placeholder), [Pillow.new("RGB", size)])
            self.sizes[size] = made["input_ids"][0].tolist()
        return self.sizes[size]

    def _process(self, text: str, pictures: list[Any], special: bool = False) -> Any:
        return self.processor(
            text=[text], images=pictures, return_tensors="pt", add_special_tokens=special
        )

    def _inputs(self, prompt: Prompt) -> _PromptImages:
        found = self.cache.get((prompt.text, prompt.images))
        if found is None:
            found = self._keep(prompt)
        self.cache.move_to_end((prompt.text, prompt.images))
        return found

    def _keep(self, prompt: Prompt) -> _PromptImages:
        made = self._process(prompt.text, self.pictures(prompt))
        tensors = {name: made[name] for name in made if name in self.names}
        is_image, positions = torch.tensor(prompt.token_ids) == self.image_token_id, None
        if (made["input_ids"] == self.image_token_id).sum() != is_image.sum():
            raise ImageError(f"prompt row {prompt.row}: its images changed while the run went on")
        if self.rope is not None:
            options: dict[str, Any] = {"mm_token_type_ids": is_image.int()[None], **tensors}
            known = inspect.signature(self.rope).parameters
            options = {name: value for name, value in options.items() if name in known}
            positions = self.rope(torch.tensor([prompt.token_ids]), **options)[0][:, 0]
        places, length = is_image.nonzero().flatten(), len(made["input_ids"][0])
        found = _PromptImages(tensors, places, positions, length)
        self.room -= found.nbytes
        while self.room < 0 and self.cache:
            self.room += self.cache.popitem(last=False)[1].nbytes
        self.cache[prompt.text, prompt.images] = found
        return found

    def bare_token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's tokens as its text has them: one placeholder for each image."""
        if not prompt.images:
            return prompt.token_ids
        before = prompt.token_ids[: len(prompt.token_ids) - self._inputs(prompt).length]
        own = self.processor.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        return (*before, *own)

    def shift(self, prompt: Prompt) -> int:
        """What is added to the positions of the tokens after the prompt: an image takes fewer
        positions than tokens."""
        positions = self._inputs(prompt).positions if prompt.images else None
        return 0 if positions is None else int(positions.max()) + 1 - positions.shape[1]

    # ---------------------------------------------------------------- forward passes

    def see(
        self, positions: Tensor, spans: Iterable[tuple[Prompt, int, int]]
    ) -> tuple[Tensor, ImageBatch]:
        """Positions and pictures of a forward pass.

        Args: positions, int64 [B, L], of the tokens without images; spans, for each sequence its
            prompt, where in the flattened ids that begins and where the sequence ends.
        Returns: positions int64 [B, L], or [3, B, L] where images move them; the pictures, which
            sequences with the same prompt share. If there are none, a small one stands in, so that
            the tower runs on every rank (FSDP) and in every pass.
        """
        parts: dict[tuple[str, tuple[Image, ...]], tuple[int, dict[str, Tensor]]] = {}
        places, rows = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
        count, flat = 0, positions.flatten().expand(3, -1).clone()
        for prompt, start, end in spans:
            if not prompt.images:
                continue
            found, key = self._inputs(prompt), (prompt.text, prompt.images)
            if key not in parts:
                parts[key] = (count, found.tensors)
                count += found.places.numel()
            places.append(found.places + start)
            rows.append(torch.arange(found.places.numel()) + parts[key][0])
            if found.positions is not None:
                middle = start + found.positions.shape[1]
                flat[:, start:middle] = found.positions
                flat[:, middle:end] += self.shift(prompt)
        if not parts:
            return positions, ImageBatch(self._stand_in(), places[0], rows[0])
        tensors = _joined([tensors for _, tensors in parts.values()])
        images = ImageBatch(tensors, torch.cat(places), torch.cat(rows), count)
        return flat.view(3, *positions.shape) if self.rope else positions, images

    def _stand_in(self) -> dict[str, Tensor]:
        from PIL import Image as Pillow

        gray = Pillow.new("RGB", (28, 28), (90, 120, 150))
        made = self.processor.image_processor(images=[gray], return_tensors="pt")
        return {name: made[name] for name in made if name in self.names}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several prompts, one behind the other; zeros fill up what is smaller."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        size = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        padded = []
        for tensor in tensors:
            missing = [width - own for own, width in zip(tensor.shape[1:], size, strict=True)]
            pads = [n for m in reversed(missing) for n in (0, m)]
            padded.append(F.pad(tensor, pads) if any(missing) else tensor)
        joined[name] = torch.cat(padded)
    return joined


def refuse_without_images(model: Any) -> None:
    """Raises ValueError for a model whose images torchrft would feed in otherwise than the model.

    Such are models that attend to images by cross-attention or in both directions, and those
    whose positions torchrft does not know.
    """
    kind = type(model).__name__
    taken = inspect.signature(model.base_model.forward).parameters
    has_rope = hasattr(model.base_model, "get_rope_index")
    text = model.config.get_text_config()
    what = None
    if not hasattr(model, "get_image_features"):
        what = "no get_image_features"
    elif "token_type_ids" in taken or ("mm_token_type_ids" in taken and not has_rope):
        what = "attention that is not causal among the tokens of an image"
    elif "mrope_section" in (getattr(text, "rope_parameters", None) or {}) and not has_rope:
        what = "positions in three dimensions but no get_rope_index"
    elif hasattr(model.config, "visual_indicator_token_ids"):  # Ovis2
        what = "embeddings of its own for the marks around an image"
    elif model.get_decoder().get_output_embeddings() is not None:  # BLIP-2
        what = "a language model with a head of its own inside"
    if what:
        raise ValueError(f"{kind} has {what}, which torchrft does not support with images")


def freeze_vision(model: PreTrainedModel) -> None:
    """Only the language model is trained: the image tower and its projector stay as they are."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    trained = {id(p) for part in (decoder, head) if part is not None for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def embedded(model: Any, decoder: Any, input_ids: Tensor, images: ImageBatch) -> dict[str, Any]:
    """The decoder's arguments: embedded tokens, images among them, and what DeepStack
    (arXiv:2406.04334) adds in its first layers."""
    out = model.get_image_features(**images.tensors)
    features = _flat(out.pooler_output)
    if images.count is not None and features.shape[0] != images.count:
        raise ValueError(
            f"{type(model).__name__} makes {features.shape[0]} features of the images for which "
            f"its processor wrote {images.count} tokens; is `processor` that of this model?"
        )
    embeds = decoder.get_input_embeddings()(input_ids)
    shape = embeds.shape
    rows = features[images.rows].to(embeds.dtype)
    embeds = embeds.flatten(0, 1).index_copy(0, images.places, rows).view(shape)
    inputs: dict[str, Any] = {"inputs_embeds": embeds}
    deepstack = getattr(out, "deepstack_features", None)
    if deepstack is not None:
        seen = torch.zeros(input_ids.numel(), dtype=torch.bool, device=input_ids.device)
        seen[images.places] = True
        order = images.rows[images.places.argsort()]
        inputs["visual_pos_masks"] = seen.view(input_ids.shape)
        inputs["deepstack_visual_embeds"] = [_flat(layer)[order] for layer in deepstack]
    return inputs


def _flat(features: Any) -> Tensor:
    """[features, D] of one tensor or one for each image."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.flatten(0, -2) for part in parts])
