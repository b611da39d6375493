"""Prompts: rows of a file or dataset, formatted, tokenized and kept compactly."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from jinja2 import TemplateError
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from torchrft.config.job_config import Data
from torchrft.data.image_prompts import RowImages, images_column
from torchrft.data.sources import Row, RowSource, describe_columns, open_source
from torchrft.models.vision import Vision
from torchrft.tools.images import Image, ImageError
from torchrft.types import Prompt

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1000
_ROWS_WORTH_A_BAR = 20_000


class PromptDataset(Sequence[Prompt]):
    """Tokenized prompts in the order of their source, without the over-long ones.

    `dropped` counts those. Token ids lie in one flat array, four bytes each; `Prompt` records are
    made when asked for.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._tokens = array("i")
        self._ends = array("q", [0])
        self._rows = array("q")
        self._texts: list[str] = []
        self._labels: list[Any] = []
        self._metadata: list[Mapping[str, Any]] = []
        self._messages: list[tuple[Mapping[str, Any], ...]] = []
        self._images: dict[int, tuple[Image, ...]] = {}  # of the prompts that have some

    def append(self, prompt: Prompt) -> None:
        """Adds a prompt at the end."""
        self._tokens.extend(prompt.token_ids)
        self._ends.append(len(self._tokens))
        self._rows.append(prompt.row)
        self._texts.append(prompt.text)
        self._labels.append(prompt.label)
        self._metadata.append(prompt.metadata)
        self._messages.append(prompt.messages)
        if prompt.images:
            self._images[len(self) - 1] = prompt.images

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> Prompt, slice -> list
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        return Prompt(
            row=self._rows[index],
            text=self._texts[index],
            token_ids=tuple(self._tokens[self._ends[index] : self._ends[index + 1]]),
            label=self._labels[index],
            metadata=self._metadata[index],
            messages=self._messages[index],
            images=self._images.get(index, ()),
        )


def load_prompts(
    source: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "prompt_data",
    vision: Vision | None = None,
) -> PromptDataset:
    """Reads, formats and tokenizes all prompts of `source` as the `[data]` section says.

    `name` is the option that gave `source`, for messages. Any other than `prompt_data` must name a
    split where there are several: held-out prompts are never read from `train` by default. Prompts
    longer than prompt_max_len, or that leave no room for a response under max_len, are dropped,
    counted and warned about once; so are those whose images cannot be used. `vision` is given where
    prompts may have images. Raises ValueError naming the file and line for a malformed row.
    """
    try:
        return _load(source, data, tokenizer, name, vision)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error.__cause__


def _load(
    source: str, data: Data, tokenizer: PreTrainedTokenizerBase, name: str, vision: Vision | None
) -> PromptDataset:
    key = images_column(data)
    formatter = _Formatter(data, tokenizer, source, vision)
    tokenize = _Tokenize(tokenizer, not data.apply_chat_template, vision)
    unusable: list[tuple[int, str]] = []
    rows = open_source(
        source,
        required=[data.input_key, *data.metadata_keys],
        optional=[data.label_key, *([key] if key else [])],
        require_split=name != "prompt_data",
        encoded=key,
    )
    max_tokens = min(data.prompt_max_len, data.max_len - 1)
    dataset = PromptDataset()
    shortest_dropped: int | None = None
    labels_seen = images_seen = False
    for batch in _batches(rows, f"tokenizing {name}"):
        for row, prompt, token_ids in _tokenized(batch, formatter, tokenize, unusable):
            labels_seen = labels_seen or data.label_key in row.columns
            images_seen = images_seen or bool(prompt.images) or data.images_key in row.columns
            if len(token_ids) > max_tokens:
                dataset.dropped += 1
                shortest_dropped = min(len(token_ids), shortest_dropped or len(token_ids))
                continue
            label = row.columns.get(data.label_key)
            metadata = {key: row.columns[key] for key in data.metadata_keys}
            dataset.append(
                Prompt(row.number, prompt.text, tuple(token_ids), label, metadata, *prompt[1:])
            )
    # The default may be absent: prompts need no label where no reward asks for one.
    if not labels_seen and data.label_key != Data().label_key:
        raise ValueError(
            f"{source}: no row has the column {data.label_key!r} (label_key); "
            f"{describe_columns(data.label_key, rows.column_names)}"
        )
    if data.images_key is not None and not images_seen and len(dataset):
        raise ValueError(
            f"{source}: no row has the column {data.images_key!r} (images_key) or another image; "
            f"{describe_columns(data.images_key, rows.column_names)}"
        )
    _report_unusable(unusable, len(rows), source, name)
    _report_dropped(dataset, len(rows), source, name, max_tokens, shortest_dropped)
    dataset.dropped += len(unusable)
    return dataset


