"""Random ragged cases for algorithms_vs_peers.py, and torchrft's side as functions of a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchrft.algorithms import advantages
from torchrft.algorithms.losses import policy_loss

GROUPS, SIZE, WIDTH, BUDGET = 6, 4, 17, 32
LOW, HIGH, BETA, SHARE = 0.2, 0.3, 0.05, 0.3
MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")

Pair = tuple[Callable[["Case"], Tensor], Callable[["Case"], Tensor]]  # torchrft's and the peer's


class Case:
    """Log-probs and all else of 24 responses of unequal length; `empty` leaves two without any."""

    def __init__(self, seed: int, empty: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        rows = GROUPS * SIZE
        self.old = -3 * torch.rand(rows, WIDTH, generator=g, dtype=torch.float64)

        def around(spread: float) -> Tensor:
            noise = torch.randn(rows, WIDTH, generator=g, dtype=torch.float64)
            return self.old + spread * noise

        self.logprobs, self.ref, self.rollout = around(0.3), around(0.5), around(0.3)
        lengths = torch.randint(2, WIDTH + 1, (rows,), generator=g)
        if empty:
            lengths[[3, 11]] = 0
        self.mask = torch.arange(WIDTH) < lengths[:, None]
        self.float_mask = self.mask.double()
        self.rewards = torch.rand(rows, generator=g, dtype=torch.float64)
        self.group = torch.arange(rows) // SIZE
        self.sequence = torch.randn(rows, 1, generator=g, dtype=torch.float64)
        self.advantages = self.sequence.expand(rows, WIDTH).contiguous()
        self.values, self.old_values = around(0.2), around(0.2)
        self.entropy = torch.rand(rows, WIDTH, generator=g, dtype=torch.float64)
        last = self.mask & (self.mask.cumsum(-1) == lengths[:, None])
        self.token_rewards = self.rewards[:, None] * last
        self.leaf = self.logprobs.requires_grad_()  # what gradients are taken for


def ours(name: str, mode: str | None = None, **options: Any) -> Callable[[Case], Tensor]:
    """`policy_loss` as a function of a case; options may be functions of it."""

    def call(case: Case) -> Tensor:
        chosen = {k: v(case) if callable(v) else v for k, v in options.items()}
        args = (case.logprobs, case.old, case.advantages, case.mask)
        budget = {"loss_aggregation": mode, "max_response_length": BUDGET}
        return policy_loss(name, *args, **budget, **chosen)[0]

    return call


CLIPS = {"clip_range": LOW, "clip_range_higher": HIGH}
KL = {"ref_logprobs": lambda case: case.ref, "init_kl_coef": BETA}


def estimated(name: str, **options: Any) -> Callable[[Case], Tensor]:
    def call(case: Case) -> Tensor:
        chosen = {k: v(case) if callable(v) else v for k, v in options.items()}
        result = advantages.compute(name, case.rewards, case.group, case.mask, **chosen)
        return result.advantages.double()

    return call


def biased(case: Case) -> float:
    """verl's whitening divides by n - 1, torchrft's by n: this factor makes them one."""
    n = int(case.mask.sum())
    return (n / (n - 1)) ** 0.5


def difference(pair: Pair, cases: int) -> tuple[float, float | None]:
    """Largest differences of values and of gradients; None where there is no gradient."""
    worst, slope = 0.0, None
    for case in map(Case, range(cases)):
        results = [function(case) for function in pair]
        worst = max(worst, float((results[0] - results[1]).detach().abs().max()))
        if results[0].requires_grad:
            grads = [torch.autograd.grad(result.sum(), case.leaf)[0] for result in results]
            assert grads[0].abs().max() > 1e-6, "an empty comparison"
            slope = max(slope or 0.0, float((grads[0] - grads[1]).abs().max()))
    return worst, slope
