import math

import pytest
import torch
from torch import tensor

from torchrft.algorithms.aggregation import Denominators
from torchrft.algorithms.corrections import mismatch


def test_mismatch_by_hand():
    old = tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    engine = tensor([[-1.5, -2.0, 9.0], [-2.0, 9.0, 9.0]])
    mask = tensor([[True, True, False], [True, False, False]])
    metrics, worst = mismatch(old, engine, mask, Denominators.of(mask))
    # |old - engine| = 0.5, 0, 1 on three tokens: mean 0.5, largest 1.
    assert float(metrics["mismatch/logprob_abs_mean"]) == pytest.approx(0.5)
    assert float(worst) == 1.0
    # k3 of KL(engine || old), d = engine - old = -0.5, 0, 1.
    k3 = [math.exp(-d) - 1 + d for d in (-0.5, 0.0, 1.0)]
    assert float(metrics["mismatch/kl"]) == pytest.approx(sum(k3) / 3, rel=1e-6)


def test_parts_add_up_with_global_denominators():
    generator = torch.Generator().manual_seed(0)
    old, engine = torch.randn(2, 6, 4, generator=generator)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    total = Denominators.of(mask)
    whole, worst = mismatch(old, engine, mask, total)
    parts = [mismatch(old[r], engine[r], mask[r], total) for r in (slice(0, 1), slice(1, 6))]
    for name, value in whole.items():
        assert float(parts[0][0][name] + parts[1][0][name]) == pytest.approx(float(value), abs=1e-6)
    assert max(float(parts[0][1]), float(parts[1][1])) == float(worst)


def test_what_is_masked_has_no_effect():
    old, engine = torch.zeros(2, 2), torch.full((2, 2), 0.25)
    mask = tensor([[True, False], [False, False]])
    old[0, 1], engine[1, 0] = math.nan, math.inf
    metrics, worst = mismatch(old, engine, mask, Denominators.of(mask))
    assert float(metrics["mismatch/logprob_abs_mean"]) == 0.25
    assert float(worst) == 0.25
    metrics, worst = mismatch(old, engine, torch.zeros_like(mask), Denominators(0.0, 0.0, 1.0))
    assert {float(worst), *map(float, metrics.values())} == {0.0}


def test_no_gradient_flows():
    old = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    metrics, worst = mismatch(old, torch.ones(1, 2), mask, Denominators.of(mask))
    assert not worst.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
