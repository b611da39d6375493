"""Whole weights beside the shards that are trained, and who sees which of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, distribute_tensor

from torchrft.parallel.fsdp import reshard


class WholeWeights:
    """What `module.parameters()` and `module.state_dict()` give to a script.

    In stages 0 to 2 they are whole plain tensors on every rank from `initialize` on, as in
    DeepSpeed, so that one rank may read or save them by itself. `release` puts the trained float32
    shards in their place for an optimizer step, `gather` makes whole ones of what that gave.

    In stage 3 they are shards, and gathering takes all ranks: `state_dict()` is an error there,
    rather than a wait without end on the one rank that calls it.
    """

    def __init__(self, module: nn.Module, stage: int, ranks: int) -> None:
        self.module, self.ranks = module, ranks
        self.gives_shards = False
        self.kept = stage < 3
        self.shards: list[Any] = list(module.parameters())
        # Whole weights with their shards, while the former are in the module.
        self.pairs: list[tuple[Tensor, Any]] = []
        # In stage 0 a shard has all of a weight: what a script does to the whole one is kept.
        self.replicated = stage == 0
        self.shows_gradients = False
        module.register_state_dict_post_hook(self)
        module.register_load_state_dict_pre_hook(self.check_load)
        for part in _groups(module) if self.kept else ():
            part.set_reshard_after_backward(False, recurse=False)
        self.gather()

    def gather(self) -> None:
        """Puts whole weights, those of now, into the module; collective."""
        if not self.kept:
            return
        for part in _groups(self.module):
            part.unshard()
        self.pairs = list(zip(self.module.parameters(), self.shards, strict=True))
        for whole, shard in self.pairs:
            whole.__dict__["shard"] = shard
        for module in self.module.modules():
            # FSDP2's own would take the whole weights away, on the one rank that asks for them.
            for hooks in (module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
                for key, hook in list(hooks.items()):
                    if "to_sharded_hook" in getattr(hook, "hook", hook).__qualname__:
                        del hooks[key]

    @torch.no_grad()
    def release(self) -> None:
        """Puts the shards into the module."""
        for whole, shard in self.pairs:
            shard.requires_grad_(whole.requires_grad)
            if self.replicated and whole.dtype == shard.dtype:
                shard.to_local().copy_(whole)
                if self.shows_gradients and whole.grad is not None:
                    shard.grad.to_local().copy_(whole.grad)
                elif self.shows_gradients:
                    shard.grad = None
        self.show_gradients(False)
        self.pairs = []
        reshard(self.module)

    def show_gradients(self, shows: bool = True) -> None:
        """Stage 0: whether whole weights have the reduced gradients, for a script to change."""
        for whole, shard in self.pairs:
            if shows != self.shows_gradients and whole.dtype == shard.dtype:
                whole.grad = shard.grad.to_local() if shows and shard.grad is not None else None
        self.shows_gradients = shows

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self.gives_shards:
            return
        for name, value in state.items():
            if isinstance(value, DTensor):
                if self.ranks > 1:
                    raise ValueError(
                        f"the weights are spread over {self.ranks} ranks: call "
                        "engine.module_state_dict() on all ranks for whole ones, to save or to "
                        "pass to save_pretrained(state_dict=...), or engine.save_16bit_model()"
                    )
                state[name] = value.full_tensor()

    def check_load(self, *_: Any) -> None:
        if not self.kept and not self.gives_shards:
            raise ValueError(
                "module.load_state_dict() does not go with ZeRO stage 3, whose weights are shards: "
                "load before initialize, within zero.GatheredParameters(..., modifier_rank=0), or "
                "with engine.load_checkpoint()"
            )

    @contextmanager
    def as_shards(self) -> Iterator[None]:
        """Within it the module has its shards, for those who gather or load them; collective."""
        self.release()
        self.gives_shards = True
        try:
            yield
        finally:
            self.gives_shards = False
            self.gather()

    def gathered(self, exclude_frozen: bool = False) -> Iterator[tuple[str, Any]]:
        """Names and whole tensors, one after the other; collective."""
        with self.as_shards():
            state = self.module.state_dict()
        for name in frozen(self.module) if exclude_frozen else ():
            state.pop(name, None)
        for name, value in state.items():
            yield name, value.full_tensor() if isinstance(value, DTensor) else value


def shard_of(parameter: Tensor) -> Tensor:
    """What is trained where a module holds a whole weight in its place; else the parameter."""
    return vars(parameter).get("shard", parameter)


def write(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor, equal on all ranks, into a parameter or gradient, sharded or not."""
    if (shard := shard_of(target)) is not target:
        write(shard, value)
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        whole = value.to(target.device)
        target.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
    else:
        target.copy_(value)


def frozen(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.requires_grad}


def _groups(module: nn.Module) -> list[fsdp.FSDPModule]:
    return [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]
