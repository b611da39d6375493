"""DeepSpeed's engine: a sharded model that trains itself step by step."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from torchrft.deepspeed.checkpoint import Checkpoints
from torchrft.deepspeed.comm import get_local_rank
from torchrft.deepspeed.config import Settings, offloads
from torchrft.deepspeed.facts import Facts, TputTimer
from torchrft.deepspeed.utils import optimizers
from torchrft.deepspeed.whole import WholeWeights
from torchrft.deepspeed.zero import mark_sharded
from torchrft.parallel.fsdp import apply_fsdp, reduce_unused, reshard, set_gradient_sync
from torchrft.tools import distributed
from torchrft.tools.logging import logger


class DeepSpeedEngine(Checkpoints, Facts, nn.Module):
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
        self.tput_timer = TputTimer()
        self._in_no_sync = self._in_step = self._in_backward = self._step_applied = False
        self._reduced, self._at_boundary = True, False  # of the last backward pass
        self._backwards = 0  # since the last step
        self._trained: list[nn.Parameter] = []
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
        reduce_unused(model)
        if self.zero_optimization_stage() == 3:
            mark_sharded(model)
        self.module = model
        stage, plain = self.zero_optimization_stage(), dtype == torch.float32
        replicated = stage == 0 and plain and not offloads(settings)
        self.weights = WholeWeights(model, settings.dims.dp_shard, stage < 3, replicated)

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
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.torch_autocast_enabled()
        )
        with autocast:
            outputs = self.module(*args, **kwargs)
        backward = _DirectBackward(self)
        return tree_map(backward.watch, outputs)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Gradients of `loss`, a mean over this rank's micro-batch; ranks are averaged.

        Returns the loss over the number of micro-batches of a step, unless not `scale_wrt_gas`.
        """
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            raise ValueError(
                "engine.backward(loss) needs a tensor of one number, with a gradient: a mean of "
                "what engine(...) has returned"
            )
        scaled = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss
        self._begin_backward()
        self._in_backward = True
        try:
            (scaled * self._rank_factor()).backward(retain_graph=retain_graph)
        finally:
            self._in_backward = False
        self.weights.show_gradients(self._reduced and self.weights.replicated)
        return scaled

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` itself, for `engine.scale(loss).backward()`: without fp16 there is no loss scale.

        A script's own `backward()` divides by the number of micro-batches, as in DeepSpeed.
        """
        return loss

    def _begin_backward(self) -> None:
        """Decides whether the backward pass that begins reduces gradients over ranks."""
        every = self.settings.sharding.reduce_every_micro_batch or not self._managed
        self.weights.show_gradients(False)  # or they would be added once more
        self._at_boundary = self.is_gradient_accumulation_boundary()
        self._reduced = not self._in_no_sync and (every or self._at_boundary)
        set_gradient_sync(self.module, self._reduced)
        self._backwards += 1

    def _rank_factor(self) -> int:
        """What turns the mean over ranks, which FSDP2 takes, into what the config asks for."""
        return self.world_size if self.settings.get("gradient_allreduce_op") == "sum" else 1

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trains on what was accumulated, once a whole batch has been seen."""
        if self.optimizer is None:
            raise ValueError("the engine has no optimizer: set the section optimizer, or pass one")
        if self._in_no_sync:
            raise ValueError("step() within no_sync(): leave it before the last backward()")
        boundary = self.is_gradient_accumulation_boundary() or not self._managed
        if boundary and not self._backwards:
            raise ValueError(
                "step() has seen no backward pass since the last step: call engine.backward(loss); "
                "loss.backward() is seen through a tensor, tuple, list or dict of engine(...)"
            )
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
        self.reload_states()
        self.weights.release()
        parameters = self._trained
        if self._counts_untrained():
            parameters = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:  # as in DeepSpeed: Adam's moments go on
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.grad_norm = float(norm)
        if bool(norm.isfinite()):
            if self.gradient_clipping():
                nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping(), norm)
            optimizer.step()
            self._step_applied = True
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        else:
            self.skipped_steps += 1
        micro_batches = self.settings.accumulation if self._managed else self._backwards
        self._backwards = 0
        self.zero_grad()
        self.weights.gather()
        self.global_steps += 1
        self.global_samples += micro_batches * self.settings.micro_batch_size * self.world_size
        every, step = self.settings.get("steps_per_print"), self.global_steps
        if every and step % every == 0:
            logger.info("step=%d, skipped=%d, lr=%s", step, self.skipped_steps, self.get_lr())

    def _counts_untrained(self) -> bool:
        """Whether the norm counts parameters that the optimizer does not train.

        DeepSpeed's stage 0 clips the model's gradients, its ZeRO and bf16 optimizers their own.
        """
        return self.zero_optimization_stage() == 0 and not self.bfloat16_enabled()

    @property
    def _managed(self) -> bool:
        return self.managed_gradient_accumulation()

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
        """Forgets gradients that no step is waiting for.

        As in DeepSpeed, stages 2 and 3 keep those that are reduced. Raises ValueError between the
        micro-batches of a step, but for stage 2: DeepSpeed then trains on the last one alone.
        """
        if not self._backwards:
            self.weights.show_gradients(False)
            for parameter in (*self.module.parameters(), *self.weights.shards):
                parameter.grad = None
            if self.optimizer is not None:
                type(self.optimizer).zero_grad(self.optimizer, set_to_none=True)
        elif (stage := self.zero_optimization_stage()) != 2:
            if not self._at_boundary:
                raise ValueError(
                    "zero_grad() between the micro-batches of a step would lose the gradients of "
                    f"{self._backwards} of them in ZeRO stage {stage}: leave it out, step() clears "
                    "them"
                )
            if stage < 2:
                self._backwards = 0
                self.zero_grad()

    def adopt(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Makes `optimizer` the engine's; its `zero_grad` becomes the engine's.

        As in DeepSpeed, stages 1 to 3 train what requires gradients now, whatever becomes of that.
        """
        self.optimizer = optimizer
        if optimizer is not None:
            for group in optimizer.param_groups:
                if not self._counts_untrained():
                    group["params"] = [p for p in group["params"] if p.requires_grad]
                self._trained += group["params"]
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
            optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]
            optimizers.add(optimizer)

    def empty_partition_cache(self) -> None:
        """Frees weights that a forward pass has left gathered, in stage 3."""
        if not self.weights.kept:
            reshard(self.module)

    def destroy(self) -> None:
        """DeepSpeed frees buffers and hooks here; this engine has none beside its own."""


class _DirectBackward:
    """A script's own `loss.backward()` through the outputs of one forward pass."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine, self.began = engine, False

    def watch(self, output: Any) -> Any:
        """The same tensor, whose gradient passes through `_Entry`."""
        watched = isinstance(output, Tensor) and output.grad_fn is not None
        return _Entry.apply(output, self) if watched else output

    def enter(self, gradient: Tensor) -> Tensor:
        """The gradient that the model gets.

        Raises ValueError in stage 0, as DeepSpeed does.
        """
        engine = self.engine
        if engine._in_backward:
            return gradient
        if engine.zero_optimization_stage() == 0:
            raise ValueError(
                "loss.backward() is not supported in ZeRO stage 0, as in DeepSpeed: call "
                "engine.backward(loss)"
            )
        if not self.began:
            self.began = True
            engine._begin_backward()
        return gradient * (engine._rank_factor() / engine.gradient_accumulation_steps())


class _Entry(torch.autograd.Function):
    """An identity; a hook on the output itself would also see what another output sends to it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, backward: _DirectBackward) -> Tensor:
        ctx.backward_pass = backward
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.backward_pass.enter(gradients[0]), None
