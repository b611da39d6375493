"""More training loops of public form for `deepspeed_loops.py`, as whole programs write them."""

import argparse
import contextlib
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed_cases import (
    MICRO,
    STEPS,
    Net,
    batch,
    config,
    error_of,
    loop,
    plain_steps,
    start,
    start_sgd,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Language(nn.Module):
    """Embedding, a normalized layer, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(self.norm(hidden + torch.tanh(self.layer(hidden))))


def tokens(step: int) -> Tensor:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(500 + step * ranks + rank)
    return torch.randint(0, 11, (MICRO, 6), generator=generator)


def next_token_loss(engine: Any, step: int) -> Tensor:
    ids = tokens(step)
    return F.cross_entropy(engine(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def no_decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The two groups of transformers' and of DeepSpeed's examples."""
    names = ["bias", "norm"]
    plain = [p for n, p in model.named_parameters() if any(word in n for word in names)]
    decayed = [p for n, p in model.named_parameters() if not any(word in n for word in names)]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def adam(**params: Any) -> dict[str, Any]:
    return {"type": "Adam", "params": {"lr": 0.05, "torch_adam": True, **params}}


@loop
def hf_groups(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 0.05, "warmup_num_steps": 3}
    engine = start(
        ds,
        stage,
        Language(),
        parameters_=no_decay_groups,
        optimizer={
            "type": "AdamW",
            "params": {"lr": 0.05, "betas": [0.9, 0.95], "torch_adam": True},
        },
        scheduler={"type": "WarmupLR", "params": warmup},
        gradient_accumulation_steps=2,
    )
    engines.append(engine)
    losses = []
    for step in range(2 * STEPS):
        loss = next_token_loss(engine, step)
        engine.backward(loss)
        engine.step()
        losses += [loss.item(), engine.get_lr()[0], engine.optimizer.param_groups[1]["lr"]]
    return losses


def scheduled(ds: Any, stage: int, engines: list[Any], kind: str, **params: Any) -> list[float]:
    engines.append(start(ds, stage, scheduler={"type": kind, "params": params}))
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engines[0], range(step, step + 1))
        losses += [float(lr) for lr in engines[0].get_lr()]
    return losses


