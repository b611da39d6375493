"""Training loops of public form on DeepSpeed and on torchrft.deepspeed: losses and weights agree.

    pip install deepspeed==0.19.8          # for the comparison; recorded figures need none
    OMP_NUM_THREADS=1 python benchmarks/deepspeed_loops.py [--record FILE]

Every loop runs with 1 and 2 gloo ranks in stages 0 to 3, in float32 on the CPU. The table has the
largest difference of losses (means over ranks) and of final weights, or the sentence with which
torchrft refuses a loop. `--record` writes the file that the tests compare with,
tests/assets/deepspeed_loops.json.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import table
from torch import Tensor, nn

RECORDED = Path(__file__).parents[1] / "tests" / "assets" / "deepspeed_loops.json"
STEPS, MICRO = 6, 4
LOOPS: dict[str, Callable[..., list[float]]] = {}
ON_PURPOSE = {
    ("unused_every_other_step", 3): "DeepSpeed's stage 3 trains on the gradient of the step before",
    **{("loss_of_the_model", s): "DeepSpeed divides by the micro-batches twice" for s in (1, 2)},
}
"""Where torchrft differs from DeepSpeed 0.19.8, and why."""


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


# ---------------------------------------------------------------- running them


def weights(engine: Any, stage: int) -> list[float]:
    """All parameters, whole, in their order."""
    values = []
    for parameter in engine.module.parameters():
        with gathered(parameter, stage):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            values += whole.detach().flatten().tolist()
    return values


@contextlib.contextmanager
def gathered(parameter: Tensor, stage: int) -> Iterator[None]:
    if hasattr(parameter, "ds_id") and not hasattr(parameter, "full_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            yield
    else:
        yield


def rank_main(rank: int, ranks: int, library: str, cases: list[Any], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if library == "deepspeed":
        import deepspeed
    else:
        from torchrft import deepspeed
    results = {}
    for name, stage in cases:
        engines: list[Any] = []
        try:
            losses = LOOPS[name](deepspeed, stage, engines, f"{folder}/{name}-{stage}")
            results[name, stage] = losses, weights(engines[0], stage)
        except Exception as error:
            results[name, stage] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    Path(folder, f"result-{rank}").write_bytes(pickle.dumps(results))
    dist.barrier()
    os._exit(0)  # DeepSpeed's destructors may wait for each other


def run(library: str, ranks: int, cases: list[Any]) -> dict[Any, Any]:
    """By case: losses, means over ranks, and rank 0's weights; or what was raised.

    Where a library aborts the processes, the halves of the cases run by themselves.
    """
    try:
        return run_together(library, ranks, cases)
    except (mp.ProcessExitedException, mp.ProcessRaisedException, FileNotFoundError) as error:
        if len(cases) == 1:
            return {cases[0]: f"aborts ({type(error).__name__})"}
        half = len(cases) // 2
        return run(library, ranks, cases[:half]) | run(library, ranks, cases[half:])


def run_together(library: str, ranks: int, cases: list[Any]) -> dict[Any, Any]:
    """As `run`, in one group of processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, library, cases, folder)
        mp.start_processes(rank_main, args=arguments, nprocs=ranks, start_method="spawn")
        results = [pickle.loads(Path(folder, f"result-{r}").read_bytes()) for r in range(ranks)]
    means = {}
    for case in cases:
        one = results[0][case]
        if not isinstance(one, str):
            pairs = zip(*(result[case][0] for result in results), strict=True)
            one = [sum(pair) / ranks for pair in pairs], one[1]
        means[case] = one
    return means


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def compare(mine: Any, theirs: Any) -> str:
    """The largest differences of losses and weights, or who refused."""
    if isinstance(mine, str):
        both = " (DeepSpeed too)" if isinstance(theirs, str) else ""
        return f"refused{both}: {mine}"
    if isinstance(theirs, str):
        return f"runs; DeepSpeed: {theirs}"
    return " / ".join(f"{largest_difference(*pair):.0e}" for pair in zip(mine, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loops", nargs="*", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--record", type=Path, help="write DeepSpeed's figures there")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    has_peer = importlib.util.find_spec("deepspeed") is not None
    recorded = {} if has_peer else json.loads(RECORDED.read_text())
    version = importlib.metadata.version("deepspeed") if has_peer else recorded["deepspeed"]
    print(f"torch {torch.__version__}, DeepSpeed {version}{'' if has_peer else ' (recorded)'}")
    cases = [(name, stage) for name in options.loops for stage in options.stages]
    rows, figures = [], {}
    for ranks in options.ranks:
        mine = run("torchrft", ranks, cases)
        theirs = run("deepspeed", ranks, cases) if has_peer else {}
        for name, stage in cases:
            key = f"{name} {ranks} {stage}"
            peer = theirs[name, stage] if has_peer else recorded["loops"][key]
            figures[key] = peer
            verdict = compare(mine[name, stage], peer)
            if (name, stage) in ON_PURPOSE:
                verdict += f" ({ON_PURPOSE[name, stage]})"
            rows.append([name, str(ranks), str(stage), verdict])
    print(table(["loop", "ranks", "stage", "largest difference of losses / weights"], rows))
    if options.record:
        rounded = {
            key: value if isinstance(value, str) else [[round(x, 7) for x in v] for v in value]
            for key, value in figures.items()
        }
        whole = {"deepspeed": version, "torch": torch.__version__, "loops": rounded}
        options.record.write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
