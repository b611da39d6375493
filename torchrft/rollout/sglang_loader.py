"""What SGLang's own process runs at a hand-over of weights; given to it as a custom weight loader.

The trainer sends buckets: one flat tensor of bytes, an index of what it holds, and a verdict that
is written here, in memory that both processes share.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrft.rollout.canary import Marks
from torchrft.rollout.fused_weights import Places

PATH = f"{__name__}.load"
_BYTES, _INDEX, _VERDICT = "torchrft.bytes", "torchrft.index", "torchrft.verdict"


def pack(bucket: Sequence[tuple[str, Tensor]], verdict: Tensor) -> list[tuple[str, Tensor]]:
    """What travels for these tensors, all on the device of `verdict` (int32, one per engine rank:
    0 once this rank holds the bucket, i + 1 if its i-th tensor is not as it was sent)."""
    marks = Marks.of(tensor for _, tensor in bucket)
    index = [
        (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), mark)
        for (name, tensor), mark in zip(bucket, marks.result().tolist(), strict=True)
    ]
    raw = torch.tensor(list(json.dumps(index).encode()), dtype=torch.uint8)
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
    # Each begins at a multiple of 8 bytes: dtypes may differ, and a view needs its own alignment.
    flat = torch.cat([F.pad(part, (0, -len(part) % 8)) for part in parts])
    return [(_BYTES, flat), (_INDEX, raw.to(verdict.device)), (_VERDICT, verdict)]


def unpack(payload: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, fingerprint) of every tensor of a bucket."""
    start = 0
    for name, shape, dtype, mark in json.loads(bytes(payload[_INDEX].tolist())):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        yield name, payload[_BYTES][start : start + size].view(kind).view(shape), mark
        start += size + -size % 8


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """Loads a bucket into SGLang's model, reads it back and writes the verdict."""
    payload, places = dict(named_tensors), _places(model)
    received = list(unpack(payload))
    pairs = ((name, tensor) for name, tensor, _ in received)
    model.load_weights(list(places.write(pairs)))  # type: ignore[operator]
    wrong = _first_wrong(places, received)
    if wrong < 0:
        places.prove()
    verdict = payload[_VERDICT]
    verdict[_rank_of(model)] = 1 + wrong
    if verdict.is_cuda:
        torch.cuda.synchronize(verdict.device)  # the trainer reads it once it has the answer


@cache
def _places(model: nn.Module) -> Places:
    return Places(model)


def _first_wrong(find: Places, received: Sequence[tuple[str, Tensor, int]]) -> int:
    """Number of the first tensor that is not held as it was sent; -1 if there is none."""
    tensors = [tensor for _, tensor, _ in received]
    places = [(n, place) for n, (name, *_) in enumerate(received) for place in find(name)]
    # Where all of a tensor lies in one place, its mark there says that it came as it was sent, too.
    wholes = [(n, place) for n, place in places if place.holds_all(tensors[n])]
    parts = [(n, place) for n, place in places if not place.holds_all(tensors[n])]
    seen = {n for n, _ in wholes}
    others = [n for n in range(len(tensors)) if n not in seen]
    found = Marks.of(place.read() for _, place in wholes + parts).result()
    sent = Marks.of(place.sent(tensors[n]) for n, place in parts).result()
    came = Marks.of(tensors[n] for n in others).result()
    marks = torch.tensor([mark for *_, mark in received])
    expected = [marks[[n for n, _ in wholes]], sent.cpu(), marks[others]]
    agree = torch.cat(expected) == torch.cat([found.cpu(), came.cpu()])
    numbers = [*(n for n, _ in wholes + parts), *others]
    wrong = (~agree).nonzero().flatten().tolist()
    return min((numbers[i] for i in wrong), default=-1)


def _rank_of(model: nn.Module) -> int:
    ranks = [getattr(module, "tp_rank", 0) for module in model.modules()]
    return max(rank for rank in ranks if isinstance(rank, int))
