"""Transformers models that are called as they are: `model(input_ids=ids)` returns whole logits.

`PolicyModel` and `ValueModel` divide the work of their heads themselves. Any other model is first
given the attention function below, which knows of split sequences; masks and packed sequences mean
what they mean to transformers on one process.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from torchrft.parallel.modules import decoder_of
from torchrft.parallel.sequence_parallel import Split
from torchrft.parallel.tensor_parallel import outside

_NAME = "torchrft_split"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@torch.compiler.disable  # as torchrft.models.attention: a Split differs from batch to batch
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    split: Split,
    layout: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of whole sequences, given and returning this rank's part of them.

    Raises ValueError for what would silently change the result.
    """
    unsupported = [k for k in ("softcap", "s_aux", "sinks") if kwargs.get(k) is not None]
    unsupported += [] if attention_mask is None else ["a mask of its own"]
    if unsupported or dropout > 0:
        what = ", ".join(unsupported) or f"attention_dropout = {dropout}"
        raise ValueError(
            f"{type(module).__name__} uses {what}, which tp_size and sp_size do not support; set "
            "both to 1"
        )
    query, key, value = split.whole(query, key, value)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if layout is not None:
        return split.part(layout(module.layer_idx, query, key, value, scale, sliding_window)), None
    mask = split.mask(sliding_window, query.device)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return split.part(out.transpose(1, 2)), None


AttentionInterface.register(_NAME, attention)


def prepare_plain(model: nn.Module, tp: int) -> None:
    """Gives the decoder in `model` the attention above. Its config is copied: others may share it.

    Raises ValueError for a model that would then compute something else than on one process.
    """
    decoder = decoder_of(model)
    _check(model, decoder)
    heads = [type(m).__name__ for m in outside(model) if not isinstance(m, nn.Linear)]
    if tp > 1 and heads:
        raise ValueError(
            f"tp_size = {tp}: {type(model).__name__} has parameters of {heads[0]} outside of its "
            "decoder, where only Linear can be split; use sp_size or dp_shard"
        )
    memo: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config, memo)
    decoder.set_attn_implementation(_NAME)


def _check(model: nn.Module, decoder: PreTrainedModel) -> None:
    types = set(getattr(decoder.config, "layer_types", None) or ()) - _LAYER_TYPES
    parameters = inspect.signature(decoder.forward).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    embeddings = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
    what = ""
    if types or not decoder.is_backend_compatible():
        what = ", ".join(sorted(types)) or "attention code of its own"
    elif decoder.config.is_encoder_decoder:
        what = "an encoder and a decoder"
    elif any("attention_mask" in inspect.signature(m.forward).parameters for m in embeddings):
        what = "positions that come from the attention mask"
    elif any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        what = "attention that is not causal"
    elif not takes_more or "position_ids" not in parameters:
        what = "a forward without position_ids or keyword arguments for attention"
    if what:
        raise ValueError(
            f"{type(model).__name__} has {what}, which tp_size and sp_size do not support; set "
            "both to 1 and use dp_shard"
        )
