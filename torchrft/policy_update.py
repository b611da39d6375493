"""What happens to the policy between two rollouts: log-probs of the samples, optimizer steps."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchrft.algorithms.aggregation import Denominators, token_mean
from torchrft.algorithms.corrections import mismatch
from torchrft.algorithms.kl import adapt_coefficient
from torchrft.algorithms.losses import LOSSES, policy_loss
from torchrft.algorithms.options import options_of
from torchrft.algorithms.presets import resolve
from torchrft.algorithms.selection import high_entropy_mask
from torchrft.config.job_config import Algorithm
from torchrft.data.packing import MicroBatch
from torchrft.optimizer_step import Mean, OptimizerStep
from torchrft.types import RolloutBatch


class PolicyUpdate:
    """Trains the policy on rollouts; every number it reports is global over ranks.

    `max_response_length` is what `seq_mean_token_sum_norm` divides by. `kl_coef` and `drift_coef`
    may adapt from rollout to rollout; `state_dict` holds them.
    """

    def __init__(
        self,
        stepper: OptimizerStep,
        reference: nn.Module | None,
        algorithm: Algorithm,
        max_response_length: int,
    ) -> None:
        self.stepper, self.reference, self.algorithm = stepper, reference, algorithm
        self.policy = stepper.model
        self.preset = resolve(algorithm)
        self.loss = LOSSES.get(self.preset.policy_loss)
        own = algorithm.policy_loss_options
        options_of(self.loss, algorithm.model_dump(), own, 4)  # fails early
        self.max_response_length = max_response_length
        self.kl_coef = algorithm.init_kl_coef
        self.drift_coef = algorithm.cpgd_drift_coef

    def with_logprobs(self, batch: RolloutBatch) -> RolloutBatch:
        """Adds the log-probs of the reference, and of the policy where they are needed.

        With a single optimizer step on the batch, the policy's own log-probs in that step are the
        old ones, so no pass of their own is spent on them.
        """
        ref = None if self.reference is None else self.logprobs(self.reference, batch)
        steps = self.stepper.training.max_epochs * len(self.stepper.rows(len(batch)))
        selects = self.algorithm.high_entropy_token_ratio < 1
        old = entropy = None
        if steps > 1 or selects or self.preset.kl_placement == "reward":
            old, entropy = self.stepper.forward(self.policy, batch, outputs=2)
        return replace(batch, ref_logprobs=ref, old_logprobs=old, entropy=entropy)

    def logprobs(self, model: nn.Module, batch: RolloutBatch) -> Tensor:
        """Log-probs float32 [B, T] of the response tokens under `model`, zero elsewhere."""
        return self.stepper.forward(model, batch)[0]

    def waiting(self) -> dict[str, float]:
        """The metrics of a rollout whose samples wait for more: no update, so no numbers."""
        policy = ("loss", "kl", "approx_kl", "entropy", "clip_fraction")
        engine = ("logprob_abs_mean", "logprob_abs_max", "kl", "effective_sample_size")
        names = [*(f"policy/{name}" for name in policy), *(f"mismatch/{name}" for name in engine)]
        lr = float(self.stepper.scheduler.get_last_lr()[0])
        counts = {"update/optimizer_steps": 0.0, "update/skipped_steps": 0.0}
        known = {**counts, "lr": lr, "policy/kl_coef": self.kl_coef}
        return {**dict.fromkeys([*names, "grad_norm"], math.nan), **known}

    def run(self, batch: RolloutBatch, frozen: bool = False) -> dict[str, float]:
        """All optimizer steps on a rollout: `max_epochs` passes in steps of train_batch_size.

        Returns means over the steps, and how many steps were taken and skipped. `frozen` measures
        without training.
        """
        mean = Mean()
        for _ in range(1 if frozen else self.stepper.training.max_epochs):
            for rows in self.stepper.rows(len(batch)):
                metrics = self._step(batch, rows, frozen)
                mean.add(metrics, maxima=("mismatch/logprob_abs_max",))
        result = mean.result()
        result["policy/loss"] = result.pop("loss")
        result["policy/kl_coef"] = self.kl_coef
        weight = result.pop("mismatch/weight_mean")
        square = result.pop("mismatch/weight_square_mean")
        result["mismatch/effective_sample_size"] = weight**2 / square if square else 0.0
        result["update/optimizer_steps"] = 0 if frozen else mean.steps
        result["update/skipped_steps"] = mean.skipped
        if mean.steps > mean.skipped:
            counted = len(batch) if batch.filler is None else int((~batch.filler).sum())
            samples = self.stepper.ranks.sum({"samples": float(counted)}, "update")["samples"]
            self._adapt(result, int(samples))
        return result

    def _step(self, batch: RolloutBatch, rows: list[int], frozen: bool) -> dict[str, float]:
        mask = batch.mask[rows]
        denominators = self.stepper.denominators(mask, self.max_response_length)
        kept = None
        if batch.entropy is not None and self.algorithm.high_entropy_token_ratio < 1:
            ratio = self.algorithm.high_entropy_token_ratio
            keep = high_entropy_mask(batch.entropy[rows], mask, ratio, self._gather)
            kept = self.stepper.denominators(keep, self.max_response_length)
            full = torch.zeros_like(batch.mask)
            full[rows] = keep
            batch = replace(batch, keep=full)
        loss = partial(self._loss, denominators=denominators, keep_denominators=kept)
        if frozen:
            return self.stepper.evaluate(batch, rows, loss)
        return self.stepper.run(batch, rows, loss, usable=denominators.tokens > 0)

    def _loss(
        self,
        micro: MicroBatch,
        part: RolloutBatch,
        mask: Tensor,
        denominators: Denominators,
        keep_denominators: Denominators | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, whose samples are `part`."""
        width, algorithm = mask.shape[1], self.algorithm
        values, entropies = self.policy(micro)
        logprobs = micro.scatter(values, width)
        entropy = micro.scatter(entropies if algorithm.entropy_coef else entropies.detach(), width)
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        assert part.advantages is not None
        settings = {
            **algorithm.model_dump(),
            "cpgd_drift_coef": self.drift_coef,
            "init_kl_coef": self.kl_coef if self.preset.kl_placement == "loss" else 0.0,
            "loss_aggregation": self.preset.loss_aggregation,
        }
        loss, metrics = policy_loss(
            self.preset.policy_loss,
            logprobs,
            old,
            part.advantages,
            mask,
            ref_logprobs=part.ref_logprobs,
            entropy=entropy,
            keep=None if part.keep is None else part.keep & mask,
            rollout_logprobs=part.rollout_logprobs,
            denominators=denominators,
            keep_denominators=keep_denominators,
            **options_of(policy_loss, settings, {}, 5),
            **options_of(self.loss, settings, algorithm.policy_loss_options, 4),
        )
        drift, worst = mismatch(old, part.rollout_logprobs, mask, denominators)
        metrics.update(drift)
        metrics["max/mismatch/logprob_abs_max"] = worst
        metrics["policy/entropy"] = token_mean(entropy, mask, denominators)
        del metrics["policy/loss"]  # the stepper's "loss"
        return loss, metrics

    def _adapt(self, metrics: Mapping[str, float], samples: int) -> None:
        rest = self.algorithm.kl_target, samples, self.algorithm.kl_horizon
        if self.algorithm.kl_controller == "adaptive":
            self.kl_coef = adapt_coefficient(self.kl_coef, metrics["policy/kl"], *rest)
        if "policy/drift" in metrics:
            self.drift_coef = adapt_coefficient(self.drift_coef, metrics["policy/drift"], *rest)

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef, "drift_coef": self.drift_coef, **self._started_from()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the coefficients that adapt, unless this run wants to start from others."""
        if any(state[name] != value for name, value in self._started_from().items()):
            return
        if self.algorithm.kl_controller == "adaptive":  # a fixed one is the config's
            self.kl_coef = state["kl_coef"]
        self.drift_coef = state["drift_coef"]

    def _started_from(self) -> dict[str, float]:
        names = ("init_kl_coef", "cpgd_drift_coef")
        return {name: getattr(self.algorithm, name) for name in names}

    def _gather(self, values: Tensor) -> Tensor:
        return torch.cat(self.stepper.ranks.gather(values.cpu())).to(values.device)
