"""`deepspeed.ops.adam`: DeepSpeed's Adam optimizers as what they compute, by torch.optim.AdamW."""

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.AdamW):
    """AdamW, or with `adam_w_mode=False` Adam, with DeepSpeed's defaults: no weight decay.

    Raises ValueError for options that torch.optim does not compute.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        **options: Any,
    ) -> None:
        if not bias_correction:
            raise ValueError(
                f"{type(self).__name__}(bias_correction=False) is not supported: torch.optim "
                "always corrects the bias; leave it out"
            )
        if amsgrad:
            raise ValueError(
                f"{type(self).__name__} has no amsgrad, as in DeepSpeed: use "
                "torch.optim.AdamW(..., amsgrad=True)"
            )
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, **options)
        for group in (self.defaults, *self.param_groups):
            group["decoupled_weight_decay"] = adam_w_mode


class DeepSpeedCPUAdam(FusedAdam):
    """`FusedAdam` under the names that DeepSpeed's optimizer for host memory has."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(
            model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad
        )


def adam_of(options: dict[str, Any], forces_adamw: bool) -> Callable[[Any], torch.optim.Optimizer]:
    """The optimizer that the section `optimizer` with type Adam or AdamW asks for."""
    options = dict(options)
    decoupled = options.pop("adam_w_mode", True) or forces_adamw
    torch_adam = options.pop("torch_adam", False)
    for meaningless in ("fp32_optimizer_states", "fused", "foreach", "bias_correction"):
        options.pop(meaningless, None)
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if torch_adam:
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return lambda parameters: kind(parameters, **options)
    return lambda parameters: FusedAdam(parameters, adam_w_mode=decoupled, **options)
