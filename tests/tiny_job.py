"""Runs of a few steps that take a fraction of a second each, in this process or in a forked one."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import FORKSERVER

from torchrft.config.job_config import JobConfig
from torchrft.config.manager import load

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests" / "assets"
MODEL = str(ASSETS / "debug_model")
SPREAD = f"{ROOT}/tests/tiny_rewards.py:spread"
# Without the time that a worker process takes to start.
IN_PROCESS = f'[{{ name = "{SPREAD}", isolate = false }}]'

# 2 steps of 4 prompts x 4 samples of at most 3 tokens, one optimizer step each.
FLAGS: dict[str, str] = {
    "pretrain": MODEL,
    "init": "random",
    "prompt_data": str(ASSETS / "max_digit" / "train.jsonl"),
    "max_len": "16",
    "prompt_max_len": "12",
    "max_steps": "2",
    "train_batch_size": "16",
    "micro_train_batch_size": "4",
    "bf16": "false",
    "actor_learning_rate": "1e-3",
    "engine_type": "native",
    "rollout_batch_size": "4",
    "n_samples_per_prompt": "4",
    "micro_rollout_batch_size": "4",
    "max_new_tokens": "3",
    # So that responses differ in length although an untrained policy hardly ever ends one.
    "stop_token_ids": ",".join(map(str, range(10, 28))),
    "top_p": "1.0",
    "init_kl_coef": "0.0",
    "functions": IN_PROCESS,
}


def argv(**options: Any) -> list[str]:
    """The tiny job's command line; an option of None leaves the flag out."""
    flags = FLAGS | {name: None if value is None else str(value) for name, value in options.items()}
    words = [(f"--{name}", value) for name, value in flags.items() if value is not None]
    return [word for pair in words for word in pair]


def tiny_config(world_size: int = 1, **options: Any) -> JobConfig:
    return load(argv(**options), world_size).config


@contextmanager
def trainer(save_path: str | Path, **options: Any) -> Iterator[Any]:
    """A Trainer of this process, in a process group of its own."""
    from torchrft.tools import distributed
    from torchrft.trainer import Trainer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    world = distributed.setup()
    try:
        yield Trainer(tiny_config(save_path=save_path, **options), world)
    finally:
        distributed.teardown()
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def run(save_path: str | Path, **options: Any) -> Any:
    """Trains to the end and returns the Trainer."""
    with trainer(save_path, **options) as job:
        assert job.train() is None
    return job


def records(save_path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = Path(save_path, "logs", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rollout(save_path: str | Path, step: int) -> list[dict[str, Any]]:
    """The rows of rollouts/step-N.jsonl."""
    text = Path(save_path, "logs", "rollouts", f"step-{step}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def weights(job: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in job.learner.model.named_parameters()}


def prompt_file(path: Path, count: int) -> Path:
    """The first `count` training prompts."""
    lines = (ASSETS / "max_digit" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:count]))
    return path


# ------------------------------------------------------------ a process of its own


def run_process(words: list[str], log: Path, interruption: tuple | None = None) -> int:
    """`python -m torchrft.train WORDS` in a process forked from one that has imported everything.

    `interruption` = (where, count, signal, when): the process sends itself `signal` "before" or
    "after" the count-th call of the function `where`, as in ("torchrft.trainer:Trainer.save", 2,
    signal.SIGKILL, "before"). Output goes to `log`. Returns the exit code, negative for a signal.
    """
    process = FORKSERVER.Process(target=_main, args=(words, str(log), interruption))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise TimeoutError(log.read_text())
    assert process.exitcode is not None
    return process.exitcode


def _main(words: list[str], log: str, interruption: tuple | None) -> None:
    from torchrft.train import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    if interruption is not None:
        _interrupt(*interruption)
    raise SystemExit(main(words))


def _interrupt(where: str, count: int, signum: signal.Signals, when: str) -> None:
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for owner in owners:
        holder = getattr(holder, owner)
    original = getattr(holder, name)
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signum)
        result = original(*args, **kwargs)
        if calls == count and when == "after":
            os.kill(os.getpid(), signum)
        return result

    setattr(holder, name, interrupted)
