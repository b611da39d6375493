"""DeepSpeed configs of public form, as DeepSpeed and as torchrft.deepspeed read them.

    pip install deepspeed==0.19.8          # for the comparison; recorded values need none
    DS_ACCELERATOR=cpu python benchmarks/deepspeed_configs.py [--record FILE]

Every config is accepted with DeepSpeed's values, accepted with some keys that have no effect, or
refused with the sentence in the last column. The forms are those of DeepSpeed's examples and of
the programs that train with it ("auto" filled in by the script, as transformers does it). The sizes
are those of one rank. `--record` writes what DeepSpeed makes of them, which the tests compare with.
"""

import argparse
import importlib.metadata
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from common import table
from deepspeed_public_configs import public

RECORDED = Path(__file__).parents[1] / "tests" / "assets" / "deepspeed_configs.json"
Json = dict[str, Any]

# ---------------------------------------------------------------- parts

BATCHES: dict[str, Json] = {
    "total": {"train_batch_size": 16},
    "micro": {"train_micro_batch_size_per_gpu": 4},
    "both": {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8},
    "steps": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8},
    "all": {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 8,
    },
}
AUTO: Json = {  # transformers fills these from its arguments
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FILLED: Json = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16.enabled": True,
    "fp16.enabled": False,
    "optimizer.params.lr": 2e-5,
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.01,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_max_lr": 2e-5,
    "scheduler.params.warmup_num_steps": 10,
    "scheduler.params.total_num_steps": 100,
    "zero_optimization.reduce_bucket_size": 1048576,
    "zero_optimization.stage3_prefetch_bucket_size": 943718,
    "zero_optimization.stage3_param_persistence_threshold": 10240,
}
SCALER: Json = {
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
BUCKETS: Json = {
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
STAGE3: Json = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
HOST: Json = {"device": "cpu", "pin_memory": True}
PRECISION: dict[str, Json] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bfloat16": {"bfloat16": {"enabled": True}},
    "fp16 off": {"fp16": {"enabled": False, **SCALER}},
    "auto": {"fp16": {"enabled": "auto", **SCALER}, "bf16": {"enabled": "auto"}},
    "fp16": {"fp16": {"enabled": True, **SCALER}},
}
ZERO: dict[str, Json] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2, **BUCKETS},
    "2 round robin": {"stage": 2, **BUCKETS, "round_robin_gradients": True},
    "2 host": {"stage": 2, **BUCKETS, "offload_optimizer": HOST},
    "2 old host": {"stage": 2, **BUCKETS, "cpu_offload": True},
    "3": {"stage": 3, **STAGE3},
    "3 host": {"stage": 3, **STAGE3, "offload_optimizer": HOST, "offload_param": HOST},
    "3 state on host": {"stage": 3, **STAGE3, "offload_optimizer": {"device": "cpu"}},
    "3 none": {"stage": 3, "offload_optimizer": {"device": "none"}},
    "3 nvme": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
    "3 hpz": {"stage": 3, "zero_hpz_partition_size": 1},
    "3 quantized": {"stage": 3, "zero_quantized_weights": True},
    "3 quantized gradients": {"stage": 3, "zero_quantized_gradients": True},
}


def adam(kind: str = "AdamW", **params: Any) -> Json:
    """The section optimizer."""
    return {"optimizer": {"type": kind, "params": {"lr": 3e-5, **params}}}


def schedule(kind: str, **params: Any) -> Json:
    """The section scheduler."""
    return {"scheduler": {"type": kind, "params": params}}


AUTO_ADAM = adam(lr="auto", betas="auto", eps="auto", weight_decay="auto")
AUTO_WARMUP = schedule(
    "WarmupLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto"
)
AUTO_DECAY = schedule(
    "WarmupDecayLR",
    warmup_min_lr="auto",
    warmup_max_lr="auto",
    warmup_num_steps="auto",
    total_num_steps="auto",
)
SHORT = {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}


