"""Kills jobs at random moments, lets them go on, and compares every bit of their ends.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200 [--seed 0] [--only async,server]

Each job is a small one of five steps through ./run_train.sh, with checkpoints, exports, evaluations
and a rule in a worker. `kill -9` hits the launcher, a rank, a worker or the reward server while the
job runs, up to three times, until it ends by itself. Its weights, metrics (but for seconds and
memory), rollouts and list of checkpoints must then be those of the same job without a kill, and no
temporary folder may be left. Prints a row for each variant and victim; ends with 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY, machine, table

ASSETS = REPOSITORY / "tests" / "assets"
RULES = """
def digits(response):
    return 0.1 * sum(map(str.isdigit, response)) - 0.01 * len(response)
"""
# The next rollout is made beside the update; the native engine stands in for servers.
ASYNC = """
import sys
from torchrft import train
from torchrft.build import rollout
build = rollout.build_engine
plain = {"engine_type": "native", "server_urls": []}
rollout.build_engine = lambda config, *rest, **options: build(
    config.model_copy(update=plain), *rest, **options)
train.run(sys.argv[1:])
"""
FLAGS = {
    "pretrain": ASSETS / "debug_model",
    "init": "random",
    "prompt_data": ASSETS / "max_digit" / "train.jsonl",
    "eval_data": ASSETS / "max_digit" / "eval.jsonl",
    "eval_steps": 2,
    "max_len": 16,
    "prompt_max_len": 12,
    "max_steps": 5,
    "save_steps": 1,
    "max_ckpt_num": 2,
    "train_batch_size": 32,
    "micro_train_batch_size": 8,
    "bf16": "false",
    "actor_learning_rate": 1e-3,
    "engine_type": "native",
    "rollout_batch_size": 8,
    "n_samples_per_prompt": 4,
    "max_new_tokens": 4,
    "plot_every": 2,
    "stop_token_ids": ",".join(map(str, range(10, 28))),
}
SERVED = {"engine_type": "vllm", "server_urls": "http://127.0.0.1:1", "async_level": 1}
VICTIMS = {
    "one process": ("job", "worker"),
    "two ranks": ("launcher", "rank", "worker"),
    "async": ("job",),
    "server": ("job", "server"),
}
MEASURED = ("time/", "throughput/", "memory/")


@dataclass
class Job:
    """One job of a variant in a folder of its own."""

    variant: str
    folder: Path
    rules: Path
    url: str = ""

    def start(self) -> subprocess.Popen[bytes]:
        flags: dict[str, Any] = FLAGS | {"save_path": self.folder}
        if self.variant == "async":
            flags |= SERVED | {"rollout_correction": "token_tis"}
        if self.variant == "server":
            flags |= {"remote_rm_url": self.url, "remote_rm_deadline": 60}
        else:
            flags["functions"] = f'[{{ name = "{self.rules}:digits" }}]'
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = ["python", "-m", "torchrft.launch"]
        if self.variant == "async":
            command = ["python", "-c", ASYNC]
        ranks = "2" if self.variant == "two ranks" else "1"
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *words, "--load_checkpoint"],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                env=os.environ | {"NGPU": ranks, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def end(self) -> dict[str, Any]:
        """All that must be equal, by name."""
        logs, steps = self.folder / "logs", sorted(os.listdir(self.folder / "checkpoints"))
        rows = [json.loads(row) for row in (logs / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]
        rollouts = {path.name: path.read_text() for path in (logs / "rollouts").iterdir()}
        weights = (self.folder / "hf" / "step-5" / "model.safetensors").read_bytes()
        names = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        left = [name for name in names if name.endswith((".tmp", ".old"))]
        return {
            **{"weights": weights, "metrics": kept, "rollouts": rollouts, "checkpoints": steps},
            **{"exports": sorted(os.listdir(self.folder / "hf")), "left over": left},
        }


class Server:
    """The reward server, which is started again as soon as it has been killed."""

    def __init__(self, rules: Path) -> None:
        self.rules, self.port = rules, 20000 + os.getpid() % 20000
        self.url = f"http://127.0.0.1:{self.port}/score"
        self.start()

    def start(self) -> None:
        config = self.rules.with_suffix(".toml")
        config.write_text(f'[reward]\nfunctions = [{{ name = "{self.rules}:digits" }}]\n')
        words = ["--config", str(config), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torchrft.rewards.server", *words],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise SystemExit("the reward server does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def below(pid: int) -> list[tuple[int, str]]:
    """Processes that `pid` has started, directly or not, with their command lines."""
    processes = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            try:
                words = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            processes += [(child, words), *below(child)]
    return processes


def kill(job: subprocess.Popen[bytes], victim: str, server: Server | None) -> bool:
    """Whether there was somebody to kill."""
    if victim == "server" and server is not None:
        server.kill()
        server.start()
        return True
    pids = [job.pid]
    if victim in ("rank", "worker"):
        mark = "torchrft.train" if victim == "rank" else "rewards.workers"
        pids = [pid for pid, words in below(job.pid) if mark in words]
    if not pids:
        return False
    os.kill(random.choice(pids), signal.SIGKILL)
    return True


def wait(job: subprocess.Popen[bytes], family: list[tuple[int, str]]) -> int:
    """The exit code, when `family`, which the job had started, has ended too."""
    code = job.wait(300)
    deadline = time.monotonic() + 30
    while left := [pid for pid, _ in family if Path(f"/proc/{pid}/exe").exists()]:
        if time.monotonic() > deadline:
            raise SystemExit(f"processes of a job that has ended go on: {left}")
        time.sleep(0.05)
    return code


def trial(job: Job, victim: str, seconds: float, server: Server | None) -> tuple[int, int]:
    """Runs the job to its end, with up to three kills; how many there were, and of resumes."""
    kills = resumes = 0
    while True:
        process, family = job.start(), []
        if kills < 3:
            time.sleep(random.uniform(0.1, 1.0) * seconds)
            while process.poll() is None:
                family = below(process.pid)
                if kill(process, victim, server):
                    kills += 1
                    break
                time.sleep(0.02)  # until there is such a process
        if wait(process, family) == 0:
            return kills, resumes
        resumes += 1
        if resumes > 6:
            raise SystemExit(f"{job.variant}, {victim}: the job does not come to its end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(VICTIMS))
    options = parser.parse_args()
    random.seed(options.seed)
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    rules = work / "rules.py"
    rules.write_text(RULES)
    variants = options.only.split(",")
    server = Server(rules) if "server" in variants else None
    before = set(Path(tempfile.gettempdir()).glob("torchrft-*"))
    ends, seconds = {}, {}
    for variant in variants:
        job = Job(variant, work / f"{variant}, not killed", rules, server.url if server else "")
        start = time.monotonic()
        if wait(job.start(), []):
            sys.exit((work / f"{job.folder.name}.log").read_text())
        ends[variant], seconds[variant] = job.end(), time.monotonic() - start
    pairs = [(variant, victim) for variant in variants for victim in VICTIMS[variant]]
    total, resumed, different = Counter[Any](), Counter[Any](), Counter[Any]()
    for number in range(10**6):
        if sum(total.values()) >= options.kills:
            break
        pair = variant, victim = pairs[number % len(pairs)]
        job = Job(variant, work / f"{number}", rules, server.url if server else "")
        kills, resumes = trial(job, victim, seconds[variant], server)
        total[pair] += kills
        resumed[pair] += resumes
        mine, theirs = job.end(), ends[variant]
        wrong = [name for name in theirs if mine[name] != theirs[name]]
        different[pair] += bool(wrong)
        found = f"{job.folder} differs in {', '.join(wrong)}" if wrong else "equal"
        done = sum(total.values())
        print(f"{done} kills: {variant}, {victim}, {kills} kills: {found}", flush=True)
        if not wrong:
            shutil.rmtree(job.folder)
    if server:
        server.kill()
    rows = [[*pair, str(total[pair]), str(resumed[pair]), str(different[pair])] for pair in pairs]
    print(machine())
    print(table(["job", "killed", "kills", "resumes", "ends that differ"], rows))
    left = set(Path(tempfile.gettempdir()).glob("torchrft-*")) - before
    print(f"temporary folders left: {len(left)}")
    if sum(different.values()) or left:
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
