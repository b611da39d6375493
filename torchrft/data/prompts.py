"""Prompts: rows of a file or dataset, formatted, tokenized and kept compactly."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.progress import track
from transformers import PreTrainedTokenizerBase

from torchrft.config.job_config import Data
from torchrft.data.image_prompts import RowImages, images_column, parts_of
from torchrft.data.sources import Columns, Row, RowSource, describe_columns, open_source
from torchrft.models.tokenizer import affixes, encode, render_chat, template_variables
from torchrft.tools.images import Image, ImageError
from torchrft.tools.logging import logger
from torchrft.types import Prompt

if TYPE_CHECKING:
    from torchrft.models.vision import Vision

Messages = list[dict[str, Any]]
_ROWS_PER_BATCH = 1000
_ROWS_WORTH_A_BAR = 20_000
_KEYS = r"(?=.*['\"](?:role|from)['\"]\s*:)(?=.*['\"](?:content|value)['\"]\s*:)"
# A list of messages as text: JSON, or as Python prints it.
_STORED_CHAT = re.compile(rf"\s*\[\s*\{{{_KEYS}.*\}}\s*\]\s*", re.DOTALL)


class PromptDataset(Sequence[Prompt]):
    """Tokenized prompts in the order of their source, without the over-long ones.

    `dropped` counts those. Token ids lie in arrays, four bytes each, until a prompt is asked for.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._prompts: list[Prompt] = []
        self._token_ids: list[array[int]] = []
        self._digest: dict[str, str] | None = None

    def append(self, prompt: Prompt) -> None:
        """Adds a prompt at the end."""
        self._prompts.append(replace(prompt, token_ids=()))
        self._token_ids.append(array("i", prompt.token_ids))
        self._digest = None

    def digest(self) -> dict[str, str]:
        """SHA-256 of the prompts in their order and, as a sum, in any; and of labels and metadata.

        Of values that JSON lacks, and of pictures in files, it holds the kind or the file's name.
        """
        if self._digest is not None:
            return self._digest
        ordered, labels, total = hashlib.sha256(), hashlib.sha256(), 0
        for prompt, token_ids in zip(self._prompts, self._token_ids, strict=True):
            pictures = [image.data or os.path.basename(image.path or "") for image in prompt.images]
            one = hashlib.sha256(token_ids.tobytes() + repr(pictures).encode()).digest()
            ordered.update(one)
            total += int.from_bytes(one, "big")
            content = [prompt.label, dict(prompt.metadata)]
            text = json.dumps(content, skipkeys=True, default=lambda value: type(value).__name__)
            labels.update(text.encode() + b"\n")
        numbers = (ordered.hexdigest(), f"{total % 2**256:064x}", labels.hexdigest())
        self._digest = dict(zip(("order", "prompts", "labels"), numbers, strict=True))
        return self._digest

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> Prompt, slice -> list
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return replace(self._prompts[index], token_ids=tuple(self._token_ids[index]))


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
    required, optional = [data.input_key, *data.metadata_keys], [data.label_key]
    optional += [key] if key else []
    reader = _Reader(data, tokenizer, source, vision)
    rows = open_source(source, Columns(required, optional), name != "prompt_data")
    max_tokens = min(data.prompt_max_len, data.max_len - 1)
    dataset = PromptDataset()
    too_long: list[int] = []
    for batch in _batches(rows, f"tokenizing {name}"):
        for prompt in reader.read(batch):
            if len(prompt.token_ids) > max_tokens:
                too_long.append(len(prompt.token_ids))
            else:
                dataset.append(prompt)
    # The default may be absent: prompts need no label where no reward asks for one.
    wanted = {} if data.label_key == Data().label_key else {data.label_key: "(label_key)"}
    if data.images_key is not None and not reader.saw_images and len(dataset):
        wanted[data.images_key] = "(images_key) or another image"
    for column, option in wanted.items():
        if column not in reader.columns:
            known = describe_columns(column, rows.column_names)
            raise ValueError(f"{source}: no row has the column {column!r} {option}; {known}")
    reasons = [reason for _, reason in sorted(reader.unusable)]
    shown = "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")
    limit = (
        f"longer than {max_tokens} tokens (the smaller of prompt_max_len and max_len - 1); raise "
    )
    limit += "prompt_max_len" if data.prompt_max_len < data.max_len else "max_len"
    if len(reasons) == len(rows):
        raise ValueError(f"{source}: no prompt's images can be used; {reasons[0]}")
    if too_long and not len(dataset):
        most = f"all {len(rows)} prompts are" if not reasons else f"{len(too_long)} prompts are"
        others = f"; of {len(reasons)} the images cannot be used: {shown}" if reasons else ""
        shortest = f"the shortest has {min(too_long)} tokens"
        raise ValueError(f"{source}: {most} {limit}; {shortest}{others}")
    of = f"{len(rows)} prompts of {source}"
    if reasons:
        why = f"whose images cannot be used: {shown}"
        logger.warning("%s: dropped %d of %s, %s", name, len(reasons), of, why)
    if too_long:
        logger.warning("%s: dropped %d of %s, %s", name, len(too_long), of, limit)
    dataset.dropped = len(too_long) + len(reasons)
    return dataset


