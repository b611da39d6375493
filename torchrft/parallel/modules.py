"""The parts of a transformers model that parallelism is applied to."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: nn.Module) -> Any:
    """The text decoder inside `model`: embeddings, layers, final norm.

    Raises ValueError if `model` holds no transformers model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.get_decoder()
    raise ValueError(f"{type(model).__name__} holds no transformers model")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, as transformers names them in `_no_split_modules`."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    # FSDP2 gives a module a class of its own, derived from the one that has the name.
    return [
        module
        for module in model.modules()
        if any(base.__name__ in names for base in type(module).__mro__)
    ]
