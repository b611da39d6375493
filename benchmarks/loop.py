"""Seconds per step of torchrft's loop by phase, beside TRL's GRPOTrainer on identical work.

    pip install trl accelerate && OMP_NUM_THREADS=1 python benchmarks/loop.py [--steps 12]

Both train the model of the default job from the same weights on the same prompts in the same
order, 64 prompts x 16 samples and one optimizer step a rollout, in fp32. First loss and gradient
norm must agree on the same completions. Then the two take steps alternately in this process. The
workloads change train_configs/debug_model.toml only as `WORKLOADS` says and leave out evaluation,
plots and checkpoints; torchrft still writes its metrics and rollouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import tomllib
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from common import DEBUG_MODEL, REPOSITORY, machine, table

try:
    import peer_trl
except ModuleNotFoundError as missing:
    sys.exit(f"benchmarks/loop.py needs {missing.name}: pip install -e . trl accelerate")

from torchrft.config.job_config import JobConfig
from torchrft.learn.batch import make_batch
from torchrft.rewards.registry import REWARDS
from torchrft.tools import distributed
from torchrft.tools.distributed import World
from torchrft.tools.seeds import derive_seed
from torchrft.trainer import Trainer
from torchrft.types import RolloutBatch, Sample, SamplingParams, Score

PHASES = ("rollout", "reward", "logprob", "update", "weight_sync", "other", "step")
COMPARED = ("rollout", "update", "step")
WARM_UP = 2
PEER_ROWS = (512, 128)  # micro-batch sizes tried for TRL; the better one is shown

# A tiny learning rate and a reward without signal keep the lengths as they are in the beginning.
_STILL = {
    "algorithm": {"init_kl_coef": 0.0},
    "optimizer": {"actor_learning_rate": 1e-6},
    "reward": {"functions": [{"name": f"{REPOSITORY}/benchmarks/rewards.py:checksum"}]},
}


def _lengths(longest: int, shortest: int) -> dict[str, Any]:
    return {
        **_STILL,
        "data": {"max_len": longest + 12},
        "rollout": {"max_new_tokens": longest, "min_new_tokens": shortest},
    }


WORKLOADS: dict[str, dict[str, Any]] = {
    "default job": {},
    "forced, 4 tokens": _lengths(4, 4),
    "forced, 16 tokens": _lengths(16, 16),
    "forced, 32 tokens": _lengths(32, 32),
    "forced, 16 tokens, 61-token prompts": _lengths(16, 16),
    "ragged, up to 64 tokens": _lengths(64, 0),
    "ragged, up to 128 tokens": _lengths(128, 0),
}


def few_shot(prompt_data: str, folder: str, shots: int = 8) -> str:
    """A file with the prompts of `prompt_data`, each after `shots` solved ones."""
    rows = [json.loads(line) for line in Path(prompt_data).read_text().splitlines()]
    solved = [f"{row['prompt']}{row['label']}\n" for row in rows]
    path = Path(folder) / "few_shot.jsonl"
    with path.open("w") as file:
        for i, row in enumerate(rows):
            before = "".join(solved[(i + k) % len(rows)] for k in range(1, shots + 1))
            file.write(json.dumps({**row, "prompt": before + row["prompt"]}) + "\n")
    return str(path)


def job(name: str, folder: str) -> JobConfig:
    """The default job with the changes of the workload `name`, writing to `folder`."""
    values = tomllib.loads((REPOSITORY / "train_configs/debug_model.toml").read_text())
    values["model"]["pretrain"] = DEBUG_MODEL
    values["data"]["prompt_data"] = str(REPOSITORY / values["data"]["prompt_data"])
    values["evaluation"] = {}
    values["checkpoint"] = {"save_path": folder}
    values["optimizer"] |= {"lr_decay": "constant", "lr_warmup_ratio": 0.0}
    for section, options in WORKLOADS[name].items():
        values[section] = {**values.get(section, {}), **options}
    if "61-token" in name:
        values["data"]["prompt_data"] = few_shot(values["data"]["prompt_data"], folder)
        values["data"] |= {"max_len": values["data"]["max_len"] + 56, "prompt_max_len": 61}
    return JobConfig.model_validate(values)


class Torchrft:
    """torchrft's trainer, one timed step at a time."""

    def __init__(self, config: JobConfig, world: World) -> None:
        self.trainer = Trainer(config, world)
        self.steps: list[dict[str, float]] = []
        trainer = self.trainer
        trainer._sync_weights()

    def step(self) -> None:
        """What `Trainer.train` does in a step, but for console, plots, evaluation and saving."""
        trainer = self.trainer
        with trainer.timer.phase("step"):
            metrics = trainer.train_step()
            trainer.reporter.write_step(trainer.progress.step, metrics)
        spent = {name.removeprefix("time/"): value for name, value in trainer.timer.pop().items()}
        spent["other"] = 2 * spent["step"] - sum(spent.values())  # the step less its phases
        self.steps.append(spent | {"length": metrics["response_length/mean"]})


