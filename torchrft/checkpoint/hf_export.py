"""Write a model, sharded over ranks or not, as a folder that Hugging Face tools load as it is."""

import copy
import json
import stat
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from torchrft.tools.distributed import is_main, on_main

MAX_SHARD_BYTES = 5 * 10**9
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
Tensors = dict[str, Tensor]


def export_hf(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights (as `dtype`), config, generation config and tokenizer to `folder`.

    All ranks call it; sharded parameters are gathered one by one and rank 0 writes, holding one
    shard of at most `max_shard_bytes` (or a single larger tensor) at a time. Tied weights are
    written once. `tokenizer` is whatever has `save_pretrained`: a tokenizer or a processor.

    Raises:
        OSError: rank 0 cannot write. Other ranks raise RuntimeError with the same text.
    """
    tensors = named_tensors(model)
    shards = _plan(tensors, dtype, max_shard_bytes)
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        gathered = {name: _gather(tensors[name], dtype) for name in names}
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"model{several}.safetensors"
        sizes = on_main(partial(_write_weights, model, gathered, path), "write export")
        index.update(dict.fromkeys(sizes, path.name))
        total += sum(sizes.values())

    def finish() -> None:
        if len(shards) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
            text = json.dumps(content, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text)
        _write_configs(model, tokenizer, folder, dtype)

    on_main(finish, "write export")


def _write_weights(model: PreTrainedModel, gathered: Tensors, path: Path) -> dict[str, int]:
    """Writes one file; returns the bytes of each tensor by its published name."""
    # From the names and layout of the module tree to those of the published format.
    converted = revert_weight_conversion(model, gathered)
    contents = {name: _own_storage(value) for name, value in converted.items()}
    save_file(contents, path, metadata={"format": "pt"})
    # safetensors makes a file for its owner alone; others may read what they may elsewhere.
    path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
    return {name: value.nbytes for name, value in contents.items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their Hugging Face names, tied ones once.

    Of the names of a tied weight, the one that transformers keeps in files is chosen.
    """
    dropped = getattr(model, "_tied_weights_keys", None) or {}
    chosen: dict[int, tuple[str, Tensor]] = {}
    for raw_name, parameter in model.named_parameters(remove_duplicate=False):
        name = strip_wrappers(raw_name)
        if id(parameter) not in chosen or chosen[id(parameter)][0] in dropped:
            chosen[id(parameter)] = (name, parameter)
    persistent = model.state_dict().keys()
    buffers = {strip_wrappers(n): b for n, b in model.named_buffers() if n in persistent}
    return dict(chosen.values()) | buffers


def strip_wrappers(name: str) -> str:
    """Parameter name without what torch.compile and activation checkpointing insert around a model
    of the caller's own.

    >>> strip_wrappers("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _plan(tensors: dict[str, Tensor], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Names per file, in order; sizes are global, so every rank makes the same plan."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        needed = tensor.numel() * kept.itemsize
        if shards[-1] and size + needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


@torch.no_grad()
def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor, on rank 0's CPU; elsewhere an empty one."""
    if isinstance(tensor, DTensor):
        # Offloaded shards must be where the mesh communicates.
        tensor = tensor.to(tensor.device_mesh.device_type)
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if is_main() else torch.empty(0)


def _own_storage(tensor: Tensor) -> Tensor:
    """safetensors refuses views of larger storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_configs(
    model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype
) -> None:
    config = copy.deepcopy(model.config)
    # fully_shard replaces the class of a module by one of its own, derived from both.
    architecture = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    config.architectures = [architecture.__name__]
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        # Not its save_pretrained, which refuses some published generation configs.
        model.generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
