"""Optimizer steps of one model on a rollout, cut into micro-batches and spread over ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from torchrft.algorithms.aggregation import Denominators
from torchrft.config.job_config import Rollout, Training
from torchrft.learn.metrics import StepMetrics
from torchrft.learn.packing import MicroBatch, build, plan
from torchrft.optim.offload import StateOffload
from torchrft.optim.optimizer import clip_gradients
from torchrft.parallel import reshard, set_gradient_sync
from torchrft.tools.distributed import DataRanks, all_reduce_max, get_world_size
from torchrft.tools.progress import each
from torchrft.types import RolloutBatch

if TYPE_CHECKING:
    from torchrft.models.vision import Vision


@dataclass
class OptimizerStep:
    """A model with its optimizer: micro-batches, gradients, the step itself.

    An optimizer step on the samples `rows` of this rank, together with the other ranks', is

        for micro in stepper.micro_batches(batch, rows):
            stepper.backward(loss_of(micro))
        stepper.step(metrics)

    `max_len` bounds a sample's tokens, `max_response_length` is what `seq_mean_token_sum_norm`
    divides by. `reduce_every_micro_batch` is False for ZeRO stage 1, where gradients stay local
    until the last micro-batch of an optimizer step. `ranks` have samples of their own (by default
    all), `tp` ranks share each parameter. With `adam_offload` the optimizer's state is on the host
    between `offload_state` and `fetch_state`. `vision` is given where samples may have images.
    `before_change` is called when weights and schedule are about to change.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    training: Training
    rollout: Rollout
    max_norm: float
    max_len: int
    max_response_length: float
    reduce_every_micro_batch: bool
    ranks: DataRanks = field(default_factory=DataRanks.all)
    tp: int = 1
    adam_offload: bool = False
    vision: Vision | None = None
    before_change: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.offload = StateOffload(self.optimizer) if self.adam_offload else None
        self.gradient_ranks = get_world_size() // self.tp  # that FSDP2 averages gradients over

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state and schedule, sharded as they are."""
        if self.offload is not None:
            self.offload.wait()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; options are those of this run.

        The learning rate, its schedule, betas and weight decay may differ from the saved ones.
        """
        options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        peaks = list(self.scheduler.base_lrs)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts)
        self.scheduler.load_state_dict({**state["scheduler"], "base_lrs": peaks})
        # As LambdaLR computes them, so that equal options give equal bits.
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        rates = [peak * factor for peak, factor in zip(peaks, factors, strict=True)]
        self.scheduler._last_lr = rates
        for group, saved, rate in zip(self.optimizer.param_groups, options, rates, strict=True):
            group.update(saved, lr=rate)

    def offload_state(self) -> None:
        """No step is due soon: the optimizer's state may leave the device."""
        if self.offload is not None:
            self.offload.offload()

    def fetch_state(self) -> None:
        """A step is due soon: the optimizer's state must come back."""
        if self.offload is not None:
            self.offload.prefetch()

    def rows(self, samples: int) -> list[list[int]]:
        """This rank's samples of each optimizer step of one pass over a rollout."""
        size = self.training.train_batch_size // self.ranks.size
        # At the end of a run, less than a full batch may be left.
        return [list(range(start, min(start + size, samples))) for start in range(0, samples, size)]

    @torch.no_grad()
    def forward(
        self, model: nn.Module, batch: RolloutBatch, outputs: int = 1
    ) -> tuple[Tensor, ...]:
        """The first `outputs` outputs of `model` for response tokens, float32 [B, T], else 0."""
        tables = tuple(torch.zeros_like(batch.rollout_logprobs) for _ in range(outputs))
        rows, size = list(range(len(batch))), self.rollout.micro_rollout_batch_size
        passes = self._plan_passes(batch, rows, size)
        for members, is_counted in each(passes, len(passes), "micro-batches"):
            micro = build(batch, members, self.training.packing_samples, self.vision)
            values = model(micro)
            values = values if isinstance(values, tuple) else (values,)
            for table, value in zip(tables, values, strict=False):
                if is_counted:
                    table[members] = micro.scatter(value)
        return tables

    def denominators(self, mask: Tensor) -> Denominators:
        """Those of `mask` [B, T] over all ranks."""
        local = Denominators.of(mask)
        counts = {"tokens": local.tokens, "sequences": local.sequences}
        total = self.ranks.sum(counts, "update")
        return Denominators(total["tokens"], total["sequences"], self.max_response_length)

    def micro_batches(self, batch: RolloutBatch, rows: list[int]) -> Iterator[MicroBatch]:
        """The micro-batches of an optimizer step; the last one's gradients are always reduced."""
        passes = self._plan_passes(batch, rows, self.training.micro_train_batch_size)
        count, title = len(passes), "micro-batches of this optimizer step"
        for index, (members, is_counted) in enumerate(each(passes, count, title)):
            set_gradient_sync(self.model, index == count - 1 or self.reduce_every_micro_batch)
            micro = build(batch, members, self.training.packing_samples, self.vision)
            yield micro if is_counted else micro.uncounted()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch's loss."""
        # FSDP2 averages gradients over ranks; the denominators ask for their sum.
        (loss * self.gradient_ranks).backward()

    def step(self, metrics: StepMetrics, has_tokens: bool = True) -> StepMetrics:
        """Clips the gradients and updates the weights. Returns `metrics` with what the step adds.

        A step without tokens that count, or whose loss or gradient is not finite, changes nothing
        but the schedule. All ranks agree on that because they compare global numbers.
        """
        lr = float(self.scheduler.get_last_lr()[0])
        reshard(self.model)  # a pass without gradient may have left old weights gathered
        norm = float(clip_gradients(self.model, self.max_norm))
        applies = has_tokens and math.isfinite(norm) and math.isfinite(metrics.loss)
        self.before_change()
        if applies:
            if self.offload is not None:
                self.offload.wait()
            self.optimizer.step()
        with warnings.catch_warnings():
            # When the very first step is skipped, torch misses the call of optimizer.step.
            warnings.simplefilter("ignore", UserWarning)
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return replace(metrics, grad_norm=norm, lr=lr, skipped=not applies)

    def _plan_passes(
        self, batch: RolloutBatch, rows: list[int], samples: int
    ) -> list[tuple[list[int], bool]]:
        """Rows of each forward pass, and whether they count.

        A sharded forward is collective, so every rank runs the same number of passes: a rank with
        fewer repeats its first sample, which does not count then.
        """
        budget = self.training.max_tokens_per_microbatch or samples * self.max_len
        bins = plan(batch, rows, self.training.packing_samples, samples, budget)
        count = int(all_reduce_max({"micro_batches": len(bins)}, "update")["micro_batches"])
        return [(members, True) for members in bins] + [(rows[:1], False)] * (count - len(bins))
