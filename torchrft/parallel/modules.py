"""The parts of a transformers model that parallelism is applied to."""

from collections import Counter
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


def language_part(model: nn.Module) -> nn.Module:
    """The text decoder of a model that also sees images; any other model as it is."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.get_decoder() if hasattr(module, "get_image_features") else model
    return model


def vocabulary_modules(model: nn.Module) -> list[nn.Module]:
    """The embedding and the head, each if it shares no weight and is used by calling it.

    Such a module can be gathered on its own. A head may be used otherwise by what is around the
    transformers model, unless that calls its method `logprobs`.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        return []
    try:
        embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    except NotImplementedError:  # a model without tokens
        return []
    if inner is not model and not hasattr(head, "logprobs"):
        head = None
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        module
        for module in (embedding, head)
        if isinstance(module, nn.Embedding | nn.Linear)
        if all(owners[id(parameter)] == 1 for parameter in module.parameters())
    ]


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
