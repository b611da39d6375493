"""Learning-rate schedule: linear warm-up, then decay."""

import torch

from torchrft.config.job_config import Optimizer
from torchrft.config.start import lr_factor as lr_factor


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over `total_steps` optimizer steps, for every parameter group."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, total_steps, config)
    )
