"""What a reward server costs beside the same rule in the trainer's process.

    OMP_NUM_THREADS=1 python benchmarks/remote_rewards.py

Starts `python -m torchrft.rewards.server` on 127.0.0.1. Asserted first: both give the same rewards.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common import REPOSITORY, machine, middle, seconds, table

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards.remote import RemoteRewards
from torchrft.rewards.rule_source import rule_sources
from torchrft.rewards.source import RewardRequest
from torchrft.types import Completion, Prompt

RULE = f"{REPOSITORY}/benchmarks/rewards.py:checksum"
WORDS = (REPOSITORY / "docs/design.md").read_text().split()


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The url of a running server of the rule."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "server.toml")
        config.write_text(
            f'[reward]\nfunctions = [{{ name = "{RULE}", alias = "r", isolate = false }}]'
        )
        words = ["-m", "torchrft.rewards.server", "--config", str(config), "--port", str(port)]
        process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
        try:
            while True:
                assert process.poll() is None, "the server has ended"
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/score"
        finally:
            process.terminate()
            process.wait()


def samples(count: int, words: int) -> list[RewardRequest]:
    """Requests whose responses are `words` words of English, about as many tokens."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]
    prompts = [Prompt(i, "How is a run described?", (1,) * 8, "42") for i in range(count)]
    ids = tuple(draw.randrange(100_000) for _ in range(words))
    made = [Completion(i, 0, ids, (-1.0,) * words, text, "stop") for i, text in enumerate(texts)]
    return list(map(RewardRequest, prompts, made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    [local] = rule_sources(Reward(functions=[RewardFunction(name=RULE, isolate=False)]))
    print(machine("torch", "fastapi", "uvicorn"))
    one, many = [], []
    with server() as url:
        for words in (16, 1024):
            for size in (1, 16, 64, 256):
                asked = samples(size, words)
                remote = RemoteRewards(Reward(remote_rm_url=[url], remote_rm_batch_size=size))
                expected = [result.score for result in local.score(asked)]
                assert [result.score for result in remote.score(asked)] == expected
                here, there = partial(local.score, asked), partial(remote.score, asked)
                took = [(seconds(here), seconds(there)) for _ in range(repeats)]
                rule, trip = ([1e3 * pair[i] for pair in took] for i in (0, 1))
                over = [t - r for r, t in zip(rule, trip, strict=True)]
                cost = 1e3 * sorted(over)[repeats // 2] / size
                row = (str(words), str(size), middle(rule), middle(trip), middle(over))
                one.append((*row, f"{cost:.0f}"))
            asked = samples(4096, words)
            for threads in (1, 4):
                fields = {"remote_rm_url": [url], "remote_rm_concurrency": threads}
                there = partial(RemoteRewards(Reward(**fields)).score, asked)
                total = [seconds(there) for _ in range(max(repeats // 4, 1))]
                many.append((str(words), str(threads), middle(total)))
    header = ("words", "batch", "in process, ms", "remote, ms", "overhead, ms", "us a sample")
    print(table(header, one))
    print(table(("words", "concurrency", "4,096 samples in batches of 64, s"), many))


if __name__ == "__main__":
    main()
