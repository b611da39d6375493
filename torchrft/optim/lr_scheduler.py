"""Learning-rate schedule: linear warm-up, then decay."""

import math

import torch

from torchrft.config.job_config import Optimizer


def lr_factor(step: int, total_steps: int, config: Optimizer) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total_steps`.

    Rises linearly to 1 over the first ceil(lr_warmup_ratio * total_steps) steps, then follows
    `lr_decay` down to `lr_min_ratio`, where it stays.
    """
    warmup = math.ceil(config.lr_warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_decay == "constant":
        return 1.0
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    shape = 1 - progress if config.lr_decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * shape


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over `total_steps` optimizer steps, for every parameter group."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, total_steps, config)
    )
