"""What happens to the policy between two rollouts: log-probs of the samples, optimizer steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchrft.algorithms.aggregation import Denominators, token_mean
from torchrft.algorithms.corrections import mismatch
from torchrft.algorithms.losses import policy_loss
from torchrft.algorithms.presets import resolve
from torchrft.config.job_config import Algorithm, Rollout, Training
from torchrft.data.packing import build, plan
from torchrft.optim.optimizer import clip_gradients
from torchrft.parallel import set_gradient_sync
from torchrft.tools.distributed import all_reduce_max, all_reduce_sum, get_world_size
from torchrft.types import RolloutBatch


class PolicyUpdate:
    """Trains `policy` on rollouts; every number it reports is global over ranks.

    `max_len` and `max_response_length` are those of the job; `reduce_every_micro_batch` is False
    for ZeRO stage 1, where gradients stay local until the last micro-batch of an optimizer step.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        training: Training,
        rollout: Rollout,
        algorithm: Algorithm,
        max_norm: float,
        max_len: int,
        max_response_length: int,
        reduce_every_micro_batch: bool,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.optimizer, self.scheduler = optimizer, scheduler
        self.training, self.rollout, self.algorithm = training, rollout, algorithm
        self.preset = resolve(algorithm)
        self.max_norm, self.max_len = max_norm, max_len
        self.max_response_length = float(max_response_length)
        self.reduce_every_micro_batch = reduce_every_micro_batch

    def with_logprobs(self, batch: RolloutBatch) -> RolloutBatch:
        """Adds the log-probs of the reference, and of the policy where they are needed.

        With a single optimizer step on the batch, the policy's own log-probs in that step are the
        old ones, so no pass of their own is spent on them.
        """
        ref = None if self.reference is None else self.logprobs(self.reference, batch)
        once = self.training.max_epochs == 1 and len(self._steps(len(batch))) == 1
        old = None if once else self.logprobs(self.policy, batch)
        return replace(batch, ref_logprobs=ref, old_logprobs=old)

    @torch.no_grad()
    def logprobs(self, model: nn.Module, batch: RolloutBatch) -> Tensor:
        """Log-probs float32 [B, T] of the response tokens under `model`, zero elsewhere."""
        width = batch.mask.shape[1]
        out = torch.zeros_like(batch.rollout_logprobs)
        samples = self.rollout.micro_rollout_batch_size
        for rows, counted in self._micro_batches(batch, list(range(len(batch))), samples):
            micro = build(batch, rows, self.training.packing_samples, width)
            values, _ = model(micro)
            if counted:
                out[rows] = micro.scatter(values, width)
        return out

    def run(self, batch: RolloutBatch) -> dict[str, float]:
        """All optimizer steps on a rollout: `max_epochs` passes in steps of train_batch_size.

        Returns means over the steps, and how many steps were taken and skipped.
        """
        sums: Counter[str] = Counter()
        worst, steps, skipped = 0.0, 0, 0
        for _ in range(self.training.max_epochs):
            for rows in self._steps(len(batch)):
                steps += 1
                metrics = self._optimizer_step(batch, rows)
                skipped += int(metrics.pop("skipped"))
                worst = max(worst, metrics.pop("mismatch/logprob_abs_max"))
                sums.update(metrics)
        result = {name: value / steps for name, value in sums.items()}
        result["mismatch/logprob_abs_max"] = worst
        result["update/optimizer_steps"], result["update/skipped_steps"] = steps, skipped
        return result

    def _steps(self, samples: int) -> list[list[int]]:
        size = self.training.train_batch_size // get_world_size()
        # At the end of a run, less than a full batch may be left.
        return [list(range(start, min(start + size, samples))) for start in range(0, samples, size)]

    def _optimizer_step(self, batch: RolloutBatch, rows: list[int]) -> dict[str, float]:
        """One step on the samples `rows` of this rank, together with the other ranks'.

        A step with no response token, or whose loss or gradient is not finite, changes nothing but
        the schedule; all ranks agree on that because they compare global numbers.
        """
        lr = float(self.scheduler.get_last_lr()[0])
        denominators = self._denominators(batch.mask[rows])
        sums: dict[str, Tensor] = {}
        worst = torch.zeros((), device=batch.mask.device)
        micro_batches = list(self._micro_batches(batch, rows, self.training.micro_train_batch_size))
        for index, (micro_rows, counted) in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            set_gradient_sync(self.policy, last or self.reduce_every_micro_batch)
            loss, metrics, largest = self._loss(batch, micro_rows, counted, denominators)
            # FSDP2 averages gradients over ranks; the denominators ask for their sum.
            (loss * get_world_size()).backward()
            worst = torch.maximum(worst, largest)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        norm = float(clip_gradients(self.policy, self.max_norm))
        totals = all_reduce_sum({name: float(value) for name, value in sums.items()}, "update")
        totals.update(all_reduce_max({"mismatch/logprob_abs_max": float(worst)}, "update"))
        usable = denominators.tokens > 0 and _finite(norm) and _finite(totals["policy/loss"])
        if usable:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**totals, "grad_norm": norm, "lr": lr, "skipped": float(not usable)}

    def _denominators(self, mask: Tensor) -> Denominators:
        local = Denominators.of(mask)
        counts = {"tokens": local.tokens, "sequences": local.sequences}
        total = all_reduce_sum(counts, "update")
        return Denominators(total["tokens"], total["sequences"], self.max_response_length)

    def _loss(
        self, batch: RolloutBatch, rows: list[int], counted: bool, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, metrics and largest mismatch of one micro-batch; all zero if it is not counted."""
        width = batch.mask.shape[1]
        micro = build(batch, rows, self.training.packing_samples, width)
        values, entropies = self.policy(micro)
        logprobs = micro.scatter(values, width)
        entropy = micro.scatter(entropies.detach(), width)
        part = batch.select(rows)
        mask = part.mask if counted else torch.zeros_like(part.mask)
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        assert part.advantages is not None
        loss, metrics = policy_loss(
            self.preset.policy_loss,
            logprobs,
            old,
            part.advantages,
            mask,
            loss_aggregation=self.preset.loss_aggregation,
            ref_logprobs=part.ref_logprobs,
            kl_estimator=self.algorithm.kl_estimator,
            init_kl_coef=self.algorithm.init_kl_coef,
            denominators=denominators,
            clip_range=self.algorithm.clip_range,
            clip_range_higher=self.algorithm.clip_range_higher,
        )
        drift, worst = mismatch(old, part.rollout_logprobs, mask, denominators)
        metrics.update(drift)
        metrics["policy/entropy"] = token_mean(entropy, mask, denominators)
        return loss, metrics, worst

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
        for index in range(count):
            if index < len(bins):
                yield bins[index], True
            else:
                yield rows[:1], False


def _finite(value: float) -> bool:
    return value - value == 0.0
