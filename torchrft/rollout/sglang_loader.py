"""What SGLang's own process runs at a hand-over of weights; given to it as a custom weight loader.

The trainer sends buckets: one flat tensor of bytes, an index of what it holds, and a verdict that
is written here, in memory that both processes share.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrft.rollout.canary import fingerprint
from torchrft.rollout.fused_weights import held

PATH = f"{__name__}.load"
_BYTES, _INDEX, _VERDICT = "torchrft.bytes", "torchrft.index", "torchrft.verdict"


def pack(bucket: Sequence[tuple[str, Tensor]], verdict: Tensor) -> list[tuple[str, Tensor]]:
    """What travels for these tensors, all on the device of `verdict` (int32, one per engine rank:
    0 once this rank holds the bucket, i + 1 if its i-th tensor is not as it was sent)."""
    marks = torch.stack([fingerprint(tensor) for _, tensor in bucket]).tolist()
    index = [
        (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), mark)
        for (name, tensor), mark in zip(bucket, marks, strict=True)
    ]
    raw = torch.tensor(list(json.dumps(index).encode()), dtype=torch.uint8)
    flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
    return [(_BYTES, flat), (_INDEX, raw.to(verdict.device)), (_VERDICT, verdict)]


def unpack(payload: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, fingerprint) of every tensor of a bucket."""
    start = 0
    for name, shape, dtype, mark in json.loads(bytes(payload[_INDEX].tolist())):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        yield name, payload[_BYTES][start : start + size].view(kind).view(shape), mark
        start += size


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """Loads a bucket into SGLang's model, reads it back and writes the verdict."""
    payload = dict(named_tensors)
    received = list(unpack(payload))
    model.load_weights([(name, tensor) for name, tensor, _ in received])  # type: ignore[operator]
    payload[_VERDICT][_rank_of(model)] = 1 + _first_wrong(model, received)


def _first_wrong(model: nn.Module, received: Sequence[tuple[str, Tensor, int]]) -> int:
    """Place of the first tensor that is not held as it was sent; -1 if there is none."""
    places = list(range(len(received)))
    sent = torch.tensor([mark for _, _, mark in received], device=received[0][1].device)
    agree = [torch.stack([fingerprint(tensor) for _, tensor, _ in received]) == sent]  # on its way
    for place, (name, tensor, _) in enumerate(received):
        for part in held(model, name):  # in the model
            agree.append(part.agrees(part.sent(tensor), part.found()).view(1))
            places.append(place)
    wrong = (~torch.cat(agree)).nonzero().flatten().tolist()  # one transfer to the host
    return min((places[i] for i in wrong), default=-1)


def _rank_of(model: nn.Module) -> int:
    ranks = [getattr(module, "tp_rank", 0) for module in model.modules()]
    return max(rank for rank in ranks if isinstance(rank, int))
