"""What torchrft does to the model inside a vLLM engine, in the trainer's process or a server's."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from torchrft.models.support import sees_images
from torchrft.rollout.canary import Canary
from torchrft.rollout.fused_weights import Places, is_a

Pairs = Iterable[tuple[str, Tensor]]


def load(
    places: Places, expected: nn.Module, pairs: Pairs, reload: Callable[[Pairs], object] | None
) -> None:
    """Loads all weights into vLLM's model and proves that it holds them.

    Args: places, of vLLM's model; expected, a Hugging Face model with the names, shapes and ties of
        `pairs`; reload, how to load on a CPU, where packed layers are unpacked, loaded and packed
        again.
    """
    rename = _published_names(expected)
    canary = Canary(expected, lambda name: places(rename(name)))
    watched = canary.watch(pairs)
    if reload is None:
        model: Any = places.model
        model.load_weights(places.write((rename(name), tensor) for name, tensor in watched))
    else:
        reload((rename(name), tensor) for name, tensor in _with_head(expected, watched))
    canary.check()
    places.prove()


def head_dtypes(model: nn.Module) -> set[Any]:
    """What vLLM's model computes its logits in."""
    return {module.head_dtype for module in model.modules() if hasattr(module, "head_dtype")}


def _published_names(expected: Any) -> Callable[[str], str]:
    """The name of a tensor in published files, which vLLM knows, where an image tower inside of
    another model has lost a prefix on its way into transformers' modules."""
    rules: list[Any] = []
    if sees_images(expected.config):
        rules = [
            rule.reverse_transform()
            for rule in get_model_conversion_mapping(expected, add_legacy=False)
            if isinstance(rule, PrefixChange)
        ]

    def rename(name: str) -> str:
        for rule in rules:
            name = rule.rename_source_key(name)[0]
        return name

    return rename


def _with_head(expected: nn.Module, pairs: Pairs) -> Iterator[tuple[str, Tensor]]:
    """A tied head is packed by itself, so it is loaded by itself."""
    parameters = dict(expected.named_parameters(remove_duplicate=False))
    head = parameters.get("lm_head.weight")
    for name, tensor in pairs:
        yield name, tensor
        if name != "lm_head.weight" and parameters.get(name, name) is head:
            yield "lm_head.weight", tensor


def scale_logits(model: nn.Module, temperature: Callable[[], float]) -> None:
    """From now on the logits are divided by `temperature()` before vLLM sees them, so that its
    log-probs are those of the sampling temperature, and before top-p and top-k: the trainer's."""

    def scale(_module: Any, _inputs: Any, logits: Tensor | None) -> Tensor | None:
        # In float32, since another rounding to bfloat16 would be another policy.
        if logits is None or temperature() == 1.0:
            return logits
        return logits.float() / temperature()

    for module in model.modules():
        if is_a(module, "LogitsProcessor"):  # its output are the logits that are sampled
            module.register_forward_hook(scale)
