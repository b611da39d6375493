"""Training loops of public form for `deepspeed_loops.py`, each reduced to what it calls."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, MICRO = 6, 4
LOOPS: dict[str, Callable[..., list[float]]] = {}


class Net(nn.Module):
    """Two layers, and a branch that a loop may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branch, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden + self.branch(hidden) if branch else hidden)


class Both(Net):
    """Two outputs."""

    def forward(self, x: Tensor, branch: bool = True) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden), self.branch(hidden)


def loop(function: Callable[..., list[float]]) -> Callable[..., list[float]]:
    LOOPS[function.__name__] = function
    return function


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Another batch for every rank and micro-batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1000 + step * ranks + rank)
    x = torch.randn(MICRO, 6, generator=generator)
    return x, x.sum(-1, keepdim=True)


def config(stage: int, **changes: Any) -> dict[str, Any]:
    adam = {"type": "Adam", "params": {"lr": 0.05, "torch_adam": True, "weight_decay": 0.0}}
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "optimizer": adam,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    } | changes


def start(ds: Any, stage: int, model: nn.Module | None = None, **changes: Any) -> Any:
    """An engine; `changes` of the config, or of initialize where it has that name."""
    names = ("optimizer_", "lr_scheduler_", "parameters_")
    own = {name: changes.pop(name) for name in names if name in changes}
    model = model or Net()
    settings = config(stage, **changes)
    if "optimizer_" in own:
        settings.pop("optimizer")
    given = own.get("optimizer_", lambda parameters: None)(model)
    parameters = own.get("parameters_", lambda model: list(model.parameters()))(model)
    engine, *_ = ds.initialize(
        model=model,
        optimizer=given,
        model_parameters=None if given is not None else parameters,
        lr_scheduler=own.get("lr_scheduler_", lambda optimizer: None)(given),
        config=settings,
    )
    return engine


def start_sgd(ds: Any, stage: int, model: nn.Module | None = None, **changes: Any) -> Any:
    """An engine whose steps show the gradients' scale, which Adam and clipping would hide."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    return start(ds, stage, model, optimizer_=sgd, gradient_clipping=0.0, **changes)


def error_of(engine: Any, step: int, **options: Any) -> Tensor:
    x, y = batch(step)
    output = engine(x, **options)
    return (output - y).square().mean()


def plain_steps(engine: Any, steps: range, **options: Any) -> list[float]:
    losses = []
    for step in steps:
        loss = error_of(engine, step, **options)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def plain(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start(ds, stage))
    return plain_steps(engines[0], range(STEPS))


@loop
def clipped_at_a_tenth(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start(ds, stage, gradient_clipping=0.1))
    return plain_steps(engines[0], range(STEPS))


@loop
def not_clipped(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start(ds, stage, gradient_clipping=0.0))
    return plain_steps(engines[0], range(STEPS))


@loop
def accumulation(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start_sgd(ds, stage, gradient_accumulation_steps=3))
    return plain_steps(engines[0], range(3 * STEPS))


@loop
def evaluation_before_step(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        loss = error_of(engine, step)
        engine.backward(loss)
        engine.eval()
        with torch.no_grad():
            losses.append(error_of(engine, 77).item())
        engine.train()
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def loss_backward(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        loss = error_of(engine, step)
        loss.backward()
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def scaled_backward(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        loss = error_of(engine, step)
        engine.scale(loss).backward()
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def unused_every_other_step(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1), branch=step % 2 == 0)
    return losses


@loop
def unused_on_one_rank(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage))
    return plain_steps(engine, range(STEPS), branch=dist.get_rank() == 0)


@loop
def own_groups_and_schedule(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    def optimizer(model: Net) -> torch.optim.Optimizer:
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95))

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    engines.append(start(ds, stage, optimizer_=optimizer, lr_scheduler_=schedule))
    return plain_steps(engines[0], range(STEPS))


@loop
def warmup_and_decay(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    options = {"total_num_steps": 5, "warmup_num_steps": 3, "warmup_max_lr": 0.1}
    section = {"type": "WarmupDecayLR", "params": options}
    engines.append(start(ds, stage, scheduler=section))
    return plain_steps(engines[0], range(STEPS))


@loop
def zero_grad_first(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        engine.optimizer.zero_grad()
        losses += plain_steps(engine, range(step, step + 1))
    return losses


@loop
def zero_grad_per_micro_batch(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        engine.optimizer.zero_grad()
        losses += plain_steps(engine, range(step, step + 1))
    return losses


@loop
def some_parameters(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start(ds, stage, parameters_=lambda model: list(model.second.parameters())))
    return plain_steps(engines[0], range(STEPS))


@loop
def frozen(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    model = Net()
    model.first.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    engines.append(start(ds, stage, model, parameters_=lambda _: trained))
    return plain_steps(engines[0], range(STEPS))


@loop
def own_boundary(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(STEPS):
        for micro in range(2):
            engine.set_gradient_accumulation_boundary(micro == 1)
            loss = error_of(engine, 2 * step + micro)
            engine.backward(loss)
            losses.append(loss.item())
        engine.step()
    return losses


@loop
def without_sync(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        with engine.no_sync():
            engine.backward(error_of(engine, 100 + step))
        losses += plain_steps(engine, range(step, step + 1))
    return losses


@loop
def unmanaged(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, managed_gradient_accumulation=False))
    losses = []
    for step in range(STEPS):
        for micro in range(1 + step % 2):
            loss = error_of(engine, 2 * step + micro)
            engine.backward(loss)
            losses.append(loss.item())
        engine.step()
    return losses


@loop
def two_outputs(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, Both(), gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        x, y = batch(step)
        one, two = engine(x)
        loss = (one - y).square().mean() + 0.1 * two.square().mean()
        loss.backward()
        engine.step()
        losses.append(loss.item())
    return losses


class WithLoss(Net):
    """Returns the loss and what it is made of, as transformers' models do."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = super().forward(x)
        return (output - y).square().mean(), output


@loop
def loss_of_the_model(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, WithLoss(), gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        loss, _ = engine(*batch(step))
        loss.backward()
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def saved_and_loaded(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    first = start(ds, stage)
    losses = plain_steps(first, range(3))
    first.save_checkpoint(folder, client_state={"step": 3})
    engines.append(start(ds, stage))
    _, state = engines[0].load_checkpoint(folder)
    return losses + plain_steps(engines[0], range(state["step"], STEPS))


@loop
def coupled_decay(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    options = {"lr": 0.05, "torch_adam": True, "adam_w_mode": False, "weight_decay": 0.2}
    engines.append(start(ds, stage, optimizer={"type": "Adam", "params": options}))
    return plain_steps(engines[0], range(STEPS))


@loop
def default_decay(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    options = {"lr": 0.05, "torch_adam": True}
    engines.append(start(ds, stage, optimizer={"type": "AdamW", "params": options}))
    return plain_steps(engines[0], range(STEPS))


@loop
def summed_over_ranks(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start_sgd(ds, stage, gradient_allreduce_op="sum"))
    return plain_steps(engines[0], range(STEPS))


@loop
def larger_batch_later(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage))
    losses = plain_steps(engine, range(2))
    engine.set_train_batch_size(2 * MICRO * dist.get_world_size())
    return losses + plain_steps(engine, range(2, STEPS))
