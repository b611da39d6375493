"""Whole GRPO steps on GPUs: seconds by phase and peak memory, through the trainer itself.

    python benchmarks/grpo_step.py [--engine native] [--gpus 1] [--engine_tp_size 1]

Random weights in the shape of Qwen2.5, bf16, 128 prompts x 8 samples x 512 tokens, prompts of 128
tokens, one optimizer step a rollout; further flags go to torchrft.train as they are, and replace
those of the same name here. The first step compiles; the table has the others' median.
`--model tiny` runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import REPOSITORY, machine, table
from engines import OPTIONS, folder_of

PROMPT = 128
PHASES = ("rollout", "reward", "logprob", "update", "weight_sync", "step")
METRICS = (
    *("throughput/tokens_per_second", "memory/peak_gib", "memory/gpu_gib"),
    *("mismatch/logprob_abs_mean", "response_length/mean", "grad_norm"),
)


def prompt_file(folder: str, count: int) -> str:
    """Prompts of 127 random digits and "=": one token each for the debug tokenizer."""
    draw = random.Random(0)
    path = Path(folder, "prompts.jsonl")
    rows = ("".join(draw.choices("0123456789", k=PROMPT - 1)) + "=" for _ in range(count))
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return str(path)


def command(options: argparse.Namespace, folder: str, model: str) -> list[str]:
    engine = dict(OPTIONS[options.engine])
    tables = [
        f"[rollout.{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in table.items())
        for name, table in engine.items()
        if isinstance(table, dict)
    ]
    if options.eager:
        tables = ["[rollout.vllm]\nenforce_eager = true"] if options.engine == "vllm" else tables
    toml = Path(folder, "engine.toml")
    toml.write_text("\n".join(tables) + "\n")
    on_gpu = options.model != "tiny"
    flags = {
        "config_file": toml,
        "pretrain": model,
        "init": "random",
        "prompt_data": prompt_file(folder, options.prompts * (options.steps + 1)),
        "save_path": f"{folder}/run",
        "functions": f"{REPOSITORY}/tests/tiny_rewards.py:spread",
        "engine_type": options.engine.replace("compiled", "native"),
        "max_num_seqs": options.prompts * 8 // options.gpus * options.engine_tp_size,
        "max_steps": options.steps + 1,
        "rollout_batch_size": options.prompts,
        "n_samples_per_prompt": 8,
        "train_batch_size": options.prompts * 8,
        "max_len": PROMPT + options.tokens,
        "prompt_max_len": PROMPT,
        "max_new_tokens": options.tokens,
        "top_p": 1.0,
        "init_kl_coef": 0.0,
        "mismatch_alarm": 1.0,
        "packing_samples": "true",
        "max_tokens_per_microbatch": options.micro,
        "fused_linear_logprob": "true",
        "bf16": str(on_gpu).lower(),
        "compile": str(on_gpu).lower(),
        "save_interval": 1000000,
    }
    if options.engine_tp_size > 1:
        flags["engine_tp_size"] = options.engine_tp_size
    flags = {key: value for key, value in flags.items() if f"--{key}" not in options.more}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.gpus)]
    return [sys.executable, *run, "-m", "torchrft.train", *words, *options.more]


def steps_of(words: list[str], save_path: Path, count: int) -> list[dict[str, float]]:
    """The first `count` steps' metrics of a job, which is then ended: a checkpoint of such a model
    takes longer than all steps. With the GPUs' memory in use, where nvidia-smi tells it."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    job = subprocess.Popen(words, env=environment)
    log, steps, most = save_path / "logs/metrics.jsonl", list[dict[str, float]](), 0.0
    while len(steps) < count:
        if job.poll() is not None:
            sys.exit(job.returncode or 1)
        time.sleep(0.5)
        most = max(most, gpu_memory_gib())
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        for line in whole.splitlines()[len(steps) :]:
            steps.append({**json.loads(line), "memory/gpu_gib": most})
            most = 0.0
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    for process in (job.pid, *map(int, ranks.stdout.split())):
        os.kill(process, signal.SIGKILL)
    job.wait()
    return steps[:count]


def gpu_memory_gib() -> float:
    """What is in use on the fullest GPU that is visible, by whatever process; 0 without one."""
    if not shutil.which("nvidia-smi"):
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    output = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return max((float(used) / 1024 for used in output if used.isdigit()), default=0.0)


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """By phase, and of what else the table shows."""
    found = {f"{name} s": median(step[f"time/{name}"] for step in steps) for name in PHASES}
    return found | {key: median(step[key] for step in steps) for key in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="native", choices=list(OPTIONS))
    parser.add_argument("--model", default="1.5b")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--engine_tp_size", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--eager", action="store_true", help="vLLM starts without graphs")
    options, options.more = parser.parse_known_args()
    folder = tempfile.mkdtemp()
    words = command(options, folder, folder_of(options.model))
    found = medians(steps_of(words, Path(folder, "run"), options.steps)[1:])
    print(
        f"{machine('torch', 'transformers')}; {options.model}, {options.gpus} GPUs, "
        f"{options.engine}, engine_tp_size {options.engine_tp_size}, {' '.join(options.more)}"
    )
    print(table(["", "median"], [[key, f"{value:,.4g}"] for key, value in found.items()]))


if __name__ == "__main__":
    main()
