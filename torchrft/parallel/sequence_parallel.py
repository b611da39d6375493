"""Sequences split over ranks, by hooks on the decoder: whole ids in, whole hidden states out.

Each rank of the `sp` dimension computes a part of the sequence. Around attention, and only there, a
DTensor redistribution turns Shard(sequence) into Shard(heads) and back (DeepSpeed-Ulysses,
arXiv:2309.14509), so that any attention layout works unchanged, packing included. With tensor
parallelism a part is split once more between the blocks of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchrft.parallel.mesh import ModelMesh
from torchrft.parallel.modules import decoder_of


def apply_sequence_parallel(model: nn.Module, mesh: ModelMesh) -> None:
    """Splits the decoder's sequences over the ranks of `mesh`, in place.

    The decoder is called as before, with the same whole input on all those ranks.
    Raises ValueError if they do not divide the attention heads.
    """
    decoder = decoder_of(model)
    sp, tp = mesh.sp.size(), mesh.all.size() // mesh.sp.size()
    heads = decoder.config.num_attention_heads
    if heads % (sp * tp):
        raise ValueError(
            f"sp_size x tp_size = {sp} x {tp} must divide num_attention_heads = {heads} of "
            f"{type(decoder).__name__}: {heads} % {sp * tp} = {heads % (sp * tp)}"
        )
    hooks = _Hooks(mesh)
    decoder.register_forward_pre_hook(hooks.before, with_kwargs=True)
    decoder.register_forward_hook(hooks.after, with_kwargs=True)


class _Hooks:
    def __init__(self, mesh: ModelMesh) -> None:
        self.mesh = mesh
        self.length = 0

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids, positions = kwargs["input_ids"], kwargs["position_ids"]
        self.length = ids.shape[1]
        pad = -self.length % self.mesh.all.size()
        parts, part = self.mesh.sp.size(), self.mesh.sp.get_local_rank()
        ids, positions = (F.pad(x, (0, pad)).chunk(parts, dim=1)[part] for x in (ids, positions))
        split = Split(self.mesh.sp, self.length, pad)
        return args, {**kwargs, "input_ids": ids, "position_ids": positions, "split": split}

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        hidden = DTensor.from_local(
            output.last_hidden_state, self.mesh.all, [Shard(1)], run_check=False
        )
        whole = hidden.redistribute(placements=[Replicate()]).to_local()
        output.last_hidden_state = whole[:, : self.length]
        return output


@dataclass(frozen=True)
class Split:
    """How attention gets whole sequences, and gives its part back: sequences of `length`, padded by
    `pad`, are split over `mesh`."""

    mesh: DeviceMesh
    length: int
    pad: int

    def whole(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, part, D] of this rank's part of the sequence as [B, H / ranks, length, D]."""
        # Fewer key heads than ranks: repeated until every rank has one. Query head h still finds
        # its own, at h // (queries per key).
        times = self.mesh.size() // math.gcd(self.mesh.size(), key.shape[1])
        key, value = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (key, value))
        query, key, value = (
            self._move(x, Shard(2), Shard(1))[:, :, : self.length] for x in (query, key, value)
        )
        return query, key, value

    def part(self, out: Tensor) -> Tensor:
        """[B, length, H / ranks, D] as [B, part, H, D]."""
        return self._move(F.pad(out, (0, 0, 0, 0, 0, self.pad)), Shard(2), Shard(1))

    def _move(self, x: Tensor, source: Shard, target: Shard) -> Tensor:
        if self.mesh.size() == 1:
            return x
        sharded = DTensor.from_local(x.contiguous(), self.mesh, [source], run_check=False)
        return sharded.redistribute(placements=[target]).to_local()
