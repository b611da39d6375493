"""Optimizer state on the host, and float32 master weights."""

import pytest
import torch
from tiny_job import argv, records, run, weights
from torch import nn

from torchrft.config.job_config import Optimizer
from torchrft.config.manager import ConfigError, load
from torchrft.optim.offload import StateOffload
from torchrft.optim.optimizer import build_optimizer


def trained_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(5, 3).to(dtype)


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def test_state_goes_and_comes_back():
    model = trained_model()
    optimizer = build_optimizer(model, Optimizer(), 1e-2)
    step(model, optimizer, 1)
    state = optimizer.state[model.weight]
    before = {name: value.clone() for name, value in state.items()}
    mover = StateOffload(optimizer, "cpu")
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    for _ in range(2):
        mover.offload()
        mover.offload()  # already away
        assert [value.untyped_storage().nbytes() for value in moments] == [0, 0]
        mover.wait()
        assert all(torch.equal(state[name], value) for name, value in before.items())
    assert state["exp_avg"] is moments[0]
    assert before["exp_avg"].abs().min() > 0


def test_nothing_to_move_is_said(caplog):
    caplog.set_level("WARNING", logger="torchrft")
    StateOffload(build_optimizer(trained_model(), Optimizer(), 1e-2))
    assert "adam_offload has nothing to move" in caplog.text


def test_a_run_with_offload_is_the_same(tmp_path, monkeypatch):
    plain = run(tmp_path / "a", max_steps=3)
    monkeypatch.setattr(StateOffload.__init__, "__defaults__", ("cpu",))
    sizes = []
    rest = StateOffload.offload

    def spy(self):
        rest(self)
        sizes.append(sum(t.untyped_storage().nbytes() for t in self._tensors()))

    monkeypatch.setattr(StateOffload, "offload", spy)
    run(tmp_path / "b", max_steps=2, adam_offload=True)
    resumed = run(tmp_path / "b", max_steps=3, adam_offload=True, load_checkpoint=True)
    assert sizes == [0, 0, 0]
    mine, theirs = weights(resumed), weights(plain)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_master_weights_keep_what_bf16_would_lose():
    """Steps of 1e-4 vanish beside a weight of 1 in bfloat16; the master adds them up."""
    master, plain, exact = trained_model(torch.bfloat16), trained_model(torch.bfloat16), None
    exact = trained_model().requires_grad_()
    with torch.no_grad():
        for model in (master, plain, exact):
            for parameter in model.parameters():
                parameter.fill_(1.0)
    config = Optimizer(l2=0.1)
    optimizers = [
        build_optimizer(master, config, 1e-4, master_weights=True),
        build_optimizer(plain, config, 1e-4),
        build_optimizer(exact, config, 1e-4),
    ]
    for _ in range(100):
        for model, optimizer in zip((master, plain, exact), optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
    state = optimizers[0].state[master.weight]
    assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(state["master"], exact.weight.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(master.weight, exact.weight.bfloat16())
    assert exact.weight[0, 0].item() == pytest.approx(0.989, abs=1e-3)
    assert (plain.weight == 1.0).all()


def test_a_run_with_master_weights(tmp_path):
    """bfloat16 parameters; it resumes bit by bit, masters included."""
    options = {"bf16": True, "use_mp_opt": True, "actor_learning_rate": 1e-3}
    whole = run(tmp_path / "a", **options, max_steps=3)
    assert {p.dtype for p in whole.learner.policy.model.parameters()} == {torch.bfloat16}
    run(tmp_path / "b", **options, max_steps=2)
    resumed = run(tmp_path / "b", **options, max_steps=3, load_checkpoint=True)
    for one, other in zip(
        resumed.learner.policy.model.parameters(),
        whole.learner.policy.model.parameters(),
        strict=True,
    ):
        mine = resumed.learner.policy.optimizer.state[one]
        theirs = whole.learner.policy.optimizer.state[other]
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(line["grad_norm"] > 0 for line in records(tmp_path / "a"))


def test_both_offloads_are_refused():
    with pytest.raises(ConfigError) as error:
        load(argv(adam_offload=True, fsdp_cpu_offload=True), 1)
    assert any("adam_offload" in fault for fault in error.value.faults)
