"""The trainer's weights, one full tensor at a time, by Hugging Face name."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchrft.models.loader import persistent_buffers
from torchrft.parallel import reshard
from torchrft.rollout.canary import Canary, Held, fingerprint

_BUCKET = 256 << 20  # bytes held at a time while weights are written


def named_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every parameter, gathered from its shards if it has any, and of
    every persistent buffer, which all ranks hold whole.

    Gathering is collective: with sharded parameters all ranks must exhaust the iterator together.
    Tied parameters come once, under their first name; only one gathered tensor is alive at a time.
    """
    reshard(model)  # a forward pass without backward may have left weights of its time gathered
    for name, parameter in (*model.named_parameters(), *persistent_buffers(model)):
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def buckets(pairs: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """The named tensors in parts, each full once it holds `size` bytes."""
    bucket: dict[str, Tensor] = {}
    for name, tensor in pairs:
        bucket[name] = tensor
        if sum(held.nbytes for held in bucket.values()) >= size:
            yield bucket
            bucket = {}
    if bucket:
        yield bucket


@torch.no_grad()
def copy_weights(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copies every tensor into the model's parameter or buffer of that name, casting to its dtype.

    Raises ValueError for an unknown name, another shape, or one of them that got no value, and
    WeightSyncError if a copy is not what was sent: the tensor that is wrong is named, and the
    weights must not be used.
    """
    canary = Canary(model, lambda name: [Held(lambda: canary.expected[name])])
    for name, tensor in canary.watch(named_tensors):
        canary.expected[name].copy_(tensor)
    canary.check()


def layout(model: nn.Module) -> str:
    """A short digest of the weights' names and shapes, equal for the same model only."""
    tensors = (*model.named_parameters(), *persistent_buffers(model))
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in tensors)
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


@dataclass
class WeightFiles:
    """All weights as safetensors files, and the mark (`fingerprint`) of every tensor."""

    paths: list[str] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    failure: str | None = None

    @classmethod
    def write(cls, pairs: Iterable[tuple[str, Tensor]], folder: str) -> Self:
        """Writes the tensors in buckets of bounded size.

        Gathering them is collective, so all are taken, even when the disk is full: that is told in
        `failure`.
        """
        files = cls()

        def on_host() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in pairs:
                if files.failure is None:
                    files.marks[name] = int(fingerprint(tensor))
                    yield name, tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

        for bucket in buckets(on_host(), _BUCKET):
            files._save(bucket, folder)
        return files

    def _save(self, bucket: dict[str, Tensor], folder: str) -> None:
        path = os.path.join(folder, f"{len(self.paths)}.safetensors")
        self.paths.append(path)
        try:
            save_file(bucket, path)
        except (OSError, SafetensorError) as error:
            self.failure = f"weight update: {path} cannot be written ({error}); make room there, "
            self.failure += "or set weight_folder to another folder"

    def remove(self) -> None:
        for path in self.paths:
            Path(path).unlink(missing_ok=True)
