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

    def __init__(self, module: nn.Module, ranks: int, kept: bool, replicated: bool) -> None:
        """`kept`: stages 0 to 2. `replicated`: a shard has all of a weight and its gradient, so
        that what a script does to the whole one stays."""
        self.module, self.ranks, self.kept, self.replicated = module, ranks, kept, replicated
        self.gives_shards = self.shows_gradients = False
        self.groups = [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]
        self.shards: list[Any] = list(module.parameters())
        # Whole weights with their shards, while the former are in the module.
        self.pairs: list[tuple[Tensor, Any]] = []
        self.loader: nn.Module | None = None  # whose load_state_dict() is under way
        for part in module.modules():
            part.register_state_dict_post_hook(self)
            part.register_load_state_dict_pre_hook(self.load_shards)
            part.register_load_state_dict_post_hook(self.after_load)
        if kept:
            self.gather()
            _remove_hooks(module)

    def gather(self) -> None:
        """Puts whole weights, those of now, into the module; collective."""
        for group in self.groups if self.kept else ():
            group.set_reshard_after_backward(False, recurse=False)
            group.unshard()
        if self.kept:
            self.pairs = list(zip(self.module.parameters(), self.shards, strict=True))
        for whole, shard in self.pairs:
            vars(whole)["torchrft_shard"] = shard

    @torch.no_grad()
    def release(self) -> None:
        """Puts the shards into the module."""
        for whole, shard in self.pairs:
            shard.requires_grad_(whole.requires_grad)
            if self.replicated:
                shard.to_local().copy_(whole)
            if self.shows_gradients:
                shard.grad = whole.grad if whole.grad is None else as_shard(shard, whole.grad)
        self.show_gradients(False)
        self.pairs = []
        reshard(self.module)

    def show_gradients(self, shows: bool) -> None:
        """Whether replicated weights have their reduced gradients, for a script to change."""
        for whole, shard in self.pairs if shows != self.shows_gradients else ():
            whole.grad = shard.grad.to_local() if shows and shard.grad is not None else None
        self.shows_gradients = shows

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, value in state.items() if not self.gives_shards else ():
            if isinstance(value, DTensor):
                if self.ranks > 1:
                    raise ValueError(
                        f"the weights are spread over {self.ranks} ranks: call "
                        "engine.module_state_dict() on all ranks for whole ones, to save or to "
                        "pass to save_pretrained(state_dict=...), or engine.save_16bit_model()"
                    )
                state[name] = value.full_tensor()

    def load_shards(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before `load_state_dict`: takes this rank's shards of whole weights; all ranks load."""
        if self.gives_shards or self.loader not in (None, module):
            return
        self.loader = module
        self.release()
        for name, shard in module.named_parameters(prefix.rstrip("."), remove_duplicate=False):
            if name in state and isinstance(shard, DTensor) and state[name].shape == shard.shape:
                state[name] = as_shard(shard, state[name])

    def after_load(self, module: nn.Module, _: Any) -> None:
        if self.loader is module:
            self.loader = None
            self.gather()

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
    return vars(parameter).get("torchrft_shard", parameter)


def as_shard(shard: Tensor, value: Tensor) -> Tensor:
    """This rank's shard of a whole tensor that is equal on all ranks, placed as `shard` is."""
    if not isinstance(shard, DTensor):
        return value
    value = value.detach().to(shard.device)
    return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)


def write(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor, equal on all ranks, into a parameter or gradient, sharded or not."""
    for tensor in (target, shard_of(target)):
        tensor.copy_(as_shard(tensor, value))


def frozen(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.requires_grad}


def _remove_hooks(model: nn.Module) -> None:
    """FSDP2's hooks take whole weights away, on the one rank that asks for a state dict."""
    for module in model.modules():
        for hooks in (module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if "to_sharded_hook" in getattr(hook, "hook", hook).__qualname__:
                    del hooks[key]
