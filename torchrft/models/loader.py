"""Models and tokenizers from a Hugging Face folder or hub id."""

import copy
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from torchrft.models import attention
from torchrft.models.support import (
    attention_of,
    auto_class,
    from_config,
    refuse_unsupported,
    register_code,
    with_attention,
)
from torchrft.tools.hub import hub_fault, trusts_code_of
from torchrft.tools.logging import logger


def load_config(source: str) -> PreTrainedConfig:
    """The model's config, set to torchrft's attention function.

    Raises ValueError when `source` is neither a folder with a config nor a reachable hub id, and
    for a model of quantized weights.
    """
    return with_attention(read_config(source, "pretrain ="), attention.NAME)


def read_config(source: str, what: str) -> PreTrainedConfig:
    """The config as it is in `source`, which is a `what`, for errors. Raises as `load_config`."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusts_code_of(source))
    except Exception as error:  # the classes of configs raise what they like
        raise ValueError(_not_found(source, "config.json", error, what)) from error
    _tell_of_code(source, getattr(config, "auto_map", None))
    if trusts_code_of(source):
        register_code(config, source)
    else:
        _forget_code_of_parts(config)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f'{what} "{source}" has quantized weights (quantization_config in its config.json), '
            "which torchrft does not support: use the model in bfloat16"
        )
    return config


def load_model(
    source: str,
    init: str = "pretrained",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    use: str = "policy",
) -> PreTrainedModel:
    """A language model in `dtype` on the CPU, with its vision tower if it has one: the weights of
    `source`, or fresh ones drawn by `seed`.

    Fresh weights depend on the config and the seed only, so every rank draws the same. `use` is
    "policy", "critic" (whose head is of no use), or "engine": weights for an engine that has code
    of its own, so that they may be of any family.
    Raises ValueError for a model that torchrft does not support, before weights are loaded; when
    there are none to load, the files cannot be read, or weights are missing from them or have
    another shape.
    """
    config = load_config(source)
    if use != "engine":
        refuse_unsupported(config, head=use == "policy")
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = from_config(config, dtype=dtype)
            return model
    options = {
        "dtype": dtype,
        "attn_implementation": attention_of(config, "eager" if use == "engine" else attention.NAME),
    }
    try:
        return read_weights(auto_class(config), source, "pretrain =", config, **options)
    except OSError as error:
        remedy = '; [model] init = "random" makes fresh ones'
        raise ValueError(_not_found(source, "weights", error) + remedy) from error


def read_weights(
    auto: Any, source: str, what: str, config: PreTrainedConfig, **options: Any
) -> PreTrainedModel:
    """The model that an Auto class reads from `source`, which is a `what`, for errors.

    A buffer that the files lack keeps the value that transformers gives it, and a warning names it.
    Raises OSError where there are no weights, ValueError for a damaged file, other shapes and
    missing weights.
    """
    options |= {"output_loading_info": True, "trust_remote_code": trusts_code_of(source)}
    try:
        model, info = auto.from_pretrained(source, config=config, **options)
    except pickle.UnpicklingError as error:  # it holds more than tensors: code, say
        lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
        names = ", ".join(path.name for path in sorted(Path(source).glob("*.bin"))) or "a file"
        raise ValueError(
            f'the weights of {what} "{source}" are damaged or were forged: {names} holds more than '
            f"tensors ({(lines or ['it cannot be read'])[0]:.150}); use a model of safetensors"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f'the weights of {what} "{source}" do not load: {error}') from error
    buffers = dict(persistent_buffers(model)).keys() & info["missing_keys"]
    for missing, of in (info["missing_keys"] - buffers, "weights"), (buffers, "buffers"):
        text = f'{what} "{source}" lacks {of} of the model: {", ".join(sorted(missing)[:3])}, …'
        if missing and of == "weights":
            raise ValueError(text)
        if missing:
            logger.warning(f"{text}; they keep the values that transformers gives new models")
    return model


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the buffers that `state_dict`, and so the files, hold beside parameters:
    trained constants, as a router's correction bias. Rotary tables and the like are not among them.
    """
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def expected_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """On the meta device: names, shapes, ties and dtypes of what `from_pretrained(dtype=dtype)`
    holds. Some tensors stay float32 in a bfloat16 model (`_keep_in_fp32_modules_strict`)."""
    with torch.device("meta"):
        model: Any = from_config(copy.deepcopy(config), dtype=dtype)
    kept = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model)):
        if tensor.is_floating_point() and any(re.search(pattern, name) for pattern in kept):
            tensor.data = tensor.data.float()
    return model


