"""DeepSpeed's module names, so that a script's imports find what this room has, or a sentence."""

import enum
import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from torchrft.deepspeed import accelerator, adam, checkpointing, comm, schedules, utils, zero
from torchrft.deepspeed.config import DeepSpeedConfigError
from torchrft.deepspeed.engine import DeepSpeedEngine
from torchrft.tools.logging import logger

ROOM = "torchrft.deepspeed"


class OffloadDeviceEnum(enum.StrEnum):
    """Where states may lie."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(enum.StrEnum):
    """What `engine.offload_states` may move."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


_ZERO = {
    "Init": zero.Init,
    "GatheredParameters": zero.GatheredParameters,
    "ZeroParamStatus": zero.ZeroParamStatus,
    "register_external_parameter": zero.register_external_parameter,
}
_ADAM = {"FusedAdam": adam.FusedAdam, "DeepSpeedCPUAdam": adam.DeepSpeedCPUAdam}
_MEMORY = {name: getattr(utils, name) for name in ("see_memory_usage", "clip_grad_norm_")}
_ATTRIBUTES = {name: getattr(utils, name) for name in ("recursive_getattr", "recursive_setattr")}
_LOGGING = {"logger": logger, "log_dist": utils.log_dist}
_FP32 = {
    name: getattr(utils, name)
    for name in (
        "get_fp32_state_dict_from_zero_checkpoint",
        "load_state_dict_from_zero_checkpoint",
        "convert_zero_checkpoint_to_fp32_state_dict",
    )
}
_OFFLOAD = {
    "OffloadDeviceEnum": OffloadDeviceEnum,
    "OffloadStateTypeEnum": OffloadStateTypeEnum,
}

FILES: dict[str, ModuleType] = {
    "accelerator": accelerator,
    "accelerator.real_accelerator": accelerator,
    "comm": comm,
    "comm.comm": comm,
    "zero": zero,
    "utils": utils,
    "checkpointing": checkpointing,
    "runtime.activation_checkpointing.checkpointing": checkpointing,
}
"""Modules that a file of this room stands for."""

NAMES: dict[str, dict[str, Any]] = {
    "ops.adam": _ADAM,
    "ops.adam.fused_adam": {"FusedAdam": adam.FusedAdam},
    "ops.adam.cpu_adam": {"DeepSpeedCPUAdam": adam.DeepSpeedCPUAdam},
    "runtime.engine": {"DeepSpeedEngine": DeepSpeedEngine},
    "runtime.config": {"DeepSpeedConfigError": DeepSpeedConfigError},
    "runtime.lr_schedules": {name: schedules.maker(name) for name in schedules.SCHEDULES},
    "runtime.dataloader": {"RepeatingLoader": utils.RepeatingLoader},
    "runtime.utils": _MEMORY,
    "runtime.activation_checkpointing": {"checkpointing": checkpointing},
    "runtime.zero": _ZERO,
    "runtime.zero.partition_parameters": _ZERO,
    "runtime.zero.offload_config": _OFFLOAD,
    "utils.logging": _LOGGING,
    "utils.zero_to_fp32": _FP32,
    "compression.helper": _ATTRIBUTES,
    "constants": {"TORCH_DISTRIBUTED_DEFAULT_PORT": 29500},
}
"""What modules of which there is no file hold."""

_PIPELINE = "pipeline parallelism is not supported: shard with ZeRO stage 3"
_EXPERTS = "experts are not spread over ranks: use a model's own experts with ZeRO stage 3"
_INFERENCE = "inference is not part of this room: use torchrft.rollout.build_engine"
_KERNELS = "DeepSpeed's own layers are not supported: use torch's or transformers'"
_COMPRESSION = "compression is not supported: leave it out"
_OPTIMIZERS = "this optimizer is not supported: use FusedAdam, or one of torch.optim"
_NVME = "swapping to NVMe is not supported: offload to the CPU"

REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "": (_INFERENCE, ("init_inference", "InferenceEngine", "default_inference_config")),
    "pipe": (_PIPELINE, ("PipelineModule", "LayerSpec", "TiedLayerSpec")),
    "runtime.pipe.engine": (_PIPELINE, ("PipelineEngine",)),
    "runtime.pipe.module": (_PIPELINE, ("PipelineModule", "LayerSpec", "TiedLayerSpec")),
    "runtime.pipe.topology": (_PIPELINE, ("ProcessTopology", "PipeModelDataParallelTopology")),
    "moe.layer": (_EXPERTS, ("MoE",)),
    "moe.utils": (
        _EXPERTS,
        ("split_params_into_different_moe_groups_for_optimizer", "is_moe_param"),
    ),
    "inference": (_INFERENCE, ("RaggedInferenceEngineConfig", "DeepSpeedTPConfig")),
    "ops.transformer": (_KERNELS, ("DeepSpeedTransformerLayer", "DeepSpeedTransformerConfig")),
    "ops.sparse_attention": (
        _KERNELS,
        ("SparseSelfAttention", "SparseAttentionUtils", "FixedSparsityConfig"),
    ),
    "ops.lamb": (_OPTIMIZERS, ("FusedLamb",)),
    "ops.lion": (_OPTIMIZERS, ("FusedLion", "DeepSpeedCPULion")),
    "ops.adagrad": (_OPTIMIZERS, ("DeepSpeedCPUAdagrad",)),
    "ops.op_builder": (
        _NVME,
        ("AsyncIOBuilder", "GDSBuilder", "CPUAdamBuilder", "FusedAdamBuilder"),
    ),
    "compression.compress": (_COMPRESSION, ("init_compression", "redundancy_clean")),
    "sequence.layer": (
        "Ulysses attention is not part of this room: use torchrft's sp_size",
        ("DistributedAttention",),
    ),
    "module_inject": (_INFERENCE, ("replace_transformer_layer", "replace_policy")),
    "profiling.flops_profiler": (
        "there is no profiler of operations: use torch.profiler",
        ("FlopsProfiler", "get_model_profile"),
    ),
}
"""Names that scripts import and that end in a sentence when they are called."""


def register(prefix: str) -> None:
    """Makes every module above importable below `prefix`, and others a clear ImportError."""
    top = sys.modules[ROOM]
    sys.modules[prefix] = top
    for name, module in _modules().items():
        sys.modules[f"{prefix}.{name}"] = module
    in_front = not prefix.startswith(ROOM)
    sys.meta_path.insert(0 if in_front else len(sys.meta_path), _Missing(prefix))


def _modules() -> dict[str, ModuleType]:
    """All modules by dotted name, parents included, as attributes of each other."""
    modules: dict[str, ModuleType] = dict(FILES)
    names = {*FILES, *NAMES, *REFUSED} - {""}
    for name in sorted(names | {name.rpartition(".")[0] for name in names if "." in name}):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in modules:
                known = sys.modules.get(f"{ROOM}.{path}")
                modules[path] = known or ModuleType(f"{ROOM}.{path}", "A name of DeepSpeed's.")
            parent = modules[".".join(parts[: depth - 1])] if depth > 1 else sys.modules[ROOM]
            if not hasattr(parent, parts[depth - 1]):
                setattr(parent, parts[depth - 1], modules[path])
    for module in modules.values():
        module.__path__ = []  # what lies below a module is asked of `_Missing`
    for path, attributes in NAMES.items():
        vars(modules[path]).update(attributes)
    for path, (reason, attributes_refused) in REFUSED.items():
        module = modules[path] if path else sys.modules[ROOM]
        for attribute in attributes_refused:
            setattr(module, attribute, _refusal(f"{path}.{attribute}".strip("."), reason))
    return modules


def _refusal(name: str, reason: str) -> Callable[..., NoReturn]:
    """A function, or a class that scripts may test against, which raises when it is called."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"deepspeed.{name}: {reason}")

    last = name.rpartition(".")[2]
    return type(last, (), {"__init__": refuse}) if last[:1].isupper() else refuse


class _Missing(importlib.abc.MetaPathFinder):
    """Refuses what no finder before it has, by a sentence."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.startswith(self.prefix + "."):
            near = ", ".join(sorted({*FILES, *NAMES, *REFUSED} - {""}))
            raise ModuleNotFoundError(
                f"torchrft has no {fullname.replace(self.prefix, 'deepspeed', 1)}, which it does "
                f"not need or cannot do; it has: {near}",
                name=fullname,
            )
