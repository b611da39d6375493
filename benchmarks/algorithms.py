"""Held-out reward of the default job under every algorithm: a table, and curves as a picture.

    python benchmarks/algorithms.py [--seed 0] [--only gae,cispo] [--jobs 2] [--figure FILE.png]

Only `advantage_estimator` changes, and for PPO the critic's learning rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
JOB = ROOT / "train_configs" / "debug_model.toml"
FLAGS: dict[str, list[str]] = {
    "group_norm": [],
    "dr_grpo": [],
    "rloo": [],
    "reinforce": [],
    "reinforce_plus_plus": [],
    "reinforce_baseline": [],
    "gae": ["--critic_learning_rate", "1e-3"],
    "dapo": [],
    "cispo": [],
    "gspo": [],
    "gmpo": [],
    "cpgd": [],
}


def run(name: str, seed: int, folder: Path, extra: list[str]) -> list[dict[str, float]]:
    """The metrics of a run of `name`, line by line."""
    command = [sys.executable, "-m", "torchrft.train", "--config_file", str(JOB)]
    command += ["--advantage_estimator", name, *FLAGS[name], "--seed", str(seed), *extra]
    command += ["--save_path", str(folder), "--plot_every", "100000"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="held-out reward", ylim=(0, 1.02))
    for index, (name, points) in enumerate(curves.items()):
        style = "-" if index < 6 else "--"
        axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.5)
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FLAGS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--figure", type=Path)
    options, extra = parser.parse_known_args()
    curves = {}
    print("| advantage_estimator | flags | first | step of 0.8 | last | seconds |")
    print("|---|---|---|---|---|---|")

    def carry_out(name: str) -> tuple[str, list[dict[str, float]]]:
        with tempfile.TemporaryDirectory() as folder:
            return name, run(name, options.seed, Path(folder), extra)

    pool = ThreadPoolExecutor(options.jobs)
    for name, records in pool.map(carry_out, options.only.split(",")):
        key = "eval/reward/mean"
        curve = [(int(r["step"]), r[key]) for r in records if r.get(key) is not None]
        curves[name] = curve
        reached = next((str(step) for step, reward in curve if reward >= 0.8), "never")
        seconds = sum(record["time/step"] for record in records)
        flags = " ".join(FLAGS[name]) or "none"
        row = [name, flags, f"{curve[0][1]:.2f}", reached, f"{curve[-1][1]:.2f}", f"{seconds:.0f}"]
        print("| " + " | ".join(row) + " |", flush=True)
    if options.figure:
        draw(curves, options.figure)


if __name__ == "__main__":
    main()
