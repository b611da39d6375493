"""Rows with images: where the pictures come from, and where they stand in the messages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrft.config.job_config import Data
from torchrft.data.sources import Row, describe_columns, split_suffix
from torchrft.tools.images import Image, image_of

DEFAULT_KEY = "images"  # with mixed_mm_data and no images_key
TAG = "<image>"
_IMAGE_PARTS = ("image", "image_url")


def images_column(data: Data) -> str | None:
    """The column of images; None for a job without any."""
    return data.images_key or (DEFAULT_KEY if data.mixed_mm_data else None)


class RowImages:
    """Takes the pictures out of the rows of `source`.

    A picture stands in its row's column, or in a part of a chat message itself. In the messages it
    becomes a part {"type": "image"}: where such a part already is, where a text says <image>, or
    else in front of the first user message.
    """

    def __init__(self, source: str, data: Data) -> None:
        place = Path(split_suffix(source)[0]).expanduser()
        self.folder = place if place.is_dir() else place.parent
        self.key, self.may_lack = images_column(data), data.mixed_mm_data

    def column(self, row: Row) -> list[Image]:
        """The pictures of the row's column. Raises ImageError for what is none."""
        value: Any = row.columns.get(self.key) if self.key else None
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return [image_of(one, self.folder) for one in values]

    def place(
        self, messages: list[dict[str, Any]], column: Sequence[Image], where: str
    ) -> tuple[list[dict[str, Any]], tuple[Image, ...]]:
        """Messages whose content is a list of parts, and their pictures in order.

        Raises ValueError where pictures and their places do not match, and for other media.
        """
        contents = [parts_of(message["content"], where) for message in messages]
        marked = sum(part["type"] == "image" for parts in contents for part in parts)
        tags = sum(p["text"].count(TAG) for parts in contents for p in parts if p["type"] == "text")
        if not marked and tags:
            contents = [[piece for part in parts for piece in _split(part)] for parts in contents]
        elif not marked and column:
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            first = users[0] if users else 0
            contents[first] = [{"type": "image"} for _ in column] + contents[first]
        rest, images, named = iter(column), [], 0
        for part in (part for parts in contents for part in parts if part["type"] == "image"):
            own = part.pop("image", None)
            named += own is not None
            images.append(image_of(own, self.folder) if own is not None else next(rest, None))
        if None in images or next(rest, None) is not None:
            raise ValueError(
                f"{where}: the messages have places for {len(images) - named} images, but "
                f"{self.key!r} holds {len(column)}"
            )
        found = tuple(image for image in images if image is not None)
        placed = [{**m, "content": parts} for m, parts in zip(messages, contents, strict=True)]
        return placed, found

    def check(self, images: Sequence[Image], row: Row) -> None:
        """Raises ValueError for a row without images where every one must have some."""
        if not images and not self.may_lack:
            assert self.key is not None
            known = "" if self.key in row.columns else describe_columns(self.key, row.columns)
            raise ValueError(
                f"{row.where}: no image in {self.key!r} (images_key); set mixed_mm_data = true "
                f"where some prompts have none{'; ' + known if known else ''}"
            )


def parts_of(content: Any, where: str) -> list[dict[str, Any]]:
    """A message's content as parts of type "text" or "image"; "image" may name its picture."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in _IMAGE_PARTS:
            names = ("image", "image_url", "url", "path")
            own = next((part[name] for name in names if part.get(name)), None)
            parts.append({"type": "image"} | ({} if own is None else {"image": own}))
        elif kind in ("video", "audio", "video_url", "input_audio"):
            raise ValueError(f"{where}: a part of type {kind!r}; prompts take text and images only")
        else:
            raise ValueError(
                f'{where}: a part must be {{"type": "text", "text": …}} or {{"type": "image"}}, '
                f"got {part!r:.80}"
            )
    return parts


def _split(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A text part divided at its <image> tags."""
    if part["type"] != "text":
        return [part]
    pieces: list[dict[str, Any]] = []
    for index, text in enumerate(part["text"].split(TAG)):
        pieces += [{"type": "image"}] if index else []
        pieces += [{"type": "text", "text": text}] if text else []
    return pieces
