"""The parts of a transformers model that parallelism is applied to."""

from collections import Counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Layer types of transformers with states that run along a sequence.
MIXED = {"linear_attention", "conv", "hybrid"}


def refuse_split(config: Any, kind: str, tp: int, sp: int) -> None:
    """Raises ValueError if a model of the class `kind` cannot be split over tp x sp ranks: the
    states of its layers run along whole sequences."""
    text = config.get_text_config()
    types = sorted(MIXED & {*(getattr(text, "layer_types", None) or ())})
    if types and tp * sp > 1:
        raise ValueError(
            f"tp_size x sp_size = {tp} x {sp}: {kind} has {', '.join(types)} layers, whose states "
            "run along whole sequences; use tp_size = 1 and sp_size = 1 with fsdp or zero_stage = 3"
        )


def transformers_part(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model that `model` is or holds."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def decoder_of(model: nn.Module) -> Any:
    """The text decoder inside `model`: embeddings, layers, final norm.

    Raises ValueError if `model` holds no transformers model.
    """
    if (inner := transformers_part(model)) is None:
        raise ValueError(f"{type(model).__name__} holds no transformers model")
    return inner.get_decoder()


def language_part(model: nn.Module) -> nn.Module:
    """The text decoder of a model that also sees images; any other model as it is."""
    return decoder_of(model) if hasattr(transformers_part(model), "get_image_features") else model


def vocabulary_modules(model: nn.Module) -> list[nn.Module]:
    """The embedding and the head, each if it shares no weight and is used by calling it.

    Such a module can be gathered on its own. A head may be used otherwise by what is around the
    transformers model, unless that calls its method `logprobs`.
    """
    if (inner := transformers_part(model)) is None:
        return []
    try:
        embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    except NotImplementedError:  # a model without tokens
        return []
    if inner is not model and not hasattr(head, "logprobs"):
        head = None
    found = [m for m in (embedding, head) if isinstance(m, nn.Embedding | nn.Linear)]
    return [m for m in found if not shares_weights(model, m)]


def shares_weights(model: nn.Module, module: nn.Module) -> bool:
    """Whether a parameter of `module` is also one of another part of `model` (tied weights)."""
    owners, inside = (
        Counter(id(p) for _, p in m.named_parameters(remove_duplicate=False))
        for m in (model, module)
    )
    return any(owners[key] != count for key, count in inside.items())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, as transformers names them in `_no_split_modules`."""
    modules = list(model.modules())
    names = {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
    # FSDP2 gives a module a class of its own, derived from the one that has the name.
    return [m for m in modules if any(base.__name__ in names for base in type(m).__mro__)]
