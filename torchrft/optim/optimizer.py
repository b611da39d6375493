"""AdamW over the parameters of a model, and the clipping of its gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from torchrft.config.job_config import Optimizer


def build_optimizer(
    model: nn.Module, config: Optimizer, lr: float, master_weights: bool = False
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with weight decay `l2` on matrices only, not on biases and norms.

    Frozen parameters are left out. With `master_weights` the optimizer holds float32 copies of
    parameters of a lower precision, trains those and rounds them back.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.l2},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = MasterAdamW if master_weights else torch.optim.AdamW
    optimizer = kind(
        [group for group in groups if group["params"]], lr=lr, betas=config.adam_betas, fused=True
    )
    dtype = torch.float32 if master_weights else None
    for parameter in trained:
        # AdamW would make the same at its first step. Made here, a checkpoint before that step has
        # it too, and torch.distributed.checkpoint need not take a trial step to get it.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
        }
        if master_weights:
            optimizer.state[parameter]["master"] = parameter.detach().float().clone()
    return optimizer


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose state holds a float32 "master" of each parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in trained]
            names = ("master", "exp_avg", "exp_avg_sq", "step")
            masters, means, squares, steps = ([s[name] for s in states] for name in names)
            gradients = [p.grad.float() for p in trained]
            same = ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")
            options = {name: group[name] for name in same}
            options["beta1"], options["beta2"] = group["betas"]
            adamw(masters, gradients, means, squares, [], steps, **options)
            for parameter, master in zip(trained, masters, strict=True):
                parameter.copy_(master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's, which would round the state to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                self.state[parameter] = dict(state_dict["state"][index])


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their joint L2 norm is at most `max_norm`.

    Returns the norm before, a float32 scalar equal on all ranks: for sharded parameters it is that
    of the whole gradient. A norm that is not finite leaves the gradients as they are.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = _total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if bool(norm.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    # That would return the gradients' dtype, and clip too much or little by its rounding error.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
