"""Sequences split over ranks, by hooks on the decoder: whole ids in, whole hidden states out.

Each rank of the `sp` dimension computes a part of the sequence. Around attention, and only there, a
DTensor redistribution turns Shard(sequence) into Shard(heads) and back (DeepSpeed-Ulysses,
arXiv:2309.14509), so that any attention layout works unchanged, packing included. With tensor
parallelism a part is split once more between the blocks of a layer.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchrft.parallel.mesh import ModelMesh
from torchrft.parallel.modules import decoder_of

# What the decoder would take or return for whole sequences, and each rank has for its part only.
_NOT_SPLIT = ("inputs_embeds", "past_key_values", "use_cache")
_NOT_RETURNED = ("output_hidden_states", "output_attentions", "output_router_logits")


def apply_sequence_parallel(model: nn.Module, mesh: ModelMesh, plain: bool = False) -> None:
    """Splits the decoder's sequences over the ranks of `mesh`, in place.

    The decoder is called as before, with the same whole input on all those ranks. What follows it
    may divide its work over them, and so the gradient of the hidden states; in a `plain` model it
    does not, and each rank has the whole gradient.
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
    hooks = _Hooks(mesh, plain, list(inspect.signature(decoder.forward).parameters))
    decoder.register_forward_pre_hook(hooks.before, with_kwargs=True)
    decoder.register_forward_hook(hooks.after, with_kwargs=True)


class _Hooks:
    def __init__(self, mesh: ModelMesh, plain: bool, names: list[str]) -> None:
        self.mesh, self.plain, self.names = mesh, plain, names
        self.length = 0

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        seen = None
        if self.plain:
            _refuse_what_is_not_split(module, kwargs)
            positions = kwargs.get("position_ids")
            # With a cache, which transformers makes by default, it looks for no packed sequences.
            cached = kwargs.pop("use_cache", None) is None and module.config.use_cache
            seen = _segments(kwargs.pop("attention_mask", None), None if cached else positions)
            if positions is None:
                whole = kwargs["input_ids"]
                kwargs["position_ids"] = torch.arange(whole.shape[1], device=whole.device)[None]
            kwargs["use_cache"] = False
        own = _parts(kwargs, self.mesh)
        self.length = kwargs["position_ids"].shape[-1]
        split = Split(self.mesh.sp, self.length, -self.length % self.mesh.all.size(), seen)
        return (), {**kwargs, **own, "split": split}

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        own = output.last_hidden_state
        hidden = DTensor.from_local(own, self.mesh.all, [Shard(1)], run_check=False)
        whole = hidden.redistribute(placements=[Replicate()]).to_local()
        if self.plain and whole.requires_grad:
            # Each sp rank's parameters get the gradient of its part, which FSDP2 will average.
            whole.register_hook(lambda gradient: gradient * self.mesh.sp.size())
        whole = whole[:, : self.length]
        # FSDP2 warns of views among a module's outputs, which a decoder on its own returns.
        output.last_hidden_state = whole.clone() if self.plain else whole
        return output


def _parts(kwargs: dict[str, Any], mesh: ModelMesh) -> dict[str, Any]:
    """This rank's part of the arguments that run along the sequence."""
    length = kwargs["position_ids"].shape[-1]
    pad = -length % mesh.all.size()
    parts, part = mesh.sp.size(), mesh.sp.get_local_rank()
    along = ("input_ids", "position_ids", "visual_pos_masks")
    given = {name: kwargs[name] for name in along if kwargs.get(name) is not None}
    own: dict[str, Any] = {k: F.pad(v, (0, pad)).chunk(parts, -1)[part] for k, v in given.items()}
    if kwargs.get("inputs_embeds") is not None:
        own["inputs_embeds"] = F.pad(kwargs["inputs_embeds"], (0, 0, 0, pad)).chunk(parts, 1)[part]
    if kwargs.get("visual_pos_masks") is not None:  # rows of what its marks are added to
        marks = kwargs["visual_pos_masks"]
        number = F.pad((marks.flatten().cumsum(0) - 1).view_as(marks), (0, pad))
        rows = number.chunk(parts, dim=-1)[part][own["visual_pos_masks"]]
        own["deepstack_visual_embeds"] = [x[rows] for x in kwargs["deepstack_visual_embeds"]]
    return own


def _refuse_what_is_not_split(module: Any, kwargs: dict[str, Any]) -> None:
    known = {"input_ids", "position_ids", "attention_mask"}
    asked = {name: kwargs.get(name) for name in _NOT_SPLIT}
    asked |= {name: kwargs.get(name, getattr(module.config, name, None)) for name in _NOT_RETURNED}
    found = [name for name, value in asked.items() if value is not None and value is not False]
    found += [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in known]
    if found or kwargs.get("input_ids") is None:
        raise ValueError(
            f"{type(module).__name__} splits input_ids over tp_size and sp_size ranks, which does "
            f"not go with {', '.join(found) or 'no input_ids'}: leave that out, or use one rank"
        )


def _segments(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """int64 [B, T]: tokens see those before them with the same number. None: all before them.

    As in transformers: padding, 0 in the mask, is apart, and without a mask positions tell packed
    sequences.
    Raises ValueError for a mask that is not [B, T].
    """
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"attention_mask must be [B, T] under sp_size, not {[*mask.shape]}")
        return None if bool(mask.all()) else mask.bool().to(torch.int64)
    if positions is None:
        return None
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=1)
    return None if bool((steps == 1).all()) else (steps != 1).cumsum(1)


@dataclass(frozen=True)
class Split:
    """How attention gets whole sequences, and gives its part back: sequences of `length`, padded by
    `pad`, are split over `mesh`. `segments` [B, length] are what a plain model's tokens see."""

    mesh: DeviceMesh
    length: int
    pad: int
    segments: Tensor | None = None

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Boolean [B or 1, 1, length, length], true where attended; None for plain causality."""
        if self.segments is None and (window is None or window >= self.length):
            return None
        position = torch.arange(self.length, device=device)
        distance = position[:, None] - position[None, :]
        mask = ((distance >= 0) & (distance < (window or self.length)))[None, None]
        if self.segments is not None:
            mask = mask & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        return mask

    def whole(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """[B, H, part, D] of this rank's part of the sequence as [B, H / ranks, length, D]."""
        # Fewer key heads than ranks: repeated until every rank has one. Query head h still finds
        # its own, at h // (queries per key).
        times = self.mesh.size() // math.gcd(self.mesh.size(), key.shape[1])
        key, value = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (key, value))
        moved = [self._move(x, Shard(2), Shard(1)) for x in (query, key, value)]
        return tuple(x[:, :, : self.length] for x in moved)

    def heads(self, by_head: Tensor) -> Tensor:
        """[H / ranks] of a number for each head [H]: those of the query in `whole`."""
        return by_head.chunk(self.mesh.size())[self.mesh.get_local_rank()]

    def part(self, out: Tensor) -> Tensor:
        """[B, length, H / ranks, D] as [B, part, H, D]."""
        return self._move(F.pad(out, (0, 0, 0, 0, 0, self.pad)), Shard(2), Shard(1))

    def _move(self, x: Tensor, source: Shard, target: Shard) -> Tensor:
        if self.mesh.size() == 1:
            return x
        sharded = DTensor.from_local(x.contiguous(), self.mesh, [source], run_check=False)
        return sharded.redistribute(placements=[target]).to_local()
