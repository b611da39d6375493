"""What is learned from a rollout: log-probs, values, advantages, and the optimizer steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchrft.algorithms.advantages import AdvantageEstimator
from torchrft.algorithms.aggregation import Denominators, token_mean
from torchrft.algorithms.corrections import mismatch
from torchrft.algorithms.kl import adapt_coefficient
from torchrft.algorithms.losses import PolicyLoss, Tokens, value_loss
from torchrft.algorithms.selection import high_entropy_mask
from torchrft.config.job_config import Algorithm
from torchrft.learn.batch import counted_rows, gather_rows
from torchrft.learn.metrics import Accumulator, StepMetrics, average
from torchrft.learn.optimizer_step import OptimizerStep
from torchrft.learn.packing import MicroBatch
from torchrft.rewards.shaping import RewardShaper
from torchrft.tools.distributed import any_rank
from torchrft.types import RolloutBatch

_POLICY = ("loss", "kl", "approx_kl", "entropy", "clip_fraction")
_ENGINE = ("logprob_abs_mean", "logprob_abs_max", "kl", "effective_sample_size")
_NAMES = [*(f"policy/{name}" for name in _POLICY), *(f"mismatch/{name}" for name in _ENGINE)]


@dataclass(frozen=True)
class Objective:
    """What the learner maximizes: estimator and losses, with all their options.

    `kl_in_reward` takes the KL term off the reward, else it is a term of the loss.
    """

    estimator: AdvantageEstimator
    loss: PolicyLoss
    kl_in_reward: bool


class Learner:
    """Trains the policy, and the critic if there is one; its numbers are global over ranks.

    `kl_coef` and `drift_coef` may adapt from rollout to rollout; `state_dict` holds them.
    """

    def __init__(
        self,
        objective: Objective,
        algorithm: Algorithm,
        policy: OptimizerStep,
        reference: nn.Module | None,
        critic: OptimizerStep | None,
        shaper: RewardShaper,
    ) -> None:
        self.objective, self.algorithm, self.shaper = objective, algorithm, shaper
        self.policy, self.reference, self.critic = policy, reference, critic
        self.ranks = policy.ranks
        self.kl_coef = algorithm.init_kl_coef
        self.drift_coef = algorithm.cpgd_drift_coef

    @property
    def steppers(self) -> dict[str, OptimizerStep]:
        """The models that are trained, by their names in checkpoints."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained, whose weights engines and exports take."""
        wrapped: Any = self.policy.model
        return wrapped.model  # type: ignore[no-any-return]

    def fetch_states(self) -> None:
        """An update is due soon: optimizers' states that are on the host must come back."""
        for stepper in self.steppers.values():
            stepper.fetch_state()

    def offload_states(self) -> None:
        """No update is due soon: optimizers' states may leave the device."""
        for stepper in self.steppers.values():
            stepper.offload_state()

    def compute_logprobs(self, batch: RolloutBatch) -> RolloutBatch:
        """Adds the log-probs of the reference, and of the policy where they are needed, and values.

        With a single optimizer step on the batch, the policy's own log-probs in that step are the
        old ones, so no pass of their own is spent on them.
        """
        if self.reference is not None:
            batch = replace(batch, ref_logprobs=self.logprobs(self.reference, batch))
        steps = self.policy.training.max_epochs * len(self.policy.rows(len(batch)))
        selects = self.algorithm.high_entropy_token_ratio < 1
        if steps > 1 or selects or self.objective.kl_in_reward:
            old, entropy = self.policy.forward(self.policy.model, batch, outputs=2)
            batch = replace(batch, old_logprobs=old, entropy=entropy)
        if self.critic is not None:
            batch = replace(batch, old_values=self.critic.forward(self.critic.model, batch)[0])
        return batch

    def logprobs(self, model: nn.Module, batch: RolloutBatch) -> Tensor:
        """Log-probs float32 [B, T] of the response tokens under `model`, zero elsewhere."""
        return self.policy.forward(model, batch)[0]

    def compute_advantages(
        self, batch: RolloutBatch, split_groups: bool
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """The batch with advantages and returns, and metrics of rewards and advantages.

        Statistics span all ranks; fillers do not count. With `split_groups` the samples of a group
        may be on several ranks, which then look at all samples.
        """
        counted = counted_rows(batch)
        rewards, metrics = self.shaper.shape(counted.rewards, self.ranks.sum_tensor)
        penalized = self.objective.kl_in_reward and batch.ref_logprobs is not None
        inputs: dict[str, Any] = {
            "rewards": rewards,
            "group": counted.group,
            "mask": counted.mask,
            "old_logprobs": counted.old_logprobs if penalized else None,
            "ref_logprobs": counted.ref_logprobs if penalized else None,
            "values": counted.old_values,
        }
        own_rows, reduce = slice(None), self.ranks.sum_tensor
        if split_groups:  # the estimator needs whole groups
            inputs, own_rows = gather_rows(inputs, self.ranks)
            reduce = _identity
        estimator = replace(self.objective.estimator, init_kl_coef=self.kl_coef)
        result = estimator(**inputs, reduce=reduce)
        rows = slice(None) if batch.filler is None else ~batch.filler
        tables: dict[str, Any] = {}
        for name, values in (("advantages", result.advantages), ("returns", result.returns)):
            tables[name] = torch.zeros_like(batch.rollout_logprobs)
            tables[name][rows] = values[own_rows, : batch.mask.shape[1]]
        some = any_rank(bool((tables["advantages"] * batch.mask).any()), "advantages")
        metrics |= {} if some else {"advantages/all_zero": 1.0}
        return replace(batch, **tables), metrics | result.metrics

    def update(self, batch: RolloutBatch, frozen: bool = False) -> dict[str, float]:
        """All optimizer steps on a rollout: `max_epochs` passes in steps of train_batch_size.

        Returns means over the steps, and how many steps were taken and skipped. `frozen` measures
        the policy without training it.
        """
        metrics = {} if self.critic is None else self._update_critic(self.critic, batch)
        loss_function = self.objective.loss.with_coefficients(
            0.0 if self.objective.kl_in_reward else self.kl_coef, self.drift_coef
        )
        steps = [
            self._policy_step(batch, rows, loss_function, frozen)
            for _ in range(1 if frozen else self.policy.training.max_epochs)
            for rows in self.policy.rows(len(batch))
        ]
        mean = average(steps)
        metrics |= {**mean.sums, **mean.maxima, "grad_norm": mean.grad_norm, "lr": mean.lr}
        metrics["policy/loss"], metrics["policy/kl_coef"] = mean.loss, self.kl_coef
        weight = metrics.pop("mismatch/weight_mean")
        square = metrics.pop("mismatch/weight_square_mean")
        metrics["mismatch/effective_sample_size"] = weight**2 / square if square else 0.0
        metrics["update/optimizer_steps"] = 0 if frozen else len(steps)
        metrics["update/skipped_steps"] = sum(step.skipped for step in steps)
        if not mean.skipped:
            self._adapt(batch, mean.sums)
        return metrics

    def metrics_without_update(self) -> dict[str, float]:
        """The metrics of a rollout whose samples wait for more: no update, so no numbers."""
        lr = float(self.policy.scheduler.get_last_lr()[0])
        counts = {"update/optimizer_steps": 0.0, "update/skipped_steps": 0.0}
        known = {**counts, "lr": lr, "policy/kl_coef": self.kl_coef}
        return {**dict.fromkeys([*_NAMES, "grad_norm"], math.nan), **known}

    def _policy_step(
        self, batch: RolloutBatch, rows: list[int], loss_function: PolicyLoss, frozen: bool
    ) -> StepMetrics:
        policy, measured = self.policy, Accumulator()
        denominators = policy.denominators(batch.mask[rows])
        batch = self._with_selection(batch, rows)
        with torch.set_grad_enabled(not frozen):
            for micro in policy.micro_batches(batch, rows):
                loss, sums, maxima = self._policy_loss(micro, loss_function, denominators)
                if loss.requires_grad:
                    policy.backward(loss)
                measured.add(loss, sums, maxima)
        metrics = measured.over_ranks(self.ranks)
        return metrics if frozen else policy.step(metrics, denominators.tokens > 0)

    def _policy_loss(
        self, micro: MicroBatch, loss_function: PolicyLoss, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss of a micro-batch, metrics that add up, and maxima."""
        samples, mask = micro.samples, micro.samples.mask
        token_logprobs, entropies = self.policy.model(micro)
        logprobs = micro.scatter(token_logprobs)
        entropy = micro.scatter(entropies if loss_function.entropy_coef else entropies.detach())
        old = logprobs.detach() if samples.old_logprobs is None else samples.old_logprobs
        assert samples.advantages is not None
        tokens = Tokens(
            logprobs,
            old,
            samples.advantages,
            mask,
            ref_logprobs=samples.ref_logprobs,
            rollout_logprobs=samples.rollout_logprobs,
            entropy=entropy,
            keep=samples.keep,
        )
        loss, metrics = loss_function(tokens, denominators)
        drift, worst = mismatch(old, samples.rollout_logprobs, mask, denominators)
        metrics |= {**drift, "policy/entropy": token_mean(entropy, mask, denominators)}
        del metrics["policy/loss"]  # the accumulator has it
        return loss, metrics, {"mismatch/logprob_abs_max": worst}

    def _with_selection(self, batch: RolloutBatch, rows: list[int]) -> RolloutBatch:
        """The batch with the tokens of `rows` whose policy loss counts, if not all of them do."""
        ratio = self.algorithm.high_entropy_token_ratio
        if batch.entropy is None or ratio == 1:
            return batch
        keep = torch.zeros_like(batch.mask)
        keep[rows] = high_entropy_mask(batch.entropy[rows], batch.mask[rows], ratio, self._gather)
        return replace(batch, keep=keep)

    def _gather(self, values: Tensor) -> Tensor:
        return torch.cat(self.ranks.gather(values.cpu())).to(values.device)

    def _update_critic(self, critic: OptimizerStep, batch: RolloutBatch) -> dict[str, float]:
        """All optimizer steps of the critic; returns critic/ metrics, means over the steps."""
        explained = self._explained_variance(batch)
        steps = [
            self._critic_step(critic, batch, rows)
            for _ in range(critic.training.max_epochs)
            for rows in critic.rows(len(batch))
        ]
        mean = average(steps)
        metrics = {**mean.sums, "loss": mean.loss, "grad_norm": mean.grad_norm, "lr": mean.lr}
        metrics["skipped_steps"] = sum(step.skipped for step in steps)
        metrics["explained_variance"] = explained
        return {f"critic/{name}": value for name, value in metrics.items()}

    def _critic_step(
        self, critic: OptimizerStep, batch: RolloutBatch, rows: list[int]
    ) -> StepMetrics:
        measured, denominators = Accumulator(), critic.denominators(batch.mask[rows])
        for micro in critic.micro_batches(batch, rows):
            samples = micro.samples
            assert samples.old_values is not None
            assert samples.returns is not None
            loss, sums = value_loss(
                micro.scatter(critic.model(micro)),
                samples.old_values,
                samples.returns,
                samples.mask,
                value_clip=self.algorithm.value_clip,
                loss_aggregation=self.objective.loss.aggregation,
                denominators=denominators,
            )
            critic.backward(loss)
            measured.add(loss, sums)
        return critic.step(measured.over_ranks(self.ranks), denominators.tokens > 0)

    def _explained_variance(self, batch: RolloutBatch) -> float:
        """1 - Var(returns - values) / Var(returns) over response tokens; 0 for equal returns."""
        assert batch.old_values is not None
        assert batch.returns is not None
        returns = batch.returns[batch.mask].double()
        errors = returns - batch.old_values[batch.mask].double()
        terms = (torch.ones_like(returns), returns, returns.square(), errors, errors.square())
        sums = self.ranks.sum_tensor(torch.stack([term.sum() for term in terms]))
        count, *moments = sums.tolist()
        mean, square, error, error_square = (moment / max(count, 1.0) for moment in moments)
        of_returns, of_errors = square - mean**2, error_square - error**2
        return 1.0 - of_errors / of_returns if of_returns > 1e-12 else 0.0

    def _adapt(self, batch: RolloutBatch, metrics: Mapping[str, float]) -> None:
        """Moves the coefficients of the KL term and of CPGD's drift towards `kl_target`."""
        counted = len(batch) if batch.filler is None else int((~batch.filler).sum())
        samples = int(self.ranks.sum({"samples": float(counted)}, "update")["samples"])
        options = self.algorithm.kl_target, samples, self.algorithm.kl_horizon
        if self.algorithm.kl_controller == "adaptive":
            self.kl_coef = adapt_coefficient(self.kl_coef, metrics["policy/kl"], *options)
        if "policy/drift" in metrics:
            drift = metrics["policy/drift"]
            self.drift_coef = adapt_coefficient(self.drift_coef, drift, *options)

    def state_dict(self) -> dict[str, float]:
        """The coefficients that adapt, and where they started from."""
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


def _identity(tensor: Tensor) -> Tensor:
    return tensor
