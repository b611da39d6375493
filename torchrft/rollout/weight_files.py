"""Weights as files, for engines that run in other processes."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from torchrft.rollout.canary import fingerprint
from torchrft.rollout.weight_sync import buckets

_BUCKET = 256 << 20  # bytes held at a time while weights are written


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
