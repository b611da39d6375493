"""The critic of PPO: values of the samples before the update, and its own optimizer steps."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from torchrft.algorithms.aggregation import Denominators
from torchrft.algorithms.losses import value_loss
from torchrft.config.job_config import Algorithm
from torchrft.data.packing import MicroBatch
from torchrft.optimizer_step import Mean, OptimizerStep
from torchrft.types import RolloutBatch


@dataclass
class CriticUpdate:
    """Trains the critic on the returns of rollouts."""

    stepper: OptimizerStep
    algorithm: Algorithm
    loss_aggregation: str
    max_response_length: int

    def with_values(self, batch: RolloutBatch) -> RolloutBatch:
        """Adds the critic's values [B, T] of the states in which the tokens were chosen."""
        return replace(batch, old_values=self.stepper.forward(self.stepper.model, batch)[0])

    def run(self, batch: RolloutBatch) -> dict[str, float]:
        """All optimizer steps on a rollout; returns critic/ metrics, means over the steps."""
        explained = self._explained_variance(batch)
        mean = Mean()
        for _ in range(self.stepper.training.max_epochs):
            for rows in self.stepper.rows(len(batch)):
                mean.add(self._step(batch, rows))
        result = {f"critic/{name}": value for name, value in mean.result().items()}
        result["critic/skipped_steps"] = mean.skipped
        return result | {"critic/explained_variance": explained}

    def _step(self, batch: RolloutBatch, rows: list[int]) -> dict[str, float]:
        denominators = self.stepper.denominators(batch.mask[rows], self.max_response_length)
        loss = partial(self._loss, denominators=denominators)
        return self.stepper.run(batch, rows, loss, usable=denominators.tokens > 0)

    def _loss(
        self, micro: MicroBatch, part: RolloutBatch, mask: Tensor, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = micro.scatter(self.stepper.model(micro), mask.shape[1])
        assert part.old_values is not None
        assert part.returns is not None
        return value_loss(
            values,
            part.old_values,
            part.returns,
            mask,
            value_clip=self.algorithm.value_clip,
            loss_aggregation=self.loss_aggregation,
            denominators=denominators,
        )

    def _explained_variance(self, batch: RolloutBatch) -> float:
        """1 - Var(returns - values) / Var(returns) over response tokens; 0 for equal returns."""
        assert batch.old_values is not None
        assert batch.returns is not None
        returns = batch.returns[batch.mask].double()
        errors = returns - batch.old_values[batch.mask].double()
        parts = (torch.ones_like(returns), returns, returns.square(), errors, errors.square())
        sums = torch.stack([part.sum() for part in parts])
        count, *moments = self.stepper.ranks.sum_tensor(sums).tolist()
        mean, square, error, error_square = (moment / max(count, 1.0) for moment in moments)
        of_returns, of_errors = square - mean**2, error_square - error**2
        return 1.0 - of_errors / of_returns if of_returns > 1e-12 else 0.0
