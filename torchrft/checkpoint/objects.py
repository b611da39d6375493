"""Python objects as JSON, so that nothing of a checkpoint runs code when it is read.

What JSON lacks is an object with the one key TAG, which names its kind, beside its content:
`(1, 2)` is `{"torchrft": "tuple", "is": [1, 2]}`.
"""

import base64
import io
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import fields
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrft.tools.images import Image
from torchrft.types import Branch, Completion, Kept, Prompt, Sample, Score

TAG = "torchrft"
SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}
RECORDS = {kind.__name__: kind for kind in (Branch, Completion, Kept, Score)}
ARRAYS = "biufc"  # kinds of numpy's dtypes that hold numbers
_MAKERS: list[Any] = [value.__reduce__()[0] for value in (np.empty(0), np.float64(0))]
# What objects of earlier versions, which were pickled, are made of beside what torch admits.
PICKLED: list[Any] = [
    *(Sample, Prompt, Completion, Kept, Score, Image, np.ndarray, np.dtype),
    *(*_MAKERS, date, datetime, timedelta, Decimal),
    *((f, f"numpy.core.multiarray.{f.__name__}") for f in _MAKERS),
    *(type(np.dtype(name)) for name in ("bool", "u1", "i4", "i8", "u4", "u8", "f4", "f8")),
]


def dumps(value: Any) -> bytes:
    """`value` as JSON. Raises ValueError for what is no plain data, array, tensor or record."""
    return json.dumps(_encode(value)).encode()


def loads(content: bytes) -> Any:
    """What `dumps` was given, or torch.save in an earlier version; no other pickle is read.

    Raises ValueError for anything else.
    """
    try:
        if content.startswith(b"PK"):
            with torch.serialization.safe_globals(PICKLED):
                return torch.load(io.BytesIO(content), weights_only=True)
        return _decode(json.loads(content))
    except Exception as error:  # of whatever kind: it is damaged or forged
        raise ValueError(_first_line(error)) from None


def check_kind(value: Any, like: Any, at: str) -> None:
    """Raises ValueError, with its path `at`, for a value of another kind than `like`, and for a
    negative count; dicts are compared in the keys that both have."""
    kind = {float: (int, float), bool: (bool, type(None))}.get(type(like), type(like))
    if isinstance(like, dict) and isinstance(value, dict):
        for key in like.keys() & value.keys():
            check_kind(value[key], like[key], f"{at}/{key}")
        return
    is_count = type(value) is int and value >= 0
    if not (is_count if type(like) is int else like is None or isinstance(value, kind)):
        raise ValueError(f"{at} is {value!r:.80}")


def _first_line(error: BaseException) -> str:
    """The first line of a text that says something, without torch's advice to read it unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
    text = (lines or str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text:.200}"


def _encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        if kind in (dict, OrderedDict) and TAG not in value and all(type(k) is str for k in value):
            return {key: _encode(item) for key, item in value.items()}
        name = "Counter" if kind is Counter else "dict"
        return _tagged(name, [[_encode(k), _encode(item)] for k, item in value.items()])
    if kind.__name__ in SEQUENCES and SEQUENCES[kind.__name__] is kind:
        if kind is tuple and len(value) > 15 and {*map(type, value)} in ({int}, {float}):
            numbers = np.array(value)  # token ids, log-probs, the state of a generator
            if numbers.dtype in (np.int64, np.float64):
                return _tagged("tuple", _encode(numbers))
        return _tagged(kind.__name__, [_encode(item) for item in value])
    if kind is bytes:
        return _tagged("bytes", base64.b64encode(value).decode())
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tagged("tensor", [str(value.dtype), list(value.shape), _encode(flat)])
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in ARRAYS:
        return _tagged("array", [value.dtype.str, list(value.shape), _encode(value.tobytes())])
    if kind in RECORDS.values():
        content = {field.name: _encode(getattr(value, field.name)) for field in fields(kind)}
        return _tagged(kind.__name__, content)
    raise ValueError(
        f"a checkpoint holds plain data, tensors and arrays, not {value!r:.80} ({kind.__name__}); "
        "save its content instead, as numbers, texts, lists and dicts"
    )


def _tagged(kind: str, content: Any) -> dict[str, Any]:
    return {TAG: kind, "is": content}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: _decode(item) for key, item in value.items()}
    kind, content = value[TAG], _decode(value["is"])
    if kind in SEQUENCES:
        numbers = isinstance(content, np.ndarray)
        return SEQUENCES[kind](content.tolist() if numbers else content)
    if kind in RECORDS:
        return RECORDS[kind](**content)
    if kind in ("dict", "Counter"):
        return (dict if kind == "dict" else Counter)(dict(content))
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "array":
        name, shape, raw = content
        array = np.frombuffer(raw, np.dtype(name)).reshape(shape)
        return array.copy() if shape else array[()]
    if kind == "tensor":
        name, shape, raw = content
        dtype = getattr(torch, name.removeprefix("torch."))
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)
    raise ValueError(f"{kind!r:.80} is no kind of object")