def _tokenized(
    batch: list[Row], formatter: _Formatter, tokenize: _Tokenize, unusable: list[tuple[int, str]]
) -> Iterator[tuple[Row, _Formatted, list[int]]]:
    """Rows, prompts and token ids; of rows whose images cannot be used, why, to `unusable`."""
    rows, prompts = [], []
    for row in batch:
        try:
            prompts.append(formatter(row))
        except ImageError as error:
            unusable.append((row.number, f"{row.where}: {error}"))
            continue
        rows.append(row)
    if not rows:
        return
    encoded = tokenize(rows, [prompt.text for prompt in prompts])
    for row, prompt, ids in zip(rows, prompts, encoded, strict=True):
        if prompt.images:
            try:
                ids = tokenize.with_images(prompt.text, prompt.images)
            except ValueError as error:
                unusable.append((row.number, f"{row.where}: {error}"))
                continue
        yield row, prompt, ids


def _report_unusable(
    unusable: list[tuple[int, str]], num_rows: int, source: str, name: str
) -> None:
    if not unusable:
        return
    if len(unusable) == num_rows:
        raise ValueError(f"{source}: no prompt's images can be used; {min(unusable)[1]}")
    logger.warning(
        "%s: dropped %d of %d prompts of %s, whose images cannot be used: %s%s",
        *(
            name,
            len(unusable),
            num_rows,
            source,
            "; ".join(reason for _, reason in sorted(unusable)[:3]),
        ),
        "; …" if len(unusable) > 3 else "",
    )


def _report_dropped(
    dataset: PromptDataset,
    num_rows: int,
    source: str,
    name: str,
    max_tokens: int,
    shortest: int | None,
) -> None:
    if not dataset.dropped:
        return
    limit = f"{max_tokens} tokens (the smaller of prompt_max_len and max_len - 1)"
    if not len(dataset):
        raise ValueError(
            f"{source}: all {num_rows} prompts are longer than {limit}; "
            f"the shortest has {shortest} tokens"
        )
    logger.warning(
        "%s: dropped %d of %d prompts of %s, longer than %s",
        *(name, dataset.dropped, num_rows, source, limit),
    )


def _batches(rows: RowSource, description: str) -> Iterator[list[Row]]:
    quiet = len(rows) < _ROWS_WORTH_A_BAR or os.environ.get("RANK", "0") != "0"
    tracked = iter(track(rows, description, total=len(rows), disable=quiet))
    while batch := list(islice(tracked, _ROWS_PER_BATCH)):
        yield batch


class _Formatted(NamedTuple):
    """What becomes of a row's prompt: the text, the chat it was made from, and its images."""

    text: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[Image, ...]


