"""Pictures of prompts: kept encoded, decoded when they are looked at."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where used: jobs without images do without it
    from PIL.Image import Image as Picture

MAX_PIXELS = 89_478_485  # above it Pillow itself warns of a decompression bomb
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is opened. Pillow knows more, and starts other programs for some: Ghostscript for EPS."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_OTHER = f"is none of {', '.join(FORMATS)}: save it as one of them"
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


class ImageError(ValueError):
    """A picture that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Image:
    """One picture of a prompt: the file it lies in, or that file's bytes.

    >>> image_of("plots/1.png", Path("data")).path
    'data/plots/1.png'
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """For messages: text that is neither a path nor base64 may be long."""
        if self.path is None:
            return "an image"
        return self.path if len(self.path) < 300 else f"{self.path:.200}…"

    def read(self) -> bytes:
        """The encoded picture. Raises ImageError if its file cannot be read."""
        self._refuse_special()
        try:
            return self.data if self.data is not None else Path(str(self.path)).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.name} cannot be read ({error.strerror})") from error

    def _refuse_special(self) -> None:
        """A pipe, say, would be waited for."""
        if self.path and os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ImageError(f"{self.name} is no file")

    def data_uri(self) -> str:
        """The encoded picture as a data URI. Raises ImageError if it is none that can be read."""
        data = self.read()
        with self._decoding(io.BytesIO(data)) as picture:
            kind = picture.get_format_mimetype() or "image/png"
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def open(self) -> Picture:
        """The picture in RGB, upright, on white where it is transparent; a GIF's first frame.

        Raises ImageError if it is missing, damaged, animated or too large to be decoded, or none
        of FORMATS.
        """
        from PIL import Image as Pillow
        from PIL import ImageOps

        self._refuse_special()
        with self._decoding(self.path if self.data is None else io.BytesIO(self.data)) as picture:
            # Phones put a second picture behind the first (MPO), which is the one meant.
            if picture.format not in ("MPO", "GIF") and getattr(picture, "n_frames", 1) > 1:
                raise ImageError(f"{self.name} is animated or has pages: save the one that counts")
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{self.name} has {picture.width} x {picture.height}"
                raise ImageError(f"{size} pixels, more than {MAX_PIXELS}")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits, which RGB would clip to white
                upright = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            if "A" in upright.getbands() or "transparency" in upright.info:
                white = Pillow.new("RGBA", upright.size, "white")
                upright = Pillow.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")

    @contextmanager
    def _decoding(self, source: Any) -> Iterator[Any]:
        """Opens the encoded picture. Whatever its decoder raises becomes an ImageError."""
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError

        try:
            with Pillow.open(source, formats=FORMATS) as picture:
                yield picture
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise ImageError(f"{self.name} does not exist") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{self.name} {_OTHER}") from error
        except Exception as error:  # decoders raise what they like on damaged files
            why = getattr(error, "strerror", None) or error
            raise ImageError(f"{self.name} cannot be decoded ({why})") from error


def image_of(value: Any, folder: Path) -> Image:
    """What a row says of one picture: a path (relative to `folder`), base64 or a data URI, bytes,
    {"bytes": …, "path": …} as `datasets` has it, or a PIL image.

    Raises ImageError for anything else.
    """
    if isinstance(value, Mapping):
        inner = value.get("bytes") or value.get("path") or value.get("url")
        if inner is not None:
            return image_of(inner, folder)
    if isinstance(value, bytes):
        return Image(data=value)
    if isinstance(value, str) and value:
        return _from_text(value, folder)
    if hasattr(value, "getbands"):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return Image(data=buffer.getvalue())
    raise ImageError(f"{value!r:.80} is no path, base64 text, bytes or dataset image")


def _from_text(value: str, folder: Path) -> Image:
    scheme, mark, rest = value.partition("://")
    is_file = scheme.lower() == "file"
    if mark and _SCHEME.fullmatch(scheme) and not is_file:
        raise ImageError(f"{value:.80} is a web address: download the images and name their files")
    if value[:5].lower() == "data:":
        kind, _, data = value[5:].partition(",")
        if not (kind.startswith("image/") and kind.endswith(";base64")):
            raise ImageError(f"{value:.40}… is no data URI of an image in base64")
        return from_base64(data)
    # Joined, an absolute path stays as it is; so does ~unknown.
    path = str(folder / (rest if mark and is_file else os.path.expanduser(value)))
    if _BASE64.fullmatch(value) and not os.path.isfile(path):  # which long paths may look like
        return from_base64(value)
    return Image(path=path)


def from_base64(text: str) -> Image:
    """The image in base64 text, line breaks allowed. Raises ImageError for other text."""
    try:
        return Image(data=base64.b64decode("".join(text.split()), validate=True))
    except ValueError as error:  # binascii.Error, and text that is not ASCII
        raise ImageError(f"{text:.40}… is not valid base64 ({error})") from error
