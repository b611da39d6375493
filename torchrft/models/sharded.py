"""Pretrained weights read straight into shards: no rank ever holds the whole model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from torchrft.models.loader import (
    load_config,
    materialize,
    parameters_on_meta,
    persistent_buffers,
)
from torchrft.models.support import from_config, refuse_unsupported
from torchrft.tools.logging import logger
from torchrft.tools.payload import parse

Build = Callable[..., PreTrainedModel]


class ShardedWeights:
    """The safetensors files of `source` for a model that is parallelized before it has weights.

    >>> weights = ShardedWeights.of("Qwen/Qwen2.5-7B")                     # doctest: +SKIP
    >>> model = PolicyModel(weights.model(torch.float32))                  # doctest: +SKIP
    >>> weights.fill(parallelize(model, dims, config), torch.device("cuda", 0))  # doctest: +SKIP
    """

    def __init__(self, source: str, files: dict[str, Path], build: Build) -> None:
        self.source, self.files, self.build = source, files, build  # files by their names
        self.names = self._by_model_name(set(files))  # the files' names, by the model's
        self.owners: list[tuple[str, nn.Module]] = []

    @classmethod
    def of(cls, source: str, build: Build | None = None) -> ShardedWeights | None:
        """None where only the loader of whole models does: the files are no safetensors, or have
        other names than the model, one name twice, or tied weights that differ.

        `build(dtype=...)` makes the model, by default the causal LM of `source`.
        """
        try:
            folder = Path(source)
            if not folder.is_dir():
                folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
            files: dict[str, Path] = {}
            for path in _chosen(folder):
                with safe_open(path, framework="pt") as file:
                    names = set(file.keys())
                if names & files.keys():
                    return None
                files |= dict.fromkeys(names, path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
            return None  # the loader of whole models says what is wrong
        if not files:
            return None
        if build is None:
            config = load_config(source)
            refuse_unsupported(config, head=False)
            build = partial(from_config, config)
        weights = cls(source, files, build)
        for aliases in weights._aliases():
            held = sorted(aliases & weights.names.keys())
            pairs = ((weights._bytes(held[0]), weights._bytes(name)) for name in held[1:])
            if not held or not all(torch.equal(*pair) for pair in pairs):
                what = f"different {' and '.join(held)}" if held else f"no {min(aliases)}"
                logger.info("%s: files have %s; every rank loads the whole model", source, what)
                return None
        return weights

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model, its parameters on the meta device and its buffers real."""
        with parameters_on_meta():
            model = self.build(dtype=dtype)
        self.owners = [*model.named_modules()]
        return model

    def fill(self, root: nn.Module, device: torch.device) -> None:
        """Gives every parameter of `model` that is in `root` its memory on `device`, and its part
        of the weights; persistent buffers get whole ones. All ranks call it.

        Raises ValueError for weights of another shape.
        """
        inside = set(root.modules())
        owners = [(prefix, module) for prefix, module in self.owners if module in inside]
        materialize((module for _, module in owners), device)
        state: dict[str, Tensor] = {}
        for prefix, module in owners:
            buffers = module.named_buffers(prefix, recurse=False)
            for key, tensor in (*module.named_parameters(prefix, recurse=False), *buffers):
                if key in self.names:
                    state[self.names[key]] = tensor.data
        try:
            with tempfile.TemporaryDirectory() as folder:  # the reader takes all that is in one
                for number, path in enumerate(sorted({*self.files.values()})):
                    Path(folder, f"{number}.safetensors").symlink_to(path.resolve())
                dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
        except dcp.api.CheckpointException as error:
            first = str(next(iter(error.failures.values()))[0]).splitlines()[0]
            raise ValueError(
                f'the weights in pretrain = "{self.source}" do not load: {first}'
            ) from error

    def _by_model_name(self, names: set[str]) -> dict[str, str]:
        """Published files may have other names than the modules; what has to be computed from
        several tensors, or from one of another shape, is left out, and what no model holds."""
        model = self.model(torch.float32)
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        known, found = model.state_dict(), dict[str, str]()
        for name in sorted(names):
            new, converter = rename_source_key(
                name, renamings, converters, model.base_model_prefix, known
            )
            if converter is None and new in known:
                found[new] = name
        return found

    def _bytes(self, name: str) -> Tensor:
        """A weight in the files by the model's name; not in memory."""
        with safe_open(self.files[self.names[name]], framework="pt") as file:
            return file.get_tensor(self.names[name]).view(torch.uint8)

    def _aliases(self) -> list[set[str]]:
        """The names of each parameter and persistent buffer; tied ones have several."""
        names: dict[int, set[str]] = {}
        model = self.model(torch.float32)
        parameters = model.named_parameters(remove_duplicate=False)
        for name, tensor in (*parameters, *persistent_buffers(model)):
            names.setdefault(id(tensor), set()).add(name)
        return list(names.values())


def _chosen(folder: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors, else those of the index."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = parse((folder / "model.safetensors.index.json").read_bytes())
    return sorted({folder / name for name in index["weight_map"].values()})