def configs() -> dict[str, Json]:
    """Configs by name."""
    made = {}
    for name, zero in ZERO.items():  # transformers, accelerate, LLaMA-Factory, ms-swift, FastChat
        fp = PRECISION["auto"]
        made[f"auto, zero {name}"] = {**AUTO, **fp, "zero_optimization": zero}
    for name, zero in list(ZERO.items())[:10]:  # with the sections of transformers' documentation
        sections = {**AUTO, **PRECISION["auto"], **AUTO_ADAM, **AUTO_WARMUP}
        made[f"auto sections, zero {name}"] = {**sections, "zero_optimization": zero}
    for batch, sizes in BATCHES.items():  # DeepSpeed's examples
        for name, precision in PRECISION.items():
            if name != "auto":
                made[f"{batch}, {name}"] = {**sizes, **precision, **adam("Adam")}
    made |= public(adam, schedule, AUTO, STAGE3)
    return made | _optimizers() | _schedules() | _features() | _odd()


def _optimizers() -> dict[str, Json]:
    start = BATCHES["both"]
    betas = [0.8, 0.999]
    kinds: dict[str, Json] = {
        "Adam": adam("Adam", betas=betas, eps=1e-8, weight_decay=3e-7),
        "adam in small letters": adam("adam"),
        "AdamW": adam("AdamW", betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1),
        "adamw in small letters": adam("adamw", weight_decay=0.0),
        "Adam with torch_adam": adam("Adam", torch_adam=True, adam_w_mode=True),
        "Adam without decoupling": adam("Adam", adam_w_mode=False, weight_decay=0.01),
        "amsgrad off": adam("Adam", amsgrad=False),
        "bias correction on": adam("Adam", bias_correction=True),
        "bias correction off": adam("Adam", bias_correction=False),
        "max_grad_norm 0": adam("Adam", max_grad_norm=0.0),
        "max_grad_norm 1": adam("Adam", max_grad_norm=1.0),
        "legacy_fusion": {"optimizer": {**adam()["optimizer"], "legacy_fusion": False}},
        "no optimizer": {"zero_allow_untested_optimizer": True},
        "Lamb": adam("Lamb", max_coeff=0.3, min_coeff=0.01),
        "OneBitAdam": adam("OneBitAdam", freeze_step=100, cuda_aware=False),
        "OneBitLamb": adam("OneBitLamb", freeze_step=100),
        "ZeroOneAdam": adam("ZeroOneAdam", var_freeze_step=100),
        "Lion": adam("Lion"),
        "Adagrad": adam("Adagrad"),
        "Muon": adam("Muon", momentum=0.95),
        "SGD": adam("SGD"),
    }
    return {f"optimizer {name}": {**start, **section} for name, section in kinds.items()}


