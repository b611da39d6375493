"""Training on a CUDA device: fused log-probs, compiled layers, checkpointing, offloads."""

import pytest
import tiny
import torch

from torchrft.config.job_config import Optimizer, Parallel
from torchrft.learn.packing import build
from torchrft.models.logprobs import fused_linear_logprob
from torchrft.models.policy import PolicyModel
from torchrft.optim.offload import StateOffload
from torchrft.optim.optimizer import build_optimizer
from torchrft.parallel import ParallelDims, parallelize
from torchrft.tools import distributed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_fused_log_probs_against_float64(dtype, bound):
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    hidden = torch.randn(700, 64, **options).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(999, 64, **options)).to(dtype).requires_grad_()
    labels = torch.randint(999, (700,), **options)
    scale = torch.rand(700, **options)
    logprobs, entropy = fused_linear_logprob(hidden, weight, labels, 0.7, 128)
    (logprobs * scale + 0.3 * entropy * scale).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = (exact[0] @ exact[1].t() / 0.7).log_softmax(-1)
    chosen = log_p.gather(-1, labels[:, None]).squeeze(1)
    spread = -(log_p.exp() * log_p).sum(-1)
    (chosen * scale + 0.3 * spread * scale).sum().backward()
    pairs = [(logprobs, chosen), (entropy, spread)]
    pairs += [(hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)]
    for mine, theirs in pairs:
        assert float((mine.double() - theirs).norm() / theirs.norm()) < bound


@pytest.fixture(scope="module")
def group():
    yield distributed.setup()
    distributed.teardown()


def gradients(**options):
    model = PolicyModel(tiny.model("qwen3", head_dim=16).cuda(), fused=options.pop("fused", False))
    config = Parallel(**options.pop("parallel", {}))
    parallelize(model, ParallelDims(), config, torch.bfloat16, **options)
    batch = tiny.batch([(3, [2, 40]), (5, [100, 30, 1]), (20, [7])])
    micro = build(batch, list(range(6)), True)
    for name in ("input_ids", "position_ids", "targets", "labels", "cells"):
        object.__setattr__(micro, name, getattr(micro, name).cuda())
    object.__setattr__(micro, "layout", micro.layout.to(torch.device("cuda")))
    logprobs, _ = model(micro)
    logprobs.mean().backward()
    return {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}, model


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"compile": True},
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "selective", "compile": True},
        {"parallel": {"fsdp": True, "fsdp_cpu_offload": True}},
    ],
    ids=str,
)
def test_every_way_has_the_same_gradients(group, options):
    plain, _ = gradients()
    found, _ = gradients(**options)
    for name, gradient in plain.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < 0.05, (name, error)  # bf16, other kernels


def test_cpu_offload_keeps_shards_on_the_host(group):
    _, model = gradients(parallel={"fsdp": True, "fsdp_cpu_offload": True})
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {p.grad.device.type for p in model.parameters()} == {"cpu"}


def test_state_leaves_the_device_and_comes_back():
    model = torch.nn.Linear(1000, 1000, device="cuda")
    optimizer = build_optimizer(model, Optimizer(), 1e-3)
    model(torch.randn(3, 1000, device="cuda")).sum().backward()
    optimizer.step()
    before = optimizer.state[model.weight]["exp_avg"].clone()
    mover = StateOffload(optimizer)
    held = torch.cuda.memory_allocated()
    mover.offload()
    assert held - torch.cuda.memory_allocated() >= 2 * 4 * 1000 * 1000
    assert all(copy.is_pinned() for copy in mover.host.values())
    mover.prefetch()
    mover.wait()
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], before)