def cast_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives persistent buffers the dtype that they have in a model loaded to compute in `dtype`."""
    if buffers := dict(persistent_buffers(model)):
        expected = dict(persistent_buffers(expected_model(model.config, dtype)))
        for name, buffer in buffers.items():
            buffer.data = buffer.to(expected[name].dtype)


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A model of that config on `device`, its weights still to be filled in (they are 0)."""
    config = with_attention(config, attention.NAME)
    with parameters_on_meta():  # where drawing them costs nothing
        model: Any = from_config(config, dtype=dtype)
    cast_buffers(model, dtype)
    materialize(model.modules(), torch.device(device))
    return model.to(device)


def materialize(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Gives the modules' own parameters memory on `device`, of zeros; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                zeros = torch.zeros_like(old, device=device)
                made[id(old)] = nn.Parameter(zeros, requires_grad=old.requires_grad)
            module.register_parameter(name, made[id(old)])


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises ValueError when there is none or it has no end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusts_code_of(source))
    except Exception as error:  # its files may hold anything
        raise ValueError(_not_found(source, "tokenizer", error)) from error
    _tell_of_code(source, tokenizer.init_kwargs.get("auto_map"))
    if len(tokenizer.get_vocab()) == len(tokenizer.get_added_vocab()):
        # For some architectures transformers makes an empty tokenizer when there are no files.
        raise ValueError(_not_found(source, "tokenizer"))
    if tokenizer.eos_token_id is None:
        raise ValueError(f'the tokenizer of "{source}" has no eos_token: set one in its config')
    return tokenizer


def stop_token_ids(model_config: PreTrainedConfig, source: str, eos: int) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer, the model's config and its generation config.

    Raises ValueError for a generation config that cannot be read.
    """
    found: set[int] = {eos}
    generation, local = None, Path(source).is_dir()
    if not local or (Path(source) / "generation_config.json").exists():
        try:
            generation = GenerationConfig.from_pretrained(source)
        except Exception as error:  # its values may be anything
            if local or not isinstance(error, OSError):  # hub models need not have one
                raise ValueError(_not_found(source, "generation_config.json", error)) from error
    for config in (model_config, model_config.get_text_config(), generation):
        value = getattr(config, "eos_token_id", None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise ValueError(f'"{source}" has eos_token_id = {value!r}: it must be token ids')
        found.update(ids)
    return tuple(sorted(found))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters go to the meta device as they are made; buffers are real."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook: Any = on_meta  # torch declares its return type too narrowly
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _tell_of_code(source: str, auto_map: object) -> None:
    if auto_map and not trusts_code_of(source):
        logger.warning(
            f'"{source}" comes with Python code, which does not run: transformers has classes of '
            "its own for this model; trust_remote_code = true runs the code instead"
        )


def _forget_code_of_parts(config: PreTrainedConfig) -> None:
    """Of towers, say: transformers would ask whether to run it, as it makes their models."""
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            part.__dict__.pop("auto_map", None)
            _forget_code_of_parts(part)


def _not_found(
    source: str, file: str, error: Exception | None = None, what: str = "pretrain ="
) -> str:
    fault = hub_fault(source, error) if error is not None else None
    said = "" if error is None or isinstance(error, OSError) else " ".join(str(error).split())[:200]
    reason = f" ({said})" if said else ""
    return fault or f'{what} "{source}" holds no {file} that transformers can read{reason}'
