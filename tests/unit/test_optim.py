import math

import pytest
import tiny
import torch
from helpers import run_ranks
from tiny_job import records, run
from torch import nn, tensor

from torchrft.config.job_config import Optimizer, Parallel
from torchrft.optim.lr_scheduler import build_scheduler, lr_factor
from torchrft.optim.optimizer import build_optimizer, clip_gradients
from torchrft.parallel import ParallelDims, parallelize


def small_model(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def three_steps(config: Optimizer, lr: float) -> list[torch.Tensor]:
    model = small_model()
    optimizer = build_optimizer(model, config, lr)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def reference_steps(betas, decay, lr) -> list[torch.Tensor]:
    """AdamW as Loshchilov and Hutter write it, in float64; decay on matrices only."""
    model = small_model()
    values = [parameter.detach().double() for parameter in model.parameters()]
    first = [torch.zeros_like(value) for value in values]
    second = [torch.zeros_like(value) for value in values]
    for step in range(3):
        give_gradients(model, step)
        for i, parameter in enumerate(model.parameters()):
            gradient = parameter.grad.double()
            first[i] = betas[0] * first[i] + (1 - betas[0]) * gradient
            second[i] = betas[1] * second[i] + (1 - betas[1]) * gradient**2
            corrected = first[i] / (1 - betas[0] ** (step + 1))
            scale = (second[i] / (1 - betas[1] ** (step + 1))).sqrt() + 1e-8
            shrink = lr * decay if values[i].dim() >= 2 else 0.0
            values[i] = values[i] * (1 - shrink) - lr * corrected / scale
    return values


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.5, 0.6), (0.0, 0.0)])
def test_three_steps_are_adamws(betas, decay):
    got = three_steps(Optimizer(adam_betas=betas, l2=decay), lr=0.01)
    for mine, expected in zip(got, reference_steps(betas, decay, 0.01), strict=True):
        assert torch.allclose(mine.double(), expected, atol=1e-6, rtol=0)