def _schedules() -> dict[str, Json]:
    start = {**BATCHES["total"], **adam("Adam"), "gradient_clipping": 1.0}
    long = {**SHORT, "total_num_steps": 100}
    kinds = {
        "WarmupLR": schedule("WarmupLR", **SHORT),
        "WarmupLR linear": schedule("WarmupLR", **SHORT, warmup_type="linear"),
        "WarmupLR log": schedule("WarmupLR", **SHORT, warmup_type="log"),
        "WarmupDecayLR": schedule("WarmupDecayLR", **long),
        "WarmupDecayLR linear": schedule("WarmupDecayLR", **long, warmup_type="linear"),
        "WarmupCosineLR": schedule(
            "WarmupCosineLR", total_num_steps=100, warmup_num_steps=10, cos_min_ratio=0.1
        ),
        "decay auto": AUTO_DECAY,
        "last_batch_iteration": schedule("WarmupLR", **SHORT, last_batch_iteration=-1),
        "OneCycle": schedule("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3),
        "LRRangeTest": schedule("LRRangeTest", lr_range_test_min_lr=1e-4),
        "null": {"scheduler": None},
    }
    return {f"schedule {name}": {**start, **section} for name, section in kinds.items()}


def _features() -> dict[str, Json]:
    start = {**BATCHES["micro"], **adam(), "bf16": {"enabled": True}}
    parts: dict[str, Json] = {
        "clipping 0": {"gradient_clipping": 0},
        "clipping 0.5": {"gradient_clipping": 0.5},
        "allreduce": {"prescale_gradients": False, "gradient_predivide_factor": 1.0},
        "communication": {"communication_data_type": "fp32"},
        "checkpointing": {
            "activation_checkpointing": {"partition_activations": True, "profile": False}
        },
        "chat example": {
            "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1},
            "tensorboard": {"enabled": False, "output_path": "logs/", "job_name": "step1"},
            "wall_clock_breakdown": False,
        },
        "hybrid engine": {"hybrid_engine": {"enabled": True}},
        "monitors": {"wandb": {"enabled": True, "project": "p"}, "csv_monitor": {"enabled": True}},
        "flops": {"flops_profiler": {"enabled": True, "profile_step": 1, "detailed": True}},
        "comms_logger": {"comms_logger": {"enabled": True, "verbose": False}},
        "torch_autocast": {
            "bf16": {"enabled": False},
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        },
        "grad_accum_dtype": {"data_types": {"grad_accum_dtype": "fp32"}},
        "bf16 states": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "compression off": {
            "compression_training": {
                "weight_quantization": {"shared_parameters": {"enabled": False}},
                "layer_reduction": {"enabled": False, "keep_number_layer": 5},
            }
        },
        "compression": {
            "compression_training": {"layer_reduction": {"enabled": True, "keep_number_layer": 5}}
        },
        "curriculum": {"curriculum_learning": {"enabled": True, "min_difficulty": 8}},
        "curriculum off": {"curriculum_learning": {"enabled": False}},
        "data_efficiency": {"data_efficiency": {"enabled": True, "seed": 1}},
        "layer drop": {"progressive_layer_drop": {"enabled": True, "theta": 0.5}},
        "autotuning": {"autotuning": {"enabled": True, "fast": True}},
        "autotuning off": {"autotuning": {"enabled": False, "arg_mappings": {}}},
        "elasticity": {"elasticity": {"enabled": True, "micro_batch_sizes": [4]}},
        "sparse attention": {"sparse_attention": {"mode": "fixed", "block": 16}},
        "sparse gradients": {"sparse_gradients": True},
        "amp off": {"amp": {"enabled": False, "opt_level": "O1"}},
        "tensor parallel": {"tensor_parallel": {"autotp_size": 4}},
        "tensor parallel off": {"tensor_parallel": {"autotp_size": 1}},
        "sequence parallel": {"sequence_parallel_size": 2},
        "aio": {"aio": {"block_size": 1048576, "queue_depth": 8}},
        "universal": {"checkpoint": {"load_universal": True, "tag_validation": "Warn"}},
        "deepcompile": {"compile": {"deepcompile": True}},
        "compile options": {"compile": {"deepcompile": False, "offload_activation": False}},
        "drop last": {"dataloader_drop_last": True},
        "never print": {"steps_per_print": 10**9},
        "zenflow": {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        "fp8 example": {"comms_config": {"verbose": False}, "monitor_config": {"enabled": True}},
    }
    return {name: {**start, **part} for name, part in parts.items()}


def _odd() -> dict[str, Json]:
    """What people write, and DeepSpeed's older formats."""
    start = BATCHES["total"]
    parts: dict[str, Json] = {
        "zero as true": {"zero_optimization": True, **PRECISION["bf16"]},
        "zero as false": {"zero_optimization": False},
        "comment": {"_comment": "a note", "zero_optimization": {"stage": 1}},
        "old stage 3 names": {
            "zero_optimization": {"stage": 3, "max_live_parameters": 1e9, "cpu_offload": False}
        },
        "cuda_visible_devices": {"cuda_visible_devices": 0, **PRECISION["fp16 off"]},
        "fp16 in quotes": {"fp16": {"enabled": "true"}},
        "fp16 off in quotes": {"fp16": {"enabled": "false"}},
        "bf16 in quotes": {"bf16": {"enabled": "true"}},
        "bf16 as 1": {"bf16": {"enabled": 1}},
        "fp16 and bf16": {**PRECISION["fp16"], **PRECISION["bf16"]},
        "stage 4": {"zero_optimization": {"stage": 4}},
        "torch.compile": {"compile": {"disable": False, "backend": "inductor"}},
        "sizes that do not fit": {"train_micro_batch_size_per_gpu": 3},
        "no size": {"train_batch_size": None},
        "sizes in quotes": {"train_batch_size": "16"},
        "a typing error": {"gradient_acumulation_steps": 2},
    }
    return {name: {**start, **part} for name, part in parts.items()}


def filled(config: Json, start: str = "") -> Json:
    """The config with every "auto" replaced, as a training script does it."""
    made = {}
    for key, value in config.items():
        name = start + key
        if isinstance(value, dict):
            value = filled(value, name + ".")
        made[key] = FILLED[name] if value == "auto" else value
    return made


# ---------------------------------------------------------------- what each makes of them


def by_torchrft(config: Json) -> Json | str:
    """The values, with "notes" on keys without effect, or the sentence of refusal."""
    from torchrft.deepspeed.config import read
    from torchrft.deepspeed.schedules import check_options

    try:
        settings = read(config, 1)
        if (kind := settings.get("scheduler.type")) is not None:
            check_options(kind, settings.judged.section("scheduler.params"))
    except ValueError as error:
        return str(error)
    kind = settings.get("optimizer.type")
    options = settings.judged.section("optimizer.params")
    off = ("bias_correction", "max_grad_norm", "legacy_fusion")
    return {
        "train_batch_size": settings.train_batch_size,
        "micro": settings.micro_batch_size,
        "accumulation": settings.accumulation,
        "clipping": settings.get("gradient_clipping", 1.0),
        "stage": settings.get("zero_optimization.stage", 0),
        "bf16": bool(settings.get("bf16.enabled") or settings.get("bfloat16.enabled")),
        "optimizer": kind and kind.lower(),
        "optimizer_params": {k: v for k, v in options.items() if k not in off},
        "scheduler": settings.get("scheduler.type"),
        "scheduler_params": settings.judged.section("scheduler.params"),
        "notes": len(settings.judged.notes),
    }


def by_deepspeed(config: Json) -> Json | str:
    """The values of DeepSpeed's DeepSpeedConfig, or how its error begins."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        read = DeepSpeedConfig(json.loads(json.dumps(config)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:80]
    off = ("bias_correction", "max_grad_norm", "legacy_fusion")
    options = read.optimizer_params or {}
    return {
        "train_batch_size": read.train_batch_size,
        "micro": read.train_micro_batch_size_per_gpu,
        "accumulation": read.gradient_accumulation_steps,
        "clipping": float(read.gradient_clipping),
        "stage": int(read.zero_optimization_stage),
        "bf16": read.bfloat16_config.enabled,
        "optimizer": read.optimizer_name and read.optimizer_name.lower(),
        "optimizer_params": {k: v for k, v in options.items() if k not in off},
        "scheduler": read.scheduler_name,
        "scheduler_params": read.scheduler_params or {},
    }


def verdict(mine: Json | str, theirs: Json | str | None) -> str:
    """Equal values (with or without meaningless keys), refused, or OTHER, which must not be."""
    if isinstance(mine, str):
        return "refused by both" if isinstance(theirs, str) else "refused"
    if isinstance(theirs, str):  # null, and sections that are off
        return "accepted, DeepSpeed refuses what is off"
    values = {name: value for name, value in mine.items() if name != "notes"}
    if theirs is not None and values != theirs:
        return "OTHER"
    return "equal, some keys meaningless" if mine["notes"] else "equal"


def refusal(*read: Json | str) -> str:
    """The first sentence of refusal there is."""
    return next((values for values in read if isinstance(values, str)), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", nargs="?", const=RECORDED, type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    made = {name: filled(config) for name, config in configs().items()}
    theirs = {name: by_deepspeed(config) for name, config in made.items()}
    mine = {name: by_torchrft(config) for name, config in made.items()}
    verdicts = {name: verdict(mine[name], theirs[name]) for name in made}
    rows = []
    for name, said in verdicts.items():
        differ = said == "OTHER"
        reason = f"{mine[name]} / {theirs[name]}" if differ else refusal(mine[name], theirs[name])
        rows.append([name, said, reason])
    print(table(["config", "verdict", "reason"], rows))
    print(f"{len(made)} configs:", dict(Counter(verdicts.values())))
    if arguments.record:
        version = importlib.metadata.version("deepspeed")
        record = {"deepspeed": version, "values": theirs, "verdicts": verdicts}
        lines = json.dumps(record, indent=1, sort_keys=True)
        arguments.record.write_text(lines + "\n")


if __name__ == "__main__":
    main()
