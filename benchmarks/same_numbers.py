"""Every number of short runs, to the last digit: before and after a change that must not show.

    OMP_NUM_THREADS=1 python benchmarks/same_numbers.py --out before.json
    OMP_NUM_THREADS=1 python benchmarks/same_numbers.py --out after.json --compare before.json

It runs the default job, the job with images, one job an algorithm preset and one a layout over two
and four ranks, for a few steps each, and compares all metrics but times, speed and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import REPOSITORY, table

from torchrft.algorithms.presets import PRESETS

SMALL = "--rollout_batch_size 16 --train_batch_size 128"
SMALL = f"{SMALL} --max_tokens_per_microbatch 1024 --actor_learning_rate 5e-3 --lr_warmup_ratio 0"
SMALL = f"{SMALL} --functions tests/tiny_rewards.py:spread --n_samples_per_prompt 8"
ALONE = f"{SMALL} --micro_train_batch_size 64"
TP, SP, PADDED = "--tp_size 2", "--sp_size 2", "--packing_samples false"
LAYOUTS = {
    "dp": "",
    "zero1": "--zero_stage 1",
    "zero3": "--zero_stage 3",
    "fsdp": "--fsdp",
    "offload": "--fsdp --fsdp_cpu_offload",
    "hsdp": "--dp_replicate 2 --zero_stage 3",
    "tp": TP,
    "sp": SP,
    "padded tp": f"{PADDED} {TP}",
    "padded sp": f"{PADDED} {SP}",
    "fused tp": f"--fused_linear_logprob --chunk_size 64 {TP}",
    "checkpointing": "--gradient_checkpointing",
    "critic": "--advantage_estimator gae --reward_running_norm",
}
FOUR = {"dp4": "", "tp2 sp2": f"{TP} {SP}", "zero1 tp2": f"--zero_stage 1 {TP}", "hsdp 2x2": ""}
FOUR["hsdp 2x2"] = "--dp_replicate 2 --zero_stage 3"
MEASURED = ("time/", "throughput/", "memory/")  # these differ from run to run


def jobs() -> dict[str, tuple[int, str]]:
    """Ranks and flags of each job, by its name."""
    runs = {"default": (1, "--max_steps 12 --eval_steps 4")}
    runs["debug_vlm"] = (1, "--config_file train_configs/debug_vlm.toml --max_steps 8")
    for name in PRESETS:
        runs[f"preset {name}"] = (1, f"--advantage_estimator {name} --max_steps 3 {ALONE}")
    more = "--kl_controller adaptive --max_epochs 2 --entropy_coef 0.01 --freezing_actor_steps 1"
    runs["options"] = (1, f"--advantage_estimator gae {more} --max_steps 3 {ALONE}")
    selected = "--high_entropy_token_ratio 0.5 --rollout_correction token_tis --dynamic_sampling"
    runs["selected"] = (1, f"{selected} --max_steps 3 {ALONE}")
    for ranks, layouts in ((2, LAYOUTS), (4, FOUR)):
        for name, flags in layouts.items():
            size = f"--micro_train_batch_size {128 // ranks}"
            runs[f"{ranks} ranks {name}"] = (ranks, f"--max_steps 2 {SMALL} {size} {flags}")
    return runs


def run(ranks: int, flags: str) -> list[dict[str, float]]:
    """The metrics of each step of a job."""
    with tempfile.TemporaryDirectory() as folder:
        words = flags.split()
        environment = dict(os.environ, NGPU=str(ranks))
        if words[0] == "--config_file":
            environment["CONFIG_FILE"], words = words[1], words[2:]
        command = ["./run_train.sh", *words, "--save_path", folder]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode()}")
        lines = Path(folder, "logs", "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--only", default="", help="jobs whose name starts so")
    args = parser.parse_args()
    before = json.loads(args.compare.read_text()) if args.compare else {}
    results, lines = {}, []
    for name, (ranks, flags) in jobs().items():
        if not name.startswith(args.only):
            continue
        rows = results[name] = run(ranks, flags)
        equal = ""
        if name in before:
            # As text, where NaN is equal to itself.
            differing = [
                key
                for one, other in zip(rows, before[name], strict=True)
                for key in {**one, **other}
                if repr(one.get(key)) != repr(other.get(key))
            ]
            equal = f"differ: {', '.join(sorted(set(differing)))}" if differing else "equal"
        last = rows[-1]
        numbers = [repr(last.get(key)) for key in ("policy/loss", "grad_norm", "reward/mean")]
        lines.append([name, str(len(rows)), *numbers, equal])
        print(name, *numbers, equal, flush=True)
        if args.out:
            args.out.write_text(json.dumps(results))
    print(table(["job", "steps", "policy/loss", "grad_norm", "reward/mean", ""], lines))


if __name__ == "__main__":
    main()
