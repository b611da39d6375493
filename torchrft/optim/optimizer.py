"""AdamW over the parameters of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchrft.config.job_config import Optimizer


def build_optimizer(model: nn.Module, config: Optimizer, lr: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with weight decay `l2` on matrices only, not on biases and norms.

    Frozen parameters are left out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.l2},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=config.adam_betas, fused=True
    )
    for parameter in trained:
        # AdamW would make the same at its first step. Made here, a checkpoint before that step has
        # it too, and torch.distributed.checkpoint need not take a trial step to get it.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their joint L2 norm is at most `max_norm`.

    Returns the norm before, a float32 scalar equal on all ranks: for sharded parameters it is that
    of the whole gradient. A norm that is not finite leaves the gradients as they are.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if bool(norm.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
