"""Write a model, sharded over ranks or not, as a folder that Hugging Face tools load as it is."""

import copy
import json
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from torchrft.models.loader import expected_model, persistent_buffers
from torchrft.parallel import reshard
from torchrft.tools.distributed import is_main, on_main
from torchrft.tools.logging import logger

MAX_SHARD_BYTES = 5 * 10**9
_MAX_OTHER_BYTES = 2 * 10**8  # of what lies beside the weights
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".ggml", ".h5", ".npz"),
    *(".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".nemo", ".index.json"),
    "adapter_config.json",  # with which an adapter's weights would be looked for
)
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
Tensors = dict[str, Tensor]


def export_hf(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write weights (as `dtype`), config, and what lay beside the weights that training began from.

    All ranks call it; sharded parameters are gathered one by one and rank 0 writes, holding one
    shard of at most `max_shard_bytes` (or a single larger tensor) at a time. Tied weights are
    written once, and tensors that transformers keeps in float32 stay so.

    Args:
        tokenizer: whatever has `save_pretrained`: a tokenizer or a processor. One that was loaded
            from the model's source is there as that source's own files, byte for byte.
        files: those of `files_beside_weights`, by default of the model's `name_or_path`.

    Raises:
        OSError: rank 0 cannot write. Other ranks raise RuntimeError with the same text.
    """
    reshard(model)  # or freed copies of weights would be written, after a forward pass alone
    tensors = named_tensors(model)
    dtypes = _dtypes(model, tensors, dtype)
    shards = _plan(tensors, dtypes, max_shard_bytes)
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        gathered = {name: _gather(tensors[name], dtypes[name]) for name in names}
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
        beside = files_beside_weights(model.name_or_path) if files is None else files
        _write_configs(model, tokenizer, folder, dtype, beside)

    on_main(finish, "write export")


def files_beside_weights(source: str | None) -> dict[str, bytes]:
    """What lies beside the weights in a model's folder, or in the hub cache's snapshot of it, by
    relative path: generation config, chat templates, tokenizer and processor files, code, license.

    Left out are hidden files and folders that hold weights of their own. So is what would make it
    more than 200 MB together; a warning says so. Empty for a source that is not there.
    Raises ValueError for a file that cannot be read.
    """
    folder, files, room = Path(source or ""), dict[str, bytes](), _MAX_OTHER_BYTES
    if not source:  # a model that was made from no files
        return files
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError):
            return {}
    try:
        entries = []
        for entry in folder.iterdir():
            inside = [path for path in (entry, *entry.rglob("*")) if path.is_file()]
            weights = any(path.name.lower().endswith(_WEIGHTS) for path in inside)
            if not (weights or entry.name.startswith(".") or entry.name == "__pycache__"):
                entries.append((sum(path.stat().st_size for path in inside), entry, inside))
        for size, entry, inside in sorted(entries):  # small ones first: the tokenizer's must fit
            if size > room:
                logger.warning("%s has %d MB: too large to copy into exports", entry, size // 10**6)
                continue
            room -= size
            files |= {str(path.relative_to(folder)): path.read_bytes() for path in inside}
    except OSError as error:
        text = f'exports copy all but the weights of "{source}": {error}; make it readable'
        raise ValueError(text) from error
    return files


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
    buffers = {strip_wrappers(name): buffer for name, buffer in persistent_buffers(model)}
    return dict(chosen.values()) | buffers


def _dtypes(model: PreTrainedModel, tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor is written as: what transformers would load it as, in a model of `dtype`."""
    expected = tensors | named_tensors(expected_model(model.config, dtype))
    return {name: expected[name].dtype for name in tensors}


def strip_wrappers(name: str) -> str:
    """Parameter name without what torch.compile and activation checkpointing insert around a model
    of the caller's own.

    >>> strip_wrappers("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _plan(tensors: Tensors, dtypes: Mapping[str, torch.dtype], max_bytes: int) -> list[list[str]]:
    """Names per file, in order; sizes are global, so every rank makes the same plan."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        needed = tensor.numel() * dtypes[name].itemsize
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
    tensor = tensor.to(dtype)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if is_main() else torch.empty(0)


def _own_storage(tensor: Tensor) -> Tensor:
    """safetensors refuses views of larger storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_configs(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    files: Mapping[str, bytes],
) -> None:
    origin = getattr(getattr(tokenizer, "tokenizer", tokenizer), "name_or_path", None)
    elsewhere = not files or origin != model.name_or_path
    for name, content in files.items():
        if elsewhere and any(word in name for word in ("chat_template", "processor")):
            continue  # they would stand beside those of another processor
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    config = copy.deepcopy(model.config)
    # fully_shard replaces the class of a module by one of its own, derived from both.
    architecture = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    config.architectures = [architecture.__name__]
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    config.__dict__.pop("transformers_weights", None)  # the name of the file of weights
    # Not save_pretrained, which refuses some published configs and generation configs.
    config.to_json_file(folder / "config.json")
    name = "generation_config.json"
    if name not in files and model.can_generate() and model.generation_config is not None:
        model.generation_config.to_json_file(folder / name)
    if elsewhere:
        tokenizer.save_pretrained(folder)