class _Formatter:
    """A row's prompt as the text that is tokenized, with what it was made from."""

    def __init__(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, source: str, vision: Vision | None
    ) -> None:
        self._images = None if vision is None else RowImages(source, data)
        self._token = None if vision is None else vision.placeholder
        self._video = None if vision is None else getattr(vision.processor, "video_token", None)
        self._template: Any = tokenizer if vision is None else vision.teller(tokenizer)
        if data.apply_chat_template and not self._template.chat_template:
            raise ValueError(
                f"apply_chat_template: the tokenizer of {tokenizer.name_or_path!r} "
                "has no chat template"
            )
        if data.system_prompt is not None and not data.apply_chat_template:
            raise ValueError("system_prompt needs apply_chat_template = true")
        self._data = data

    def __call__(self, row: Row) -> _Formatted:
        """Raises ImageError where the row's images are no images."""
        prompt = row.columns[self._data.input_key]
        what = f"{row.where}: {self._data.input_key!r}"
        if isinstance(prompt, list):
            messages = _checked_messages(prompt, what, parts=self._images is not None)
        elif isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            raise ValueError(
                f"{what} must be a string or a list of chat messages, got {prompt!r:.80}"
            )
        content = messages[-1]["content"]
        if not (content.strip() if isinstance(content, str) else content):
            raise ValueError(f"{what} is empty")
        images: tuple[Image, ...] = ()
        if self._images is not None:
            images = tuple(self._images.column(row))
            if self._data.apply_chat_template:
                messages, images = self._images.place(messages, images, row.where)
            self._images.check(images, row)
        if self._data.apply_chat_template:
            text, messages = self._apply_template(messages, row.where)
        elif isinstance(prompt, list):
            raise ValueError(f"{what} holds chat messages; they need apply_chat_template = true")
        else:
            text, messages = prompt, []
        if self._video is not None and self._video in text:
            raise ValueError(f"{what} has a place for a video ({self._video}), which are not taken")
        if self._token is not None and text.count(self._token) != len(images):
            raise ValueError(
                f"{what} becomes a text with {text.count(self._token)} times {self._token!r} for "
                f"{len(images)} images; write it once for each, or set apply_chat_template = true"
            )
        return _Formatted(text, tuple(messages), images)

    def _apply_template(
        self, messages: list[dict[str, Any]], where: str
    ) -> tuple[str, list[dict[str, Any]]]:
        """The text, and the messages with the system's."""
        if self._data.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise ValueError(
                    f"{where}: the messages start with a system message already; "
                    "remove it or leave system_prompt out"
                )
            system: Any = self._data.system_prompt
            if self._images is not None:  # whose templates take lists of parts
                system = [{"type": "text", "text": system}]
            messages = [{"role": "system", "content": system}, *messages]
        try:
            text = self._template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text, messages


def _checked_messages(prompt: list[Any], what: str, parts: bool) -> list[dict[str, Any]]:
    """Messages with a text, or with a list of parts where prompts may have images."""
    if not prompt:
        raise ValueError(f"{what} is an empty list of messages")
    messages = []
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        kinds = (str, list) if parts else str
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), kinds):
            hint = ""
            if isinstance(fields.get("content"), list):
                hint = "; content of several parts needs images_key or mixed_mm_data"
            raise ValueError(
                f'{what}: a message must be {{"role": string, "content": string}}, '
                f"got {message!r:.80}{hint}"
            )
        # Arrow gives every message the keys of all; a template asks whether a key is there.
        messages.append({key: value for key, value in message.items() if value is not None})
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{what} ends with the assistant's message, which the model is to write")
    return messages


class _Affixes(NamedTuple):
    """How many special tokens the tokenizer puts before and after a text."""

    prefix: int
    suffix: int


class _Tokenize:
    """Token ids of a batch of texts.

    The chat template writes its special tokens itself. To plain text the tokenizer adds its own,
    but what it would append (an end-of-sequence token) must not stand between prompt and response.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, plain: bool, vision: Vision | None = None
    ) -> None:
        self._tokenizer, self._vision = tokenizer, vision
        self._plain = plain
        self._affixes: _Affixes | None = None if plain else _Affixes(0, 0)

    def __call__(self, batch: list[Row], texts: list[str]) -> Iterator[list[int]]:
        if self._affixes is None:
            self._affixes = self._find_affixes(texts[0])
        prefix, suffix = self._affixes
        # verbose=False: over-long prompts are dropped and counted, no need to warn of each.
        encoded = self._tokenizer(texts, add_special_tokens=self._plain, verbose=False)
        for row, token_ids in zip(batch, encoded["input_ids"], strict=True):
            end = len(token_ids) - suffix
            if end <= prefix:
                raise ValueError(f"{row.where}: the prompt becomes no token at all")
            yield token_ids[:end]

    def with_images(self, text: str, images: tuple[Image, ...]) -> list[int]:
        """The token ids of a text with images; call it after a batch of texts."""
        assert self._vision is not None
        assert self._affixes is not None
        ids = self._vision.token_ids(text, images, special=self._plain)
        return ids[: len(ids) - self._affixes.suffix]

    def _find_affixes(self, text: str) -> _Affixes:
        bare, full = (
            self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            for special in (False, True)
        )
        if not bare:  # the caller refuses such a text; nothing can be learned from it
            return _Affixes(len(full), 0)
        num_added = len(full) - len(bare)
        for prefix in range(num_added + 1):
            if full[prefix : prefix + len(bare)] == bare:
                break
        else:
            raise ValueError("the tokenizer changes a text's own tokens when it adds special ones")
        if prefix < num_added:
            logger.warning(
                "the tokenizer appends special tokens to a text; "
                "they are cut off, so that the response continues the prompt"
            )
        return _Affixes(prefix, num_added - prefix)
