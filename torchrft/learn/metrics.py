"""What optimizer steps measure: sums over micro-batches and ranks, and means over the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchrft.tools.distributed import DataRanks, all_reduce_max


@dataclass
class StepMetrics:
    """One optimizer step, over all ranks.

    `sums` are metrics that add up over micro-batches and ranks, as means over global denominators
    do; of `maxima` the largest counts. A `skipped` step changed no weights.
    """

    loss: float
    sums: Mapping[str, float]
    maxima: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    lr: float = 0.0
    skipped: bool = False


class Accumulator:
    """Adds up the metrics of the micro-batches of an optimizer step, on their device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def add(
        self, loss: Tensor, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes in a micro-batch."""
        for name, term in {**sums, "loss": loss.detach()}.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        for name, term in (maxima or {}).items():
            known = self.maxima.get(name)
            self.maxima[name] = term if known is None else torch.maximum(known, term)

    def over_ranks(self, ranks: DataRanks) -> StepMetrics:
        """The step's metrics; all ranks call it together."""
        sums = ranks.sum({name: float(value) for name, value in self.sums.items()}, "update")
        maxima = {name: float(value) for name, value in self.maxima.items()}
        maxima = all_reduce_max(maxima, "update") if maxima else {}
        return StepMetrics(sums.pop("loss"), sums, maxima)


def average(steps: Sequence[StepMetrics]) -> StepMetrics:
    """Means over several optimizer steps, and the largest of their maxima.

    Skipped steps would spoil the mean of the others, and do not count. Without a single good step,
    the metrics of the skipped ones are all there is.
    """
    counted = [step for step in steps if not step.skipped] or list(steps)

    def mean(values: list[float]) -> float:
        return sum(values) / len(counted)

    return StepMetrics(
        loss=mean([step.loss for step in counted]),
        sums={name: mean([step.sums[name] for step in counted]) for name in counted[0].sums},
        maxima={name: max(s.maxima[name] for s in counted) for name in counted[0].maxima},
        grad_norm=mean([step.grad_norm for step in counted]),
        lr=mean([step.lr for step in counted]),
        skipped=all(step.skipped for step in steps),
    )
