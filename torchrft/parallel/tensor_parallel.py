"""Tensor parallelism with sequence-parallel norms, by DTensor (arXiv:1909.08053, 2205.05198).

Between the sharded blocks of a layer each rank holds a part of the sequence, so norms and residuals
are computed once and not on every rank. The plan comes from the model itself: transformers lists
the projections in `base_model_tp_plan`, all else follows from the shape of a decoder layer.
"""

import logging
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, parallel
from transformers import PreTrainedModel

from torchrft.parallel.modules import (
    decoder_layers,
    decoder_of,
    language_part,
    transformers_part,
)

_SEQUENCE = Shard(1)
_LAYOUTS = ("input_layouts", "desired_input_layouts", "output_layouts", "desired_output_layouts")
# It recommends flat meshes for what only happens once a step, or when weights are gathered.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


# What transformers calls the styles of DTensor.
_STYLES: dict[str, parallel.ParallelStyle] = {
    "colwise": parallel.ColwiseParallel(),
    "rowwise": parallel.RowwiseParallel(output_layouts=_SEQUENCE),
    # Norms of single heads: each rank has its own heads, and a part of the gradient.
    "replicated_with_grad_allreduce": parallel.SequenceParallel(
        sequence_dim=2, use_local_output=True
    ),
}


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the model over `mesh` (one dimension), in place. Tied embeddings stay tied.

    Afterwards every parameter is a DTensor. The decoder takes inputs of a length that the ranks
    divide and returns each rank's part of the sequence; see `sequence_parallel`. Heads take whole
    hidden states and return whole outputs.
    Raises ValueError for a model without a plan, or whose sizes the ranks do not divide.
    """
    decoder = decoder_of(model)
    if language_part(model) is not model:
        raise ValueError(
            f"tp_size = {mesh.size()}: {type(decoder).__name__} sees images, whose tower is not "
            "split; use tp_size = 1 with fsdp, zero_stage = 3 or sp_size"
        )
    plan = layer_plan_of(decoder)
    _check(decoder, plan, mesh.size())
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    inner = {pattern.split(".")[2] for pattern in plan}
    styles = {pattern: _STYLES[name] for pattern, name in plan.items()}
    parallel.parallelize_module(decoder, mesh, styles)
    for layer in decoder_layers(decoder):
        parallel.parallelize_module(layer, mesh, _layer_plan(layer, inner))
    embedding = decoder.get_input_embeddings()
    head: Any = cast(PreTrainedModel, transformers_part(model)).get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    parallel.parallelize_module(decoder, mesh, _layer_plan(decoder, set()))
    row = parallel.RowwiseParallel(input_layouts=Replicate(), output_layouts=_SEQUENCE)
    parallel.parallelize_module(embedding, mesh, row)
    for module in outside(model):
        if module is head:
            if tied:
                head.register_parameter("weight", embedding.weight)
            column = parallel.ColwiseParallel(output_layouts=Replicate())
            parallel.parallelize_module(head, mesh, column)
            if tied:  # the call before made a parameter of its own
                head.register_parameter("weight", embedding.weight)
            # The logits are a view, on which FSDP2 would lose its hooks in an in-place operation.
            head.register_forward_hook(lambda module, args, logits: logits.clone())
        elif isinstance(module, nn.Linear):
            whole: dict[str, Any] = dict.fromkeys(_LAYOUTS, (Replicate(),))
            parallel.parallelize_module(module, mesh, parallel.PrepareModuleInputOutput(**whole))
    _replicate_the_rest(model, mesh)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # which SequenceParallel forgets


def layer_plan_of(decoder: PreTrainedModel) -> dict[str, str]:
    """What transformers plans for the layers. Some versions plan embeddings as well, which here
    follow from being the embedding."""
    plan = getattr(decoder.config, "base_model_tp_plan", None) or {}
    return {pattern: name for pattern, name in plan.items() if pattern.startswith("layers.")}


def outside(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own that are not in the decoder."""
    inside = set(decoder_of(model).modules())
    around = [module for module in model.modules() if module not in inside]
    return [module for module in around if any(True for _ in module.parameters(recurse=False))]


def _check(decoder: PreTrainedModel, plan: dict[str, str], size: int) -> None:
    kind = type(decoder).__name__
    unknown = sorted(set(plan.values()) - _STYLES.keys())
    if not plan or unknown:
        what = f"has {', '.join(unknown)} in its" if unknown else "has no"
        raise ValueError(
            f"tp_size = {size}: {kind} {what} base_model_tp_plan, which torchrft cannot shard; "
            "use tp_size = 1 with fsdp or zero_stage = 3"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(decoder.config, name, None)
        if heads is not None and heads % size:
            raise ValueError(
                f"tp_size = {size} must divide {name} = {heads} of {kind}: {heads} % {size} = "
                f"{heads % size}; use a divisor of {heads}"
            )
    for name, module in decoder.named_modules():
        style = next((plan[pattern] for pattern in plan if fnmatchcase(name, pattern)), "")
        held = next(module.parameters(recurse=False), None) is not None
        if held and not style and name[:7] == "layers." and "Norm" not in type(module).__name__:
            raise ValueError(
                f"tp_size = {size}: {name} of {kind} has weights that are not in its "
                "base_model_tp_plan; use tp_size = 1 with fsdp or zero_stage = 3"
            )
        count = {"colwise": "out_features", "rowwise": "in_features"}.get(style, "")
        if (width := getattr(module, count, 0)) % size:
            raise ValueError(
                f"tp_size = {size} must divide {count} = {width} of {name} in {kind}: {width} % "
                f"{size} = {width % size}; use a divisor of {width}, or dp_shard instead"
            )


def _layer_plan(layer: nn.Module, inner: set[str]) -> dict[str, parallel.ParallelStyle]:
    """Norms on parts of the sequence; attention and MLP get the whole of it."""
    plan: dict[str, parallel.ParallelStyle] = {}
    for name, child in layer.named_children():
        if name not in inner and "Norm" in type(child).__name__:
            plan[name] = parallel.SequenceParallel(use_local_output=True)
        elif name in inner and "attn" in name:
            plan[name] = parallel.PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": _SEQUENCE},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            )
        elif name in inner:
            plan[name] = parallel.PrepareModuleInput(
                input_layouts=(_SEQUENCE,), desired_input_layouts=(Replicate(),)
            )
    return plan


def _replicate_the_rest(model: nn.Module, mesh: DeviceMesh) -> None:
    """All parameters on one mesh, which clipping by their joint norm needs."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                whole = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