def _batches(rows: RowSource, description: str) -> Iterator[list[Row]]:
    quiet = len(rows) < _ROWS_WORTH_A_BAR or os.environ.get("RANK", "0") != "0"
    tracked = iter(track(rows, description, total=len(rows), disable=quiet))
    while batch := list(islice(tracked, _ROWS_PER_BATCH)):
        yield batch


class _Reader:
    """Rows as prompts; `unusable` tells of those whose images cannot be used.

    The chat template writes its special tokens itself. To plain text the tokenizer adds its own,
    but what it would append (an end-of-sequence token) must not stand between prompt and response.
    """

    def __init__(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, source: str, vision: Vision | None
    ) -> None:
        self._data, self._tokenizer, self._vision = data, tokenizer, vision
        self._images = None if vision is None else RowImages(source, data)
        self._template: Any = tokenizer if vision is None else vision.teller(tokenizer)
        if data.apply_chat_template and not self._template.chat_template:
            owner = f"the tokenizer of {tokenizer.name_or_path!r}"
            raise ValueError(f"apply_chat_template: {owner} has no chat template")
        if data.system_prompt is not None and not data.apply_chat_template:
            raise ValueError("system_prompt needs apply_chat_template = true")
        names = template_variables(self._template) if data.chat_template_kwargs else set()
        if unknown := sorted(data.chat_template_kwargs.keys() - names):
            takes = f"no {unknown[0]!r} in the chat template; takes {', '.join(sorted(names))}"
            raise ValueError(f"chat_template_kwargs: {takes if names else takes + 'none'}")
        own = getattr(getattr(vision, "processor", None), "tokenizer", tokenizer)
        if own is not tokenizer and own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                "the processor's tokenizer has another vocabulary than the model's: name the "
                "model's own by `processor`"
            )
        self._plain = not data.apply_chat_template
        first, self._suffix = affixes(tokenizer) if self._plain else ([], 0)
        self._specials = len(first) + self._suffix  # that the tokenizer adds
        if self._suffix:
            cut = "they are cut off, so that the response continues the prompt"
            logger.warning("the tokenizer appends special tokens to a text; %s", cut)
        self.unusable: list[tuple[int, str]] = []  # number of the row, and why
        self.columns: set[str] = set()  # that a row had
        self.saw_images = False

    def read(self, batch: list[Row]) -> Iterator[Prompt]:
        found = []
        for row in batch:
            self.columns.update(row.columns)
            try:
                found.append((row, self._untokenized(row)))
            except ImageError as error:
                self.saw_images = True
                self.unusable.append((row.number, f"{row.where}: {error}"))
        if not found:
            return
        texts = [prompt.text for _, prompt in found]
        # verbose=False: over-long prompts are dropped and counted, no need to warn of each.
        encoded = encode(self._tokenizer, texts, self._plain)
        for (row, prompt), ids in zip(found, encoded, strict=True):
            if len(ids) <= self._specials and not encode(self._tokenizer, [prompt.text], False)[0]:
                raise ValueError(f"{row.where}: the prompt becomes no token at all")
            self.saw_images = self.saw_images or bool(prompt.images)
            if prompt.images and self._vision is not None:
                try:
                    ids = self._vision.token_ids(prompt.text, prompt.images, special=self._plain)
                except ValueError as error:
                    self.unusable.append((row.number, f"{row.where}: {error}"))
                    continue
            yield replace(prompt, token_ids=tuple(ids[: len(ids) - self._suffix]))

    def _untokenized(self, row: Row) -> Prompt:
        """Raises ImageError where the row's images are no images."""
        where, key = row.where, self._data.input_key
        what = f"{where}: {key!r}"
        given = (key, self._data.label_key, images_column(self._data), *self._data.metadata_keys)
        for name in row.columns.keys() & given:
            _refuse_surrogates(row.columns[name], f"{where}: {name!r}")
        prompt = _chat_or_text(row.columns[key], what)
        if isinstance(prompt, list):
            messages = _checked_messages(prompt, what, parts=self._images is not None)
        elif isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            got = f"{prompt!r:.80}"
            raise ValueError(f"{what} must be a string or a list of chat messages, got {got}")
        content = messages[-1]["content"]
        if not (content.strip() if isinstance(content, str) else content):
            raise ValueError(f"{what} is empty")
        images: tuple[Image, ...] = ()
        if self._images is not None:
            images = tuple(self._images.column(row))
            if self._data.apply_chat_template:
                messages, images = self._images.place(messages, images, where)
            self._images.check(images, row)
        if self._data.apply_chat_template:
            text, messages = self._apply_template(messages, where)
        elif isinstance(prompt, list):
            raise ValueError(f"{what} holds chat messages; they need apply_chat_template = true")
        else:
            text, messages = prompt, []
        processor = None if self._vision is None else self._vision.processor
        video = getattr(processor, "video_token", None)
        if video is not None and video in text:
            raise ValueError(f"{what} has a place for a video ({video}), which are not taken")
        mark = None if self._vision is None else self._vision.placeholder
        if mark is not None and (found := text.count(mark)) != len(images):
            has = f"becomes a text with {found} times {mark!r} for {len(images)} images"
            templated = self._data.apply_chat_template  # which writes the marks itself
            remedy = "take it out of the text" if templated else "write it once for each"
            raise ValueError(f"{what} {has}; {remedy}")
        label = row.columns.get(self._data.label_key)
        metadata = {key: row.columns[key] for key in self._data.metadata_keys}
        return Prompt(row.number, text, (), label, metadata, tuple(messages), images)

    def _apply_template(self, messages: Messages, where: str) -> tuple[str, Messages]:
        """The text, and the messages with the system's."""
        if (system := self._data.system_prompt) is not None:
            if messages[0]["role"] == "system":
                fault = "the messages start with a system message already"
                raise ValueError(f"{where}: {fault}; remove it or leave system_prompt out")
            # Templates that see images take lists of parts.
            content = system if self._images is None else [{"type": "text", "text": system}]
            messages = [{"role": "system", "content": content}, *messages]
        options = {"add_generation_prompt": True, **self._data.chat_template_kwargs}
        return render_chat(self._template, messages, where, **options), messages