@loop
def warmup_log(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    return scheduled(ds, stage, engines, "WarmupLR", warmup_max_lr=0.08, warmup_num_steps=4)


@loop
def warmup_linear(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    params = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.08, "warmup_num_steps": 3}
    return scheduled(ds, stage, engines, "WarmupLR", warmup_type="linear", **params)


@loop
def warmup_of_one_step(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    params = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.08, "warmup_num_steps": 1}
    return scheduled(ds, stage, engines, "WarmupDecayLR", total_num_steps=4, **params)


@loop
def warmup_cosine(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    params = {"total_num_steps": 5, "warmup_num_steps": 2, "cos_min_ratio": 0.1}
    return scheduled(ds, stage, engines, "WarmupCosineLR", warmup_min_ratio=0.2, **params)


@loop
def one_cycle(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    params = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 3}
    return scheduled(ds, stage, engines, "OneCycle", **params)


@loop
def range_test(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    params = {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2}
    return scheduled(ds, stage, engines, "LRRangeTest", **params)


@loop
def schedule_object(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """A schedule of DeepSpeed's that the script makes, on an optimizer of its own."""
    from importlib import import_module

    schedules = import_module(f"{ds.__name__}.runtime.lr_schedules")
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = schedules.WarmupDecayLR(
        optimizer, total_num_steps=6, warmup_max_lr=0.05, warmup_num_steps=2
    )
    settings = config(stage)
    settings.pop("optimizer")
    engine, optimizer, _, schedule = ds.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings
    )
    engines.append(engine)
    losses = []
    for step in range(STEPS):
        losses += [*plain_steps(engine, range(step, step + 1)), schedule.get_last_lr()[0]]
    return losses


@loop
def torch_schedule_object(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    model = Net()
    optimizer = torch.optim.AdamW(no_decay_groups(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    settings = config(stage)
    settings.pop("optimizer")
    engine, *_ = ds.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings
    )
    engines.append(engine)
    losses = []
    for step in range(STEPS):
        losses += [*plain_steps(engine, range(step, step + 1)), schedule.get_last_lr()[0]]
    return losses


@loop
def schedule_by_hand(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """The script steps its schedule, once per epoch; the engine does not know it."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    settings = config(stage)
    settings.pop("optimizer")
    engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=settings)
    engines.append(engine)
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        if step % 2:
            schedule.step()
    return losses


@loop
def rate_by_hand(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        losses += [*plain_steps(engine, range(step, step + 1)), engine.get_lr()[0]]
    return losses


@loop
def evaluation_between(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=3))
    losses = []
    for step in range(3 * STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        engine.eval()
        with torch.no_grad():
            value = error_of(engine, 77)
        ds.comm.all_reduce(value)
        losses.append(value.item() / dist.get_world_size())
        engine.train()
    return losses


@loop
def evaluation_of_the_module(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        engine.module.eval()
        with torch.inference_mode():
            losses.append(error_of(engine.module, 77).item())
        engine.module.train()
    return losses


@loop
def saved_within_a_step(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """A checkpoint between the micro-batches of a step, and training that goes on from it."""
    first = start_sgd(ds, stage, gradient_accumulation_steps=2)
    losses = plain_steps(first, range(5))
    first.save_checkpoint(folder, tag="mid")
    losses += plain_steps(first, range(5, 8))
    engines.append(start_sgd(ds, stage, gradient_accumulation_steps=2))
    engines[0].load_checkpoint(folder, tag="mid")
    losses += [float(engines[0].global_steps), float(engines[0].micro_steps)]
    return losses + plain_steps(engines[0], range(6, 12))


@loop
def rolled_back(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.08, "warmup_num_steps": 4}}
    engines.append(engine := start(ds, stage, scheduler=section))
    losses = plain_steps(engine, range(3))
    engine.save_checkpoint(folder)
    losses += plain_steps(engine, range(3, 5))
    engine.load_checkpoint(folder)
    return losses + plain_steps(engine, range(3, STEPS))


@loop
def only_the_module_loaded(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    first = start(ds, stage)
    losses = plain_steps(first, range(3))
    first.save_checkpoint(folder)
    engines.append(start(ds, stage))
    engines[0].load_checkpoint(folder, load_module_only=True)
    return losses + plain_steps(engines[0], range(3, STEPS)) + [float(engines[0].global_steps)]


@loop
def without_optimizer_states(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.08, "warmup_num_steps": 4}}
    first = start(ds, stage, scheduler=section)
    losses = plain_steps(first, range(3))
    first.save_checkpoint(folder)
    engines.append(start(ds, stage, scheduler=section))
    engines[0].load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    return losses + plain_steps(engines[0], range(3, STEPS))


@loop
def without_sync_but_last(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """The idiom of DistributedDataParallel."""
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=3))
    losses = []
    for step in range(3 * STEPS):
        last = step % 3 == 2
        with contextlib.nullcontext() if last else engine.no_sync():
            loss = error_of(engine, step)
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def tied(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage, Language()))
    losses = []
    for step in range(STEPS):
        loss = next_token_loss(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def two_losses_of_one_pass(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage))
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        output = engine(x)
        one, two = (output - y).square().mean(), output.abs().mean()
        engine.backward(one, retain_graph=True)
        engine.backward(two)
        engine.step()
        losses += [one.item(), two.item()]
    return losses


@loop
def two_passes_per_step(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage))
    losses = []
    for step in range(STEPS):
        for part in range(2):
            loss = error_of(engine, 2 * step + part)
            engine.backward(loss)
            losses.append(loss.item())
        engine.step()
    return losses


@loop
def two_passes_one_loss(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """Chosen and rejected, as preference training has them, with a reference engine."""
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    settings = {"train_micro_batch_size_per_gpu": MICRO}
    settings["zero_optimization"] = {"stage": stage if stage == 3 else 0}
    reference, *_ = ds.initialize(model=Net(), config=settings)
    reference.eval()
    losses = []
    for step in range(2 * STEPS):
        one, two = batch(step)[0], batch(100 + step)[0]
        with torch.no_grad():
            before = reference(one) - reference(two)
        loss = -F.logsigmoid(engine(one) - engine(two) - before).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def gan(ds: Any, stage: int, engines: list[Any], toggles: bool) -> list[float]:
    maker, judge = start(ds, stage), start(ds, stage, Judge())
    engines += [maker, judge]
    losses = []
    for step in range(STEPS):
        noise, real = batch(step)
        if toggles:
            judge.requires_grad_(True)
        fake = maker(noise)
        ones, zeros = torch.ones_like(real), torch.zeros_like(real)
        right = F.binary_cross_entropy_with_logits(judge(real), ones)
        wrong = F.binary_cross_entropy_with_logits(judge(fake.detach()), zeros)
        judge.backward(right + wrong)
        judge.step()
        if toggles:
            judge.requires_grad_(False)
        fooled = F.binary_cross_entropy_with_logits(judge(fake), ones)
        maker.backward(fooled)
        maker.step()
        judge.zero_grad()
        losses += [right.item(), wrong.item(), fooled.item()]
    return losses


@loop
def two_engines_gan(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    return gan(ds, stage, engines, toggles=False)


@loop
def two_engines_gan_with_switches(
    ds: Any, stage: int, engines: list[Any], folder: str
) -> list[float]:
    return gan(ds, stage, engines, toggles=True)


@loop
def actor_and_critic(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """PPO's shape: experience from both in eval mode, then two epochs of updates of both."""
    actor = start(ds, stage, gradient_accumulation_steps=2)
    critic = start(ds, stage, copy.deepcopy(Net()), gradient_accumulation_steps=2)
    reference, *_ = ds.initialize(model=Net(), config={"train_micro_batch_size_per_gpu": MICRO})
    engines += [actor, critic]
    losses = []
    for step in range(3):
        actor.eval()
        critic.eval()
        with torch.no_grad():
            xs = [batch(10 * step + index) for index in range(2)]
            old = [(actor(x), critic(x), reference(x)) for x, _ in xs]
        actor.train()
        critic.train()
        for _ in range(2):
            for (x, y), (logprob, value, base) in zip(xs, old, strict=True):
                new = actor(x)
                advantage = y - value - 0.1 * (logprob - base)
                ratio = (new - logprob).clamp(-1, 1).exp()
                actor_loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
                actor.backward(actor_loss)
                actor.step()
                critic_loss = (critic(x) - y).square().mean()
                critic.backward(critic_loss)
                critic.step()
                losses += [actor_loss.item(), critic_loss.item()]
    return losses


@loop
def pass_of_the_module(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """`engine.module(x)` in training, then the engine's backward."""
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        loss = error_of(engine.module, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def pass_of_the_module_alone(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """`engine.module(x)` and `loss.backward()`, of which the engine sees nothing."""
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        loss = error_of(engine.module, step)
        loss.backward()
        engine.step()
        losses.append(loss.item())
    return losses


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class WithDataclass(Net):
    def forward(self, x: Tensor, y: Tensor) -> Output:  # type: ignore[override]
        output = super().forward(x)
        return Output((output - y).square().mean(), output.detach())


@loop
def output_object(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start_sgd(ds, stage, WithDataclass(), gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        output = engine(*batch(step))
        engine.backward(output.loss)
        engine.step()
        losses.append(output.loss.item())
    return losses


@loop
def output_object_alone(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """`output.loss.backward()` of an object that is no container."""
    engines.append(engine := start_sgd(ds, stage, WithDataclass(), gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        output = engine(*batch(step))
        output.loss.backward()
        engine.step()
        losses.append(output.loss.item())
    return losses


@loop
def moving_average(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """The chat example's average of the weights, in a second engine."""
    engine = start(ds, stage)
    average, *_ = ds.initialize(
        model=Net(),
        config={"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": 0}},
    )
    engines += [engine, average]
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        with torch.no_grad():
            pairs = zip(engine.module.parameters(), average.module.parameters(), strict=True)
            for parameter, mean in pairs:
                fetched = [
                    p
                    for p in (parameter, mean)
                    if hasattr(p, "ds_id") and p.ds_status == ds.zero.ZeroParamStatus.NOT_AVAILABLE
                ]
                with ds.zero.GatheredParameters(fetched, enabled=len(fetched) > 0):
                    mean.data.copy_(torch.lerp(parameter.data, mean.data, 0.9))
            losses.append(error_of(average, 77).item())
    return losses


@loop
def changed_before_the_first_step(
    ds: Any, stage: int, engines: list[Any], folder: str
) -> list[float]:
    model = Net()
    with ds.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        if dist.get_rank() == 0:
            for parameter in model.parameters():
                parameter.data.mul_(0.5)
    engines.append(start(ds, stage, model))
    return plain_steps(engines[0], range(STEPS))


@loop
def changed_between_steps(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = plain_steps(engine, range(3))
    parameters = list(engine.module.second.parameters())
    with ds.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)
    losses.append(error_of(engine, 77).item())
    engine.backward(error_of(engine, 3))
    engine.step()
    return losses + plain_steps(engine, range(4, STEPS))


@loop
def adapters(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """Only the adapter is trained, and handed over by a generator."""
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("branch" in name)
    chosen = lambda model: (p for p in model.parameters() if p.requires_grad)  # noqa: E731
    engines.append(start(ds, stage, model, parameters_=chosen))
    return plain_steps(engines[0], range(STEPS))


@loop
def frozen_but_handed_over(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    model = Net()
    model.first.requires_grad_(False)
    engines.append(start(ds, stage, model))
    return plain_steps(engines[0], range(STEPS))


@loop
def unfrozen_later(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        engine.module.branch.requires_grad_(step >= 3)
        losses += plain_steps(engine, range(step, step + 1))
    return losses


@loop
def arguments(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """`args.deepspeed_config`, an Hjson file, groups from a generator, `dist_init_required`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, f"ds-{dist.get_rank()}.json")
    text = json.dumps(config(stage, optimizer=adam(weight_decay=0.0)), indent=1)
    path.write_text(text.replace("{\n", "{  // a comment\n", 1).rstrip("}\n ") + ",\n}\n")
    parser = ds.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--local_rank", type=int, default=-1)
    given = ["--deepspeed", "--deepspeed_config", str(path), f"--local_rank={dist.get_rank()}"]
    args = parser.parse_args(given)
    ds.init_distributed()
    model = Net()
    engine, *_ = ds.initialize(
        args=args,
        model=model,
        model_parameters=(group for group in no_decay_groups(model)),
        dist_init_required=False,
    )
    engines.append(engine)
    return plain_steps(engine, range(STEPS))


@loop
def config_params(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    model = Net()
    unusual = {
        "wall_clock_breakdown": False,
        "steps_per_print": 2000,
        "prescale_gradients": False,
        "monitor_config": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": False},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = ds.initialize(
        model=model,
        model_parameters=model.parameters(),
        config_params=config(stage, **unusual),
        dist_init_required=True if not dist.is_initialized() else None,
    )
    engines.append(engine)
    return plain_steps(engine, range(STEPS))


@loop
def loader_of_the_engine(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """Three epochs of `training_data`, the last batch of which is not full."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(19, 6, generator=generator)
    model = Net()
    engine, _, loader, _ = ds.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=TensorDataset(x, x.sum(-1, keepdim=True)),
        config=config(stage),
    )
    engines.append(engine)
    losses = [float(len(loader))]
    for _ in range(3):
        for x, y in loader:
            loss = (engine(x) - y).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


@loop
def loader_without_end(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(19, 6, generator=generator)
    engines.append(engine := start(ds, stage))
    data = TensorDataset(x, x.sum(-1, keepdim=True))
    loader = iter(ds.utils.RepeatingLoader(engine.deepspeed_io(data)))
    losses = []
    for _ in range(2 * STEPS):
        x, y = next(loader)
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def norms_and_gradients(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """What scripts log: the norm, whole gradients, whole weights and Adam's state."""
    engines.append(engine := start(ds, stage, gradient_clipping=0.5))
    losses = []
    for step in range(STEPS):
        loss = error_of(engine, step)
        engine.backward(loss)
        for parameter in engine.module.first.parameters():
            gradient = ds.utils.safe_get_full_grad(parameter)
            losses.append(gradient.norm().item())
        engine.step()
        for _, parameter in engine.named_parameters():
            losses.append(ds.utils.safe_get_full_fp32_param(parameter).norm().item())
            state = ds.utils.safe_get_full_optimizer_state(parameter, "exp_avg_sq")
            losses.append(state.norm().item())
        losses += [loss.item(), float(engine.get_global_grad_norm())]
    return losses


@loop
def clipped_by_hand(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage, gradient_clipping=0.0))
    losses = []
    for step in range(STEPS):
        loss = error_of(engine, step)
        engine.backward(loss)
        torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.1)
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def optimizer_function(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    model = Net()
    settings = config(stage)
    settings.pop("optimizer")
    engine, *_ = ds.initialize(
        model=model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
        model_parameters=no_decay_groups(model),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        config=settings,
    )
    engines.append(engine)
    return plain_steps(engine, range(STEPS))


@loop
def sum_over_a_batch(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """A loss over tokens of different number, scaled by the script, not by the engine."""
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        x, y = batch(step)
        x, y = x[: 1 + step % MICRO], y[: 1 + step % MICRO]
        loss = (engine(x) - y).square().sum() / 8
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(loss.item())
    return losses


class Checkpointed(Net):
    """Computes its first layer again in the backward pass, by deepspeed.checkpointing."""

    def __init__(self, ds: Any) -> None:
        super().__init__()
        self.checkpoint = ds.checkpointing.checkpoint

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        hidden = self.checkpoint(lambda x: torch.tanh(self.first(x)), x.requires_grad_())
        return self.second(hidden + self.branch(hidden))


@loop
def recomputed(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start(ds, stage, Checkpointed(ds)))
    return plain_steps(engines[0], range(STEPS))


class Normalized(Net):
    """With running statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.normal, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.1)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        return self.second(self.drop(self.normal(torch.tanh(self.first(x)))))


@loop
def running_statistics(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(engine := start(ds, stage, Normalized()))
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        losses += plain_steps(engine, range(step, step + 1))
        engine.eval()
        with torch.no_grad():
            losses.append(error_of(engine, 77).item())
        engine.train()
    return losses


class Scaled(Net):
    """A parameter without dimension, as CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        return super().forward(x) * self.scale.exp()


@loop
def scalar_parameter(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    engines.append(start(ds, stage, Scaled()))
    return plain_steps(engines[0], range(STEPS))


@loop
def weights_on_rank_0(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """`state_dict()` and parameters of the module on rank 0 alone, as scripts save; not stage 3."""
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        value = 0.0
        if dist.get_rank() == 0 and stage < 3:
            state = engine.module.state_dict()
            value = sum(float(tensor.sum()) for tensor in state.values())
            value += sum(float(parameter.data.norm()) for parameter in engine.module.parameters())
        losses.append(value)
    return losses


@loop
def memory_and_names(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """Small calls between the steps of public programs."""
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        ds.get_accelerator().empty_cache()
        engine.tput_timer.update_epoch_count()
        names = sorted(name for name, _ in engine.named_parameters())
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.parameters())
        losses += [float(len(names[0])), float(numel), float(engine.global_samples)]
        losses += [
            float(engine.train_batch_size()),
            float(engine.is_gradient_accumulation_boundary()),
        ]
    return losses


@loop
def schedule_by_position(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    from importlib import import_module

    schedules = import_module(f"{ds.__name__}.runtime.lr_schedules")
    engine = start(
        ds,
        stage,
        optimizer_=lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
        lr_scheduler_=lambda optimizer: schedules.WarmupDecayLR(optimizer, 8, 0.01, 0.06, 3),
    )
    engines.append(engine)
    losses = []
    for step in range(STEPS):
        losses += [*plain_steps(engine, range(step, step + 1)), engine.get_lr()[0]]
    return losses


@loop
def frozen_at_first(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """A layer is frozen before `initialize` and trained later, as in gradual unfreezing."""
    model = Net()
    model.first.requires_grad_(False)
    engines.append(engine := start(ds, stage, model))
    losses = plain_steps(engine, range(3))
    engine.module.first.requires_grad_(True)
    return losses + plain_steps(engine, range(3, STEPS))


@loop
def weights_clamped(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """As critics of Wasserstein GANs are."""
    engines.append(engine := start(ds, stage))
    losses = []
    for step in range(STEPS):
        losses += plain_steps(engine, range(step, step + 1))
        for parameter in engine.module.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        with torch.no_grad():
            losses.append(error_of(engine, 77).item())
    return losses


@loop
def loaded_into_the_module(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """Weights of a file, after `initialize`."""
    engines.append(engine := start(ds, stage))
    torch.manual_seed(5)
    state = {name: torch.randn_like(value) / 4 for name, value in Net().state_dict().items()}
    engine.module.load_state_dict(state)
    with torch.no_grad():
        before = error_of(engine, 77).item()
    return [before, *plain_steps(engine, range(STEPS))]


@loop
def gradients_changed(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    """Gradients that are scaled in place and logged where a rank has them."""
    engines.append(engine := start_sgd(ds, stage, gradient_accumulation_steps=2))
    losses = []
    for step in range(2 * STEPS):
        loss = error_of(engine, step)
        engine.backward(loss)
        if step % 2:
            for parameter in engine.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
                    losses.append(parameter.grad.norm().item())
        engine.step()
        losses.append(loss.item())
    return losses


@loop
def schedule_loaded_alone(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.08, "warmup_num_steps": 4}}
    first = start(ds, stage, scheduler=section)
    losses = plain_steps(first, range(3))
    first.save_checkpoint(folder)
    engines.append(start(ds, stage, scheduler=section))
    engines[0].load_checkpoint(folder, load_optimizer_states=False)
    losses += [float(lr) for lr in engines[0].get_lr()]
    return losses + plain_steps(engines[0], range(3, STEPS))


@loop
def loader_that_drops(ds: Any, stage: int, engines: list[Any], folder: str) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(17, 6, generator=generator)
    model = Net()
    engine, _, loader, _ = ds.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=TensorDataset(x, x.sum(-1, keepdim=True)),
        collate_fn=torch.utils.data.default_collate,
        config=config(stage, dataloader_drop_last=True),
    )
    engines.append(engine)
    losses = [float(len(loader))]
    for x, y in loader:
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    test = engine.deepspeed_io(TensorDataset(x, y), route="eval", batch_size=3)
    return losses + [float(x.sum()) for x, _ in test]
