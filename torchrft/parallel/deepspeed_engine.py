"""DeepSpeed's engine: a sharded model that trains itself step by step."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from torchrft.parallel.deepspeed_checkpoint import Checkpoints, WholeWeights
from torchrft.parallel.deepspeed_comm import get_local_rank
from torchrft.parallel.deepspeed_config import Settings, offloads
from torchrft.parallel.deepspeed_zero import sharded_models
from torchrft.parallel.fsdp import apply_fsdp, set_gradient_sync
from torchrft.tools import distributed
from torchrft.tools.logging import logger


class DeepSpeedEngine(Checkpoints, nn.Module):
    """A sharded model with its optimizer and schedule; use `initialize`.

    What the engine has not, is looked up in the model: `engine.generate`, `engine.config`.
    """

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device) -> None:
        super().__init__()
        self.settings, self.device = settings, device
        self.local_rank, self.global_rank = get_local_rank(), distributed.get_rank()
        self.world_size = distributed.get_world_size()
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: Any = None
        self.training_dataloader: DataLoader[Any] | None = None
        self.micro_steps = self.global_steps = self.skipped_steps = self.global_samples = 0
        self.grad_norm: float | None = None
        self._boundary: bool | None = None  # what the script says, if it does
        self._in_no_sync = self._in_step = self._step_applied = False
        self._reduced, self._backwards = True, 0  # since the last step
        model.to(device)
        with torch.no_grad():
            # They need not be equal before, as in DeepSpeed.
            for tensor in (*model.parameters(), *model.buffers()):
                first = tensor.detach().contiguous()
                dist.broadcast(first, 0)
                tensor.copy_(first)
            for parameter in model.parameters():
                if self.bfloat16_enabled() and parameter.is_floating_point():
                    parameter.data = parameter.data.float()  # master weights
        mesh = settings.dims.sharding_mesh(device.type)["dp_replicate", "fsdp"]
        dtype = torch.bfloat16 if self.bfloat16_enabled() else torch.float32
        apply_fsdp(model, mesh, settings.sharding, dtype, offloads(settings))
        sharded_models.add(model)
        self.module = model
        self.weights = WholeWeights(model, settings.dims.dp_shard)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    # ---------------------------------------------------------------- training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        if not self.settings.get("torch_autocast.enabled", False):
            return self.module(*args, **kwargs)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.module(*args, **kwargs)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Gradients of `loss`, a mean over this rank's micro-batch; ranks are averaged.

        Returns the loss over the number of micro-batches of a step, unless not `scale_wrt_gas`.
        """
        every = self.settings.sharding.reduce_every_micro_batch or not self._managed
        self._reduced = not self._in_no_sync and (every or self.is_gradient_accumulation_boundary())
        set_gradient_sync(self.module, self._reduced)
        scaled = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss
        summed = self.settings.get("gradient_allreduce_op", "mean") == "sum"
        (scaled * self.world_size if summed else scaled).backward(retain_graph=retain_graph)
        self._backwards += 1
        return scaled

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trains on what was accumulated, once a whole batch has been seen."""
        if self.optimizer is None:
            raise ValueError("the engine has no optimizer: set the section optimizer, or pass one")
        if self._in_no_sync:
            raise ValueError("step() within no_sync(): leave it before the last backward()")
        boundary = self.is_gradient_accumulation_boundary() or not self._managed
        if boundary and not self._reduced:
            raise ValueError(
                "step() needs the gradients of all ranks: the last backward() before it must be "
                "outside of no_sync(), with set_gradient_accumulation_boundary(True)"
            )
        self._in_step, self._step_applied = boundary, False
        if boundary:
            self._take_step(self.optimizer, dict(lr_kwargs or {}))
        self._in_step = False
        self.micro_steps += 1

    def _take_step(self, optimizer: torch.optim.Optimizer, lr_kwargs: dict[str, Any]) -> None:
        # As in DeepSpeed, what the optimizer does not train counts nowhere.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parameters = [parameter for parameter in trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.grad_norm = float(norm)
        if bool(norm.isfinite()):
            if self.gradient_clipping():
                torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping(), norm)
            optimizer.step()
            self._step_applied = True
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        else:
            self.skipped_steps += 1
        optimizer.zero_grad(set_to_none=True)
        self.zero_grad()
        self.global_steps += 1
        micro_batches = self.settings.accumulation if self._managed else self._backwards
        self.global_samples += micro_batches * self.settings.micro_batch_size * self.world_size
        self._backwards = 0
        every, step = self.settings.get("steps_per_print"), self.global_steps
        if every and step % every == 0:
            logger.info("step=%d, skipped=%d, lr=%s", step, self.skipped_steps, self.get_lr())

    @property
    def _managed(self) -> bool:
        return bool(self.settings.get("managed_gradient_accumulation", True))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` updates the weights; unmanaged, whether one is under way."""
        if self._boundary is not None:
            return self._boundary
        if not self._managed:
            return self._in_step
        return (self.micro_steps + 1) % self.settings.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Takes the boundary into the script's hands; set it before each forward pass."""
        if not self._managed:
            raise ValueError(
                "set_gradient_accumulation_boundary() has no effect with "
                "managed_gradient_accumulation = false: every step() is a boundary"
            )
        self._boundary = is_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within it leave gradients unreduced; stages 0 and 1 only."""
        if (stage := self.zero_optimization_stage()) > 1:
            raise ValueError(
                f"no_sync() does not go with ZeRO stage {stage}, which "
                "shards gradients after every backward pass; use stage 0 or 1, or leave it out"
            )
        self._in_no_sync = True
        try:
            yield
        finally:
            self._in_no_sync = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.zero_grad(set_to_none=set_to_none)

    def destroy(self) -> None:
        """DeepSpeed frees buffers and hooks here; this engine has none beside its own."""

    # ---------------------------------------------------------------- looking at it

    def gradient_accumulation_steps(self) -> int:
        return self.settings.accumulation

    def train_batch_size(self) -> int:
        return self.settings.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.settings.micro_batch_size

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the number of micro-batches of a step."""
        micro = self.settings.micro_batch_size * self.world_size
        if train_batch_size < 1 or train_batch_size % micro:
            raise ValueError(
                f"train_batch_size = {train_batch_size} must be a multiple of "
                f"train_micro_batch_size_per_gpu x ranks = {micro}"
            )
        self.settings.train_batch_size = train_batch_size
        self.settings.accumulation = train_batch_size // micro

    def zero_optimization_stage(self) -> int:
        return int(self.settings.get("zero_optimization.stage", 0))

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def bfloat16_enabled(self) -> bool:
        return any(self.settings.get(f"{name}.enabled", False) for name in ("bf16", "bfloat16"))

    def fp16_enabled(self) -> bool:
        return False

    def gradient_clipping(self) -> float:
        return float(self.settings.get("gradient_clipping", 0.0))

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, over all ranks, before clipping."""
        return self.grad_norm

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        return self._step_applied

    def get_lr(self) -> list[float]:
        return [float(rate) for rate in self._of_groups("lr")]

    def get_mom(self) -> list[Any]:
        """Adam's betas, or the momentum, of every parameter group."""
        return self._of_groups("betas") or self._of_groups("momentum")

    def set_lr(self, lr: float) -> None:
        """Of every parameter group, until a schedule sets it again."""
        for group in self._groups():
            group["lr"] = lr

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def _of_groups(self, name: str) -> list[Any]:
        return [group[name] for group in self._groups() if name in group]