def sampled_batch(trainer: Trainer, config: JobConfig) -> RolloutBatch:
    """A batch of one rollout, with TRL's advantages and with old log-probs that were disturbed.

    Undisturbed, all ratios would be 1: nothing would be clipped and the loss would be 0.
    """
    prompts = trainer.prompts.stream.next()
    n = config.rollout.n_samples_per_prompt
    sampling = SamplingParams(
        n=n,
        max_new_tokens=config.rollout.max_new_tokens,
        seeds=tuple(tuple(derive_seed(0, i, j) for j in range(n)) for i in range(len(prompts))),
    )
    completions = trainer.engine.generate(prompts, sampling)
    reward = REWARDS.get(config.reward.functions[0].name)
    samples = [
        Sample(prompts[c.prompt_index], c, Score(reward(c.text)), c.prompt_index)
        for c in completions
    ]
    batch = make_batch(samples)
    rewards = batch.rewards.view(-1, n)
    centered = rewards - rewards.mean(1, keepdim=True)
    advantages = (centered / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1) * batch.mask
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    old = (batch.rollout_logprobs + 0.3 * noise) * batch.mask
    return dataclasses.replace(batch, advantages=advantages, old_logprobs=old)


def check(world: World) -> str:
    """Asserts that both sides get the same loss and gradient norm on the same completions."""
    with tempfile.TemporaryDirectory() as folder:
        config = job("ragged, up to 64 tokens", folder)
        mine = Torchrft(config, world).trainer
        peer = peer_trl.build(mine, config, 1, peer_trl.StepClock(lambda: None))
        batch = sampled_batch(mine, config)
        loss, norm = peer_trl.loss_and_norm(peer, batch)
        metrics = mine.learner.update(batch)
    for name, theirs in (("policy/loss", loss), ("grad_norm", norm)):
        error = abs(metrics[name] - theirs) / abs(theirs)
        assert error < 1e-4, f"{name}: torchrft {metrics[name]}, TRL {theirs}"
    return (
        f"{len(batch)} samples, {int(batch.mask.sum())} tokens, "
        f"{metrics['policy/clip_fraction']:.0%} clipped: "
        f"loss {metrics['policy/loss']:.7f} (TRL {loss:.7f}), "
        f"gradient norm {metrics['grad_norm']:.6f} (TRL {norm:.6f})"
    )


def alternate(name: str, world: World, steps: int, rows: int) -> dict[str, dict[str, float]]:
    """Median seconds per phase, and mean length, of both sides; TRL with `rows` a micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        config = job(name, folder)
        mine = Torchrft(config, world)
        clock = peer_trl.StepClock(mine.step)
        peer_trl.build(mine.trainer, config, WARM_UP + steps, clock, rows).train()
    sides = {}
    for side, taken in (("torchrft", mine.steps[WARM_UP:]), ("TRL", clock.steps[WARM_UP:])):
        sides[side] = {phase: median(step.get(phase, 0.0) for step in taken) for phase in PHASES}
        sides[side]["length"] = fmean(step["length"] for step in taken)
    pairs = list(zip(mine.steps[WARM_UP:], clock.steps[WARM_UP:], strict=True))
    sides["TRL/torchrft"] = {p: median(b[p] / a[p] for a, b in pairs) for p in COMPARED}
    return sides


def measure(name: str, world: World, steps: int) -> list[list[str]]:
    """The table's rows of one workload, with the micro-batch size that TRL does best with."""
    runs = {rows: alternate(name, world, steps, rows) for rows in PEER_ROWS}
    ratios = {rows: run["TRL/torchrft"]["step"] for rows, run in runs.items()}
    others = ", ".join(f"{ratio:.2f} with {rows} rows" for rows, ratio in ratios.items())
    print(f"{name}: TRL/torchrft {others}", flush=True)
    best = min(ratios, key=ratios.__getitem__)
    lines = []
    for side, values in runs[best].items():
        digits = 2 if "/" in side else 4
        label = f"TRL, {best} rows" if side == "TRL" else side
        length = f"{values['length']:.1f}" if "length" in values else ""
        cells = [f"{values[p]:.{digits}f}" if p in values else "" for p in PHASES]
        lines.append([name, label, length, *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="run the workloads whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    packages = ("torch", "transformers", "trl")
    print(f"{machine(*packages)}; {options.threads} thread(s), fp32")
    world = distributed.setup()
    try:
        print(f"equal work: {check(world)}")
        print(f"Seconds a step, median of {options.steps} alternating steps after {WARM_UP}")
        for name in WORKLOADS:
            if options.only in name:
                rows = measure(name, world, options.steps)
                print(f"\n{table(['workload', '', 'mean length', *PHASES], rows)}", flush=True)
    finally:
        distributed.teardown()


if __name__ == "__main__":
    main()
