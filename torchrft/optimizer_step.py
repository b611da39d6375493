"""Optimizer steps of one model on a rollout, cut into micro-batches and spread over ranks."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from torchrft.algorithms.aggregation import Denominators
from torchrft.config.job_config import Rollout, Training
from torchrft.data.packing import MicroBatch, build, plan
from torchrft.models.vision import Vision
from torchrft.optim.offload import StateOffload
from torchrft.optim.optimizer import clip_gradients
from torchrft.parallel import reshard, set_gradient_sync
from torchrft.tools.distributed import DataRanks, all_reduce_max, get_world_size
from torchrft.tools.progress import each
from torchrft.types import RolloutBatch

# Loss of a micro-batch, whose samples count or not, and metrics that add up to the step's.
Loss = Callable[[MicroBatch, RolloutBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class OptimizerStep:
    """What the policy and the critic share: micro-batches, gradients, the step itself.

    `max_len` bounds a sample's tokens. `reduce_every_micro_batch` is False for ZeRO stage 1, where
    gradients stay local until the last micro-batch of an optimizer step. `ranks` have samples of
    their own (by default all), `tp` ranks share each parameter. With `adam_offload` the optimizer's
    state is on the host between `rest` and `prepare`. `vision` is given where samples may have
    images.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    training: Training
    rollout: Rollout
    max_norm: float
    max_len: int
    reduce_every_micro_batch: bool
    ranks: DataRanks = field(default_factory=DataRanks.all)
    tp: int = 1
    adam_offload: bool = False
    vision: Vision | None = None

    def __post_init__(self) -> None:
        self.offload = StateOffload(self.optimizer) if self.adam_offload else None
        self.gradient_ranks = get_world_size() // self.tp  # that FSDP2 averages gradients over

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state and schedule, sharded as they are."""
        if self.offload is not None:
            self.offload.wait()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        schedule = self.scheduler.state_dict()
        return {"model": model, "optimizer": optimizer, "scheduler": schedule}

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

    def rest(self) -> None:
        """No step is due soon: the optimizer's state may leave the device."""
        if self.offload is not None:
            self.offload.offload()

    def prepare(self) -> None:
        """A step is due soon."""
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
        width = batch.mask.shape[1]
        tables = tuple(torch.zeros_like(batch.rollout_logprobs) for _ in range(outputs))
        samples = self.rollout.micro_rollout_batch_size
        micro_batches = list(self._micro_batches(batch, list(range(len(batch))), samples))
        for rows, counted in each(micro_batches, len(micro_batches), "micro-batches"):
            micro = self._build(batch, rows)
            values = model(micro)
            values = values if isinstance(values, tuple) else (values,)
            if counted:
                for table, value in zip(tables, values, strict=False):
                    table[rows] = micro.scatter(value, width)
        return tables

    def denominators(self, mask: Tensor, max_response_length: float) -> Denominators:
        """Those of `mask` [B, T] over all ranks."""
        local = Denominators.of(mask)
        counts = {"tokens": local.tokens, "sequences": local.sequences}
        total = self.ranks.sum(counts, "update")
        return Denominators(total["tokens"], total["sequences"], max_response_length)

    def run(
        self, batch: RolloutBatch, rows: list[int], loss: Loss, usable: bool = True
    ) -> dict[str, float]:
        """One step on the samples `rows` of this rank, together with the other ranks'.

        A step that is not `usable`, or whose loss or gradient is not finite, changes nothing but
        the schedule; all ranks agree on that because they compare global numbers. Returns the sums
        of the loss's metrics ("max/" names: maxima), "loss", "grad_norm", "lr" and "skipped".
        """
        lr = float(self.scheduler.get_last_lr()[0])
        metrics = self._accumulate(batch, rows, loss)
        reshard(self.model)  # a pass without gradient may have left old weights gathered
        norm = float(clip_gradients(self.model, self.max_norm))
        usable = usable and math.isfinite(norm) and math.isfinite(metrics["loss"])
        if usable:
            if self.offload is not None:
                self.offload.wait()
            self.optimizer.step()
        with warnings.catch_warnings():
            # When the very first step is skipped, torch misses the call of optimizer.step.
            warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")
            warnings.filterwarnings("ignore", message=".*`lr_scheduler.step")
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**metrics, "grad_norm": norm, "lr": lr, "skipped": float(not usable)}

    def evaluate(self, batch: RolloutBatch, rows: list[int], loss: Loss) -> dict[str, float]:
        """The metrics of `run` without gradient or step."""
        with torch.no_grad():
            return {**self._accumulate(batch, rows, loss), "grad_norm": 0.0, "lr": 0.0}

    def _accumulate(self, batch: RolloutBatch, rows: list[int], loss: Loss) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        size = self.training.micro_train_batch_size
        micro_batches = list(self._micro_batches(batch, rows, size))
        counting = each(micro_batches, len(micro_batches), "micro-batches of this optimizer step")
        for index, (micro_rows, counted) in enumerate(counting):
            last = index == len(micro_batches) - 1
            set_gradient_sync(self.model, last or self.reduce_every_micro_batch)
            part = batch.select(micro_rows)
            micro = self._build(batch, micro_rows)
            mask = part.mask if counted else torch.zeros_like(part.mask)
            value, metrics = loss(micro, part, mask)
            if value.requires_grad:
                # FSDP2 averages gradients over ranks; the denominators ask for their sum.
                (value * self.gradient_ranks).backward()
            metrics["loss"] = value.detach()
            for name, term in metrics.items():
                join = torch.maximum if name.startswith("max/") else torch.add
                sums[name] = join(sums[name], term) if name in sums else term
        maxima = {k.removeprefix("max/"): float(v) for k, v in sums.items() if k[:4] == "max/"}
        totals = {name: float(v) for name, v in sums.items() if name[:4] != "max/"}
        totals = self.ranks.sum(totals, "update")
        return totals | (all_reduce_max(maxima, "update") if maxima else {})

    def _build(self, batch: RolloutBatch, rows: list[int]) -> MicroBatch:
        width, packed = batch.mask.shape[1], self.training.packing_samples
        return build(batch, rows, packed, width, self.vision)

    def _micro_batches(
        self, batch: RolloutBatch, rows: list[int], samples: int
    ) -> Iterator[tuple[list[int], bool]]:
        """Rows of each forward pass, and whether they count.

        Every rank runs equally many passes, because a sharded forward is collective: a rank that
        has fewer repeats its first sample uncounted.
        """
        budget = self.training.max_tokens_per_microbatch or samples * self.max_len
        bins = plan(batch, rows, self.training.packing_samples, samples, budget)
        count = int(all_reduce_max({"micro_batches": len(bins)}, "update")["micro_batches"])
        yield from ((part, True) for part in bins)
        yield from [(rows[:1], False)] * (count - len(bins))


class Mean:
    """Means of the metrics of several optimizer steps, without skipped ones; steps are counted."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.largest: dict[str, float] = {}
        self.steps = self.skipped = 0

    def add(self, metrics: dict[str, float], maxima: tuple[str, ...] = ()) -> None:
        self.steps += 1
        skipped = int(metrics.pop("skipped", 0.0))
        self.skipped += skipped
        if skipped and self.steps > self.skipped:
            return  # what a skipped step measured would spoil the others' mean
        if not skipped and self.steps - 1 == self.skipped:
            self.sums.clear()  # the same, for skipped steps before the first good one
            self.largest.clear()
        for name in maxima:
            self.largest[name] = max(self.largest.get(name, 0.0), metrics.pop(name))
        self.sums.update(metrics)

    def result(self) -> dict[str, float]:
        # Without a single good step, the metrics of the bad ones are all there is.
        count = self.steps - self.skipped if self.steps > self.skipped else self.steps
        means = {name: value / count for name, value in self.sums.items()}
        return means | self.largest
