import math

import pytest
import torch
from torch import tensor

from torchrft.algorithms.kl import ESTIMATORS, kl_divergence

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = log pi - log ref = 0.5, -1, 0
        ("k1", [0.5, -1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [0.1065307, 0.7182818, 0.0]),  # e^-0.5 - 0.5; e - 2; 0
    ],
)
def test_kl_estimators(estimator, expected):
    got = kl_divergence(tensor([[-1.0, -3.0, -2.0]]), tensor([[-1.5, -2.0, -2.0]]), estimator)
    assert got[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_k3_is_the_default():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(kl_divergence(a, b), kl_divergence(a, b, "k3"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients_against_a_float64_loop(estimator):
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 5, generator=generator).requires_grad_()
    ref = torch.randn(3, 5, generator=generator)
    got = kl_divergence(logprobs, ref, estimator)
    got.sum().backward()
    got = got.detach()
    step = 1e-6
    for i in range(3):
        for j in range(5):
            d = float(logprobs.detach()[i, j].double() - ref[i, j].double())
            assert float(got[i, j]) == pytest.approx(FORMULAS[estimator](d), abs=1e-6)
            # k1 has the gradient of k2: its own does not depend on the reference.
            curve = FORMULAS["k2" if estimator == "k1" else estimator]
            slope = (curve(d + step) - curve(d - step)) / (2 * step)
            assert float(logprobs.grad[i, j]) == pytest.approx(slope, abs=2e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_apart_policies_stay_finite(estimator):
    logprobs = tensor([-1000.0, -0.1]).requires_grad_()
    got = kl_divergence(logprobs, tensor([-0.1, -1000.0]), estimator)
    expected = [FORMULAS[estimator](d) for d in (-20.0, 20.0)]
    assert got.tolist() == pytest.approx(expected, rel=1e-6)
    got.sum().backward()
    assert logprobs.grad.isfinite().all()


def test_unknown_estimator():
    with pytest.raises(ValueError, match='kl_estimator "k4" is unknown; choose from k1, k2, k3'):
        kl_divergence(tensor([0.0]), tensor([0.0]), "k4")
