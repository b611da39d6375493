"""Refuses models whose log-probs torchrft would compute otherwise than transformers does.

There is no list of families. A model is made from its config on the meta device, where weights cost
neither memory nor time, and its decoder runs once under an attention function that looks at every
call: does it bring the layout, and is its mask causal, within the window that it names? The code
around the head runs on real numbers. So a model is judged before weights are loaded.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from torchrft.models.logit_form import PLAIN, LogitForm, probed_form
from torchrft.models.mixers import cache_name
from torchrft.parallel.modules import MIXED, decoder_layers
from torchrft.tools.hub import trusts_code_of

_NAME = "torchrft_probe"
_WITHOUT = {"mlp", "moe"}  # layers that mix no tokens
_LAYER_TYPES = {"full_attention", "sliding_attention", *MIXED, *_WITHOUT}
_OFFSET = 8  # some tables of positions hold a few rows more than there are positions


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a model of that config has a vision tower beside its language model."""
    return hasattr(config, "vision_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that makes the whole model of that config, its vision tower included."""
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def from_config(config: PreTrainedConfig, auto: Any = None, **options: Any) -> Any:
    """A new model of that config, by an Auto class: by default `auto_class` of it.

    Its class may be code that came with the config if that is trusted, else it is transformers'.
    """
    auto = auto or auto_class(config)
    return auto.from_config(
        config, trust_remote_code=trusts_code_of(config.name_or_path), **options
    )


def register_code(config: PreTrainedConfig, source: str) -> None:
    """Makes the body known that came with a trusted config of a class of its own: where a model
    with a head makes it, transformers would ask whether it may.

    Raises ValueError for code that does not load.
    """
    body = (getattr(config, "auto_map", None) or {}).get("AutoModel")
    if body and not type(config).__module__.startswith("transformers."):
        AutoModel.register(type(config), _load_class(body, source), exist_ok=True)


def _load_class(reference: str, source: str) -> Any:
    try:
        return get_class_from_dynamic_module(reference, source)
    except Exception as error:  # the code may raise anything
        told = f"does not load: {type(error).__name__}: {error}"
        raise ValueError(f'the code of "{source}" {told}') from error


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that `from_config` makes a model of. Raises ValueError if there is none."""
    auto = auto_class(config)
    custom = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    source = config.name_or_path
    if custom and source and trusts_code_of(source):
        return _load_class(custom, source)
    if type(config) not in auto._model_mapping:
        raise ValueError(f"a {config.model_type} model is no causal language model: take another")
    return auto._model_mapping[type(config)]


def attention_of(config: PreTrainedConfig, name: str) -> str | dict[str, str]:
    """The attention function `name` for the language model alone: what a vision tower attends to is
    its own affair."""
    if not sees_images(config):
        return name
    text = config.get_text_config()
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {key: name if part is text else "sdpa" for key, part in parts.items() if part}


def with_attention(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A copy of the config, set to `attention_of` it."""
    config = copy.deepcopy(config)  # transformers writes the name into the very object it is given
    config._attn_implementation = attention_of(config, name)
    return config


@dataclass(frozen=True)
class _Verdict:
    """What a model of a config is."""

    kind: str  # its class
    faults: tuple[str, ...] = ()  # of the decoder, each a predicate of that class
    head_faults: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # of all calls of attention, in their order
    limit: int | None = None  # tokens of the longest sequence
    form: LogitForm = PLAIN
    changes_scores: bool = False
    mixers: tuple[str, ...] = ()  # names in the decoder


_VERDICTS: dict[tuple[type, str], _Verdict] = {}


def refuse_unsupported(
    config: PreTrainedConfig,
    max_len: int | None = None,
    cache: bool = False,
    head: bool = True,
    kind: Any = None,
) -> int | None:
    """The most tokens that a sequence of such a model may have; None if there is no limit.

    There is one where positions are rows of a learned table, and where rotary frequencies depend on
    the longest sequence of a call ("longrope", "dynamic"), so that samples would change each other.

    Args: max_len, tokens of the longest sequence, if known; cache, for the native engine, whose KV
        cache takes one call of attention per layer; head, false where the logits are of no use;
        kind, the model's class, by default the one that the Auto class makes.
    Raises ValueError for a model that would give other log-probs than transformers' own forward of
    each sample alone, and for a max_len beyond the limit.
    """
    verdict = _verdict(config, kind)
    faults = [*verdict.faults, *(verdict.head_faults if head else ())]
    if cache and not faults and verdict.layers != tuple(sorted({*verdict.layers})):
        faults = ['calls attention several times a layer (engine_type = "vllm" may know it)']
    if cache and not faults and not verdict.layers:
        faults = ['has no attention for a KV cache (engine_type = "vllm" may know it)']
    if faults:
        raise ValueError(
            f"{verdict.kind} {' and '.join(faults)}, which torchrft does not support; use a model "
            "of another family"
        )
    if max_len is not None:
        check_length(max_len, verdict.limit, verdict.kind, "max_len = ")
    return verdict.limit


def logit_form(config: PreTrainedConfig, kind: Any = None) -> LogitForm:
    """What a supported model does to the logits of its head; `kind` as in `refuse_unsupported`."""
    return _verdict(config, kind).form


def mixers(config: PreTrainedConfig, kind: Any = None) -> tuple[str, ...]:
    """Names in the decoder of what mixes tokens without attention, in a supported model."""
    return _verdict(config, kind).mixers


def changes_scores(config: PreTrainedConfig, kind: Any = None) -> bool:
    """Whether attention gets a `ScoreChange` in a supported model."""
    return _verdict(config, kind).changes_scores


def _verdict(config: PreTrainedConfig, kind: Any) -> _Verdict:
    kind = kind or _model_class(config)
    key = kind, config.to_json_string(use_diff=False)
    if key not in _VERDICTS:
        _VERDICTS[key] = _judge(config, kind)
    return _VERDICTS[key]


def check_length(length: int, limit: int | None, kind: str, name: str = "a sequence of ") -> None:
    """Raises ValueError for `length` tokens of a sequence beyond the limit of the class `kind`."""
    if limit is not None and length > limit:
        raise ValueError(
            f"{name}{length} tokens is more than the {limit} that {kind} takes here: longer ones "
            "are beyond its table of positions, or change the rotary frequencies of all samples "
            f"in their batch; set max_len = {limit} or less"
        )


def _judge(config: PreTrainedConfig, kind: Any) -> _Verdict:
    probe = _Probe()
    try:
        probed = with_attention(config, _NAME)
        text = probed.get_text_config()
        types = set(getattr(text, "layer_types", None) or ())
        unknown = sorted(types - _LAYER_TYPES)
        # Hybrids may not say that they are, since their mixers are not.
        if unknown or not (types & MIXED or kind.is_backend_compatible()):
            what = ", ".join(unknown) or "attention code of its own"
            return _Verdict(kind.__name__, (f"uses {what}",))
        text._experts_implementation = "batched_mm"  # the one whose sizes do not depend on values
        with torch.device("meta"):
            model = kind(probed).eval()
        decoder = model.get_decoder()
        try:
            faults = probe.faults_of(decoder, text, "meta")
        except (
            NotImplementedError,
            RuntimeError,
        ):  # its layers look at numbers, as to route tokens
            decoder._apply(_zeros)
            faults = probe.faults_of(decoder, text, "cpu")
    except _Unsupported as fault:
        faults = (str(fault),)
    except Exception as error:  # a model's code may raise anything
        first = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        what = f"does not run on its own ({type(error).__name__}: {first})"
        return _Verdict(kind.__name__, (what,))
    limits = [rope_limit(text), _table_limit(decoder, model.get_input_embeddings(), text)]
    limit = min((n for n in limits if n is not None), default=None)
    form = probed_form(model, text)
    heads = () if isinstance(form, LogitForm) else (form,)
    form = form if isinstance(form, LogitForm) else PLAIN
    layers, changed = tuple(probe.layers), probe.changes_scores
    return _Verdict(kind.__name__, faults, heads, layers, limit, form, changed, probe.mixers)


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros of that shape on the CPU; those of a parameter are all the same number in memory."""
    if isinstance(tensor, nn.Parameter):
        return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
    return torch.zeros_like(tensor, device="cpu")


class _Probe:
    """A layout that computes nothing and judges each call of the attention function."""

    def __init__(self) -> None:
        self.layers: list[int] = []  # of attention
        self.attention: set[Any] = set()
        self.mixers: tuple[str, ...] = ()
        self.changes_scores = False

    @torch.no_grad()
    def faults_of(self, decoder: nn.Module, text: Any, device: str) -> tuple[str, ...]:
        """Runs the decoder. Raises _Unsupported."""
        self.layers.clear()
        told: dict[nn.Module, bool] = {}  # whether it got the layout
        several: list[nn.Module] = []

        def note(module: nn.Module, _: Any, options: dict[str, Any], out: Any) -> None:
            told[module] = options.get("layout") is self
            if not isinstance(out, Tensor):
                several.append(module)

        blocks = {*decoder_layers(decoder)}
        cached = {m: n for n, m in decoder.named_modules() if m not in blocks and _may_mix(m)}
        for module in cached:
            module.register_forward_hook(note, with_kwargs=True)
        with torch.device(device):
            ids = torch.zeros(1, 5, dtype=torch.long)
            options: dict[str, Any] = {"use_cache": False, "layout": self}
            options["attention_mask"] = torch.ones_like(
                ids
            )  # so that no packed rows are looked for
            decoder(input_ids=ids, position_ids=ids.clone(), **options)
        found: list[Any] = [module for module in told if module not in self.attention]
        self.mixers = tuple(cached[module] for module in found)
        for module in found:
            if not told[module]:
                name = type(module).__name__
                return (f"does not pass `layout` on to {name}, so that packed samples would mix",)
            if module in several:
                return (f"mixes tokens in {type(module).__name__} and returns more than they are",)
        return self._gaps(decoder, text, found)

    def _gaps(self, decoder: Any, text: Any, found: list[Any]) -> tuple[str, ...]:
        """What may mix tokens and is neither attention nor a mixer."""
        count = text.num_hidden_layers
        types = getattr(text, "layer_types", None) or [""] * count
        plain = {layer for layer in range(count) if types[layer] in _WITHOUT}
        mixed = {*self.layers, *(module.layer_idx for module in found)}
        if not mixed >= {*range(count)} - plain:
            return (f"has {len(mixed)} of {count} layers with attention",)
        layer_parts = [p for layer in decoder_layers(decoder) for p in layer.parameters()]
        if len({*layer_parts}) < len(layer_parts):
            return ("shares weights among its layers",)
        inside = {m for module in found for m in module.modules()}
        layers = getattr(decoder, "layers", decoder)
        if any(isinstance(m, nn.Conv1d) for m in layers.modules() if m not in inside):
            return ("mixes tokens by convolution in its attention",)
        return ()


def _may_mix(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and cache_name(module) is not None


class _Unsupported(Exception):
    """A reason, as a predicate of the model's class."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    layout: _Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of the probe. Raises _Unsupported."""
    name = type(module).__name__
    if layout is None:
        raise _Unsupported(f"does not pass `layout` on to {name}, so that packed samples would mix")
    layout.changes_scores |= any(kwargs.get(n) is not None for n in ("softcap", "s_aux"))
    bent = [n for n in ("sinks", "position_bias") if kwargs.get(n) is not None]
    if bent:
        raise _Unsupported(f"uses {', '.join(bent)} in {name}")
    whole = getattr(attention_mask, "_base", None)  # of which it may be a view
    rule = getattr(attention_mask if whole is None else whole, "rule", None)
    if query.shape[2] != key.shape[2] or not _is_causal(rule, sliding_window, module.config):
        within = "" if sliding_window is None else f" within sliding_window = {sliding_window}"
        raise _Unsupported(f"has a mask in {name} other than the causal one{within}")
    layout.layers.append(module.layer_idx)
    layout.attention.add(module)
    return value.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3]), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any
) -> Tensor:
    """The mask function of the probe: a mask that knows its rule."""
    mask: Any = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
    mask.rule = mask_function
    return mask


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def _is_causal(rule: Any, window: int | None, config: Any) -> bool:
    """Whether the mask is the causal one within `window`, at positions near and far."""
    if not callable(rule):
        return False
    last = getattr(config, "max_position_embeddings", None) or 1 << 20
    near = {window or 0, *(1 << power for power in range(last.bit_length())), last - 2}
    places = {n + step for n in near for step in (-1, 0, 1)}
    at = torch.tensor(sorted(n for n in places if 0 <= n < last), device="cpu")
    query, key = at[:, None], at[None]
    wanted = (key <= query) & (query - key < (window or last))
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    try:
        return torch.equal(rule(zero, zero, query, key), wanted)
    except (RuntimeError, IndexError, TypeError):  # it looks into tensors of the batch
        return False


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Tokens of a sequence from which on it changes the rotary frequencies of its whole call."""
    text: Any = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limits = []
    for kind in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if kind.get("rope_type") == "longrope":
            most = text.max_position_embeddings
            limits.append(kind.get("original_max_position_embeddings", most))
        elif kind.get("rope_type") == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def _table_limit(decoder: nn.Module, embeddings: nn.Module, text: Any) -> int | None:
    """Positions in a learned table of them."""
    most = getattr(text, "max_position_embeddings", None)
    tables = [m for m in decoder.modules() if isinstance(m, nn.Embedding) and m is not embeddings]
    held = most and any(0 <= table.num_embeddings - most <= _OFFSET for table in tables)
    return most if held else None