def test_adam_betas():
    # First step, any betas: both moments are corrected to the gradient itself. Second step, with
    # gradients 1 then 3: m = (1-b1)(b1 + 3) / (1-b1^2) and v = (1-b2)(b2 + 9) / (1-b2^2).
    for beta1, beta2 in ((0.9, 0.95), (0.5, 0.6)):
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(2.0)
        optimizer = build_optimizer(model, Optimizer(adam_betas=(beta1, beta2)), lr=0.1)
        for gradient in (1.0, 3.0):
            model.weight.grad = tensor([[gradient]])
            optimizer.step()
        moment = (1 - beta1) * (beta1 + 3) / (1 - beta1**2)
        variance = (1 - beta2) * (beta2 + 9) / (1 - beta2**2)
        expected = 2.0 - 0.1 - 0.1 * moment / math.sqrt(variance)
        assert model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_weight_decay_on_matrices_only():
    model = small_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, Optimizer(l2=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        factor = 1 - 0.1 * 0.5 if old.dim() == 2 else 1.0
        assert torch.allclose(new.detach(), old * factor, atol=1e-7)


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, Optimizer(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in (*model[1].parameters(), *model[2].parameters())}
    assert {id(p) for p in optimizer.state} == held


def test_state_exists_from_the_start_and_steps_as_a_lazy_one():
    model, lazy_model = small_model(), small_model()
    optimizer = build_optimizer(model, Optimizer(l2=0.1), lr=0.01)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], torch.zeros_like(parameter))
    matrices = [p for p in lazy_model.parameters() if p.dim() == 2]
    others = [p for p in lazy_model.parameters() if p.dim() < 2]
    lazy = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(3):
        for each, steps in ((model, optimizer), (lazy_model, lazy)):
            give_gradients(each, step)
            steps.step()
    for mine, theirs in zip(model.parameters(), lazy_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, value in lazy.state[theirs].items():
            assert torch.equal(optimizer.state[mine][name], value)


# ---------------------------------------------------------------- clipping


def model_with_gradients(*values: list[float]) -> nn.Module:
    model = nn.Module()
    for index, value in enumerate(values):
        parameter = nn.Parameter(torch.zeros(len(value)))
        parameter.grad = tensor(value)
        model.register_parameter(f"p{index}", parameter)
    return model


def gradients(model: nn.Module) -> list[list[float]]:
    return [parameter.grad.tolist() for parameter in model.parameters()]


def test_clip_by_max_norm():
    # Over all parameters: sqrt(3^2 + 4^2 + 12^2) = 13, so a max_norm of 1 divides by 13.
    model = model_with_gradients([3.0, 4.0], [12.0])
    assert float(clip_gradients(model, 1.0)) == pytest.approx(13.0)
    assert gradients(model)[0] == pytest.approx([3 / 13, 4 / 13], rel=1e-5)
    assert gradients(model)[1] == pytest.approx([12 / 13], rel=1e-5)


def test_a_norm_below_max_norm_is_left_alone():
    model = model_with_gradients([3.0, 4.0], [12.0])
    assert float(clip_gradients(model, 13.5)) == pytest.approx(13.0)
    assert gradients(model) == [[3.0, 4.0], [12.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(bad):
    model = model_with_gradients([3.0, bad], [12.0])
    assert not math.isfinite(float(clip_gradients(model, 1.0)))
    got = gradients(model)
    assert got[0][0] == 3.0
    assert got[1] == [12.0]


def test_parameters_without_a_gradient_are_passed_over():
    model = model_with_gradients([3.0, 4.0], [12.0])
    model.p1.grad = None
    assert float(clip_gradients(model, 1.0)) == pytest.approx(5.0)
    assert model.p1.grad is None


def whole(tensors) -> list[torch.Tensor]:
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for t in tensors]


def bfloat16_clipping(rank: int, layouts: dict[str, ParallelDims]) -> dict[str, tuple]:
    """The norm, the gradients before and after: those before are the weights."""
    found = {}
    for layout, dims in layouts.items():
        model = tiny.model("qwen2", tie_word_embeddings=True).bfloat16()
        if dims.world_size > 1:
            parallelize(model, dims, Parallel(tp_size=dims.tp), torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        before = whole(p.grad for p in model.parameters())
        norm = clip_gradients(model, 1.0)
        found[layout] = norm, before, whole(p.grad for p in model.parameters())
    return found


def check_bfloat16_clipping(found: dict[str, tuple]) -> None:
    for layout, (norm, before, after) in found.items():
        exact = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(float(exact), rel=1e-6), layout
        for old, new in zip(before, after, strict=True):
            wanted = (old.double() / (exact + 1e-6)).bfloat16()
            assert new.dtype == torch.bfloat16
            assert (new != wanted).float().mean() < 0.01, layout  # ties in rounding
            torch.testing.assert_close(new, wanted, rtol=2**-7, atol=0)


def test_bfloat16_gradients_are_clipped_by_a_float32_norm():
    check_bfloat16_clipping(bfloat16_clipping(0, {"one": ParallelDims()}))
    layouts = {"dp2": ParallelDims(dp_shard=2), "tp2": ParallelDims(tp=2)}
    for found in run_ranks(bfloat16_clipping, 2, layouts):
        check_bfloat16_clipping(found)


# ---------------------------------------------------------------- schedule


def factors(total: int, **options) -> list[float]:
    config = Optimizer(**options)
    return [lr_factor(step, total, config) for step in range(total + 2)]


def test_warmup():
    # ceil(0.25 * 10) = 3 steps up, 1/3 a step.
    got = factors(10, lr_warmup_ratio=0.25, lr_decay="constant")
    assert got == pytest.approx([1 / 3, 2 / 3] + [1.0] * 10)
    assert factors(10, lr_warmup_ratio=0.0, lr_decay="constant") == [1.0] * 12
    assert factors(4, lr_warmup_ratio=1.0, lr_decay="constant")[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(4, lr_warmup_ratio=1.0, lr_decay="cosine")[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("decay", "floor", "expected"),
    [
        # 8 steps after 2 of warm-up; steps 2, 4, 6, 10 and 11 are 0, 1/4, 1/2 and all of the way.
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.0, 0.0]),
        ("linear", 0.2, [1.0, 0.8, 0.6, 0.2, 0.2]),
        ("cosine", 0.0, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0, 0.0]),
        ("cosine", 0.2, [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2, 0.2]),
        ("constant", 0.0, [1.0] * 5),
    ],
)
def test_decay(decay, floor, expected):
    got = factors(10, lr_warmup_ratio=0.2, lr_decay=decay, lr_min_ratio=floor)
    assert got[:2] == [0.5, 1.0]
    assert [got[step] for step in (2, 4, 6, 10, 11)] == pytest.approx(expected)


def test_scheduler_applies_the_factor_to_every_group():
    model = small_model()
    config = Optimizer(lr_warmup_ratio=0.5, lr_decay="linear", lr_min_ratio=0.0)
    optimizer = build_optimizer(model, config, lr=0.4)
    scheduler = build_scheduler(optimizer, config, total_steps=4)
    seen = []
    for _ in range(5):
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        seen.append(rates.pop())
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.0])


# ---------------------------------------------------------------- as a job uses it


def test_actor_learning_rate(tmp_path):
    # 40 prompts / 4 = 10 steps in all; the schedule follows them and not max_steps.
    from tiny_job import prompt_file

    prompts = prompt_file(tmp_path / "prompts.jsonl", 40)
    options = {"prompt_data": prompts, "max_steps": 3, "actor_learning_rate": 0.02}
    options |= {"lr_warmup_ratio": 0.2, "lr_decay": "linear", "lr_min_ratio": 0.5}
    run(tmp_path / "a", **options)
    assert [record["lr"] for record in records(tmp_path / "a")] == pytest.approx([0.01, 0.02, 0.02])
    # With two optimizer steps a rollout there are 20: 4 of warm-up, means of 1st/2nd and so on.
    run(tmp_path / "b", **options, train_batch_size=8)
    expected = [0.02 * (0.25 + 0.5) / 2, 0.02 * (0.75 + 1) / 2, 0.02 * (1 + 1 - 0.5 / 16) / 2]
    assert [record["lr"] for record in records(tmp_path / "b")] == pytest.approx(expected)
