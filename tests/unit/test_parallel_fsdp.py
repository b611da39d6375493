"""bfloat16 on one process: computing in bfloat16, float32 master weights and gradients."""

import pytest
import torch
from tiny_policy import full_weights, make_learner, make_samples, with_advantages
from torch import nn
from torch.distributed.tensor import DTensor

from torchrft.models.loader import load_model
from torchrft.parallel import set_gradient_sync
from torchrft.parallel.fsdp import decoder_layers
from torchrft.tools import distributed


@pytest.fixture
def group():
    yield distributed.setup()
    distributed.teardown()


def test_decoder_layers_are_the_repeated_blocks():
    from tiny_job import MODEL

    model = load_model(MODEL, "random")
    assert decoder_layers(model) == list(model.model.layers)
    assert len(model.model.layers) == 2
    assert decoder_layers(nn.Linear(2, 2)) == []


def test_one_rank_in_its_own_dtype_stays_as_it_is():
    learner = make_learner()
    assert not any(isinstance(p, DTensor) for p in learner.policy.model.parameters())
    set_gradient_sync(learner.policy.model, False)  # nothing to do, and no error


def test_bf16_computes_in_bfloat16(group, monkeypatch):
    learner = make_learner(dtype=torch.bfloat16, bf16=True)
    batch = with_advantages(make_samples())
    computed: list[torch.dtype] = []

    def spy(module, args, output):
        computed.extend([args[0].dtype, module.weight.dtype, output.dtype])

    for module in learner.policy.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(spy)
    gradients: list[torch.dtype] = []
    step = learner.policy.optimizer.step

    def spy_step() -> None:
        gradients.extend(p.grad.dtype for p in learner.policy.model.parameters())
        step()

    monkeypatch.setattr(learner.policy.optimizer, "step", spy_step)
    before = full_weights(learner)
    metrics = learner.update(batch)
    assert len(computed) >= 3 * 2 * 7  # 7 projections in each of 2 layers
    assert set(computed) == {torch.bfloat16}
    assert set(gradients) == {torch.float32}
    assert {p.dtype for p in learner.policy.model.parameters()} == {torch.float32}
    # The step has digits that bfloat16 weights could not hold.
    after = full_weights(learner)
    assert any((v != v.bfloat16().float()).any() for v in after.values())
    assert any((v != before[name]).any() for name, v in after.items())
    exact = make_learner().update(batch)
    assert metrics["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert metrics["grad_norm"] != exact["grad_norm"]
    assert metrics["policy/entropy"] == pytest.approx(exact["policy/entropy"], rel=0.02)


def test_bf16_log_probs_are_float32_and_close(group):
    batch = with_advantages(make_samples())
    learner, exact = make_learner(dtype=torch.bfloat16, bf16=True), make_learner()
    got = learner.logprobs(learner.policy.model, batch)
    expected = exact.logprobs(exact.policy.model, batch)
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    assert (got - expected).abs().max() < 0.2


def test_the_bf16_model_is_wrapped_once_per_layer_and_once_as_a_whole(group):
    from torch.distributed.fsdp import FSDPModule

    learner = make_learner(dtype=torch.bfloat16, bf16=True)
    wrapped = [m for m in learner.policy.model.modules() if isinstance(m, FSDPModule)]
    assert wrapped == [learner.policy.model, *learner.policy.model.model.get_decoder().layers]