def _checked_messages(prompt: list[Any], what: str, parts: bool) -> Messages:
    """Messages with a text, or with a list of parts where prompts may have images."""
    if not prompt:
        raise ValueError(f"{what} is an empty list of messages")
    messages = []
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        kinds = (str, list) if parts else str
        content = fields.get("content")
        if content is None and fields.get("tool_calls"):
            content = ""  # a call of a tool needs no text
        elif isinstance(content, list) and not parts:
            texts: list[Any] = [part.get("text") for part in parts_of(content, what)]
            content = content if None in texts else "".join(texts)  # None: an image
        if not isinstance(fields.get("role"), str) or not isinstance(content, kinds):
            needs = "; parts other than text need images_key or mixed_mm_data"
            hint = needs if isinstance(content, list) else ""
            form = '{"role": string, "content": string}'
            raise ValueError(f"{what}: a message must be {form}, got {message!r:.80}{hint}")
        # Arrow gives every message the keys of all; a template asks whether a key is there.
        filled = {key: value for key, value in message.items() if value is not None}
        messages.append(filled | {"content": content})
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{what} ends with the assistant's message, which the model is to write")
    return messages


def _chat_or_text(prompt: Any, what: str) -> Any:
    """The prompt, or the list of messages that a text holds as JSON, as tables often store it."""
    if not isinstance(prompt, str) or not _STORED_CHAT.fullmatch(prompt):
        return prompt
    try:
        chat = json.loads(prompt)
    except ValueError as error:
        fault = "looks like a list of chat messages, but is no JSON"
        raise ValueError(f"{what} {fault} ({error}); write it with json.dumps") from error
    is_chat = all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in chat)
    return chat if is_chat else prompt


def _refuse_surrogates(value: Any, what: str) -> None:
    text = json.dumps(value, ensure_ascii=False, skipkeys=True, default=lambda other: None)
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"{what} holds half a character (lone surrogate {half[0]!r}): write it whole"
        )
