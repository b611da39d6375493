"""Scalar reward models: samples per second beside a plain transformers loop, in one run.

    OMP_NUM_THREADS=1 python benchmarks/reward_model.py [--repeats 5] [--batch 16] [--device cuda]

The loop is what the model card of a reward model shows: batches in the order of the samples, padded
to their longest, with an attention mask. Both take `--batch` samples per forward pass and give the
same scores, which is asserted first.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import machine, middle, seconds, table
from transformers import AutoConfig, AutoModelForSequenceClassification

from torchrft.config.job_config import Parallel
from torchrft.models.reward_model import load_reward_model
from torchrft.rewards.models import Batches
from torchrft.tools.distributed import World

Group = list[list[int]]

COMMON = {"vocab_size": 1000, "num_labels": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
DECODER = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
MODELS = {
    "qwen2, 4 layers x 256": (
        "qwen2",
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, **DECODER},
    ),
    "bert, 4 layers x 256": (
        "bert",
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    ),
}
# Prompt and response lengths, from and to.
WORKLOADS = {
    "ragged: prompts of 16-64 tokens, responses of 8-128": ((16, 64), (8, 128)),
    "long prompts: of 128, responses of 8-32": ((128, 128), (8, 32)),
    "equal: prompts of 32, responses of 64": ((32, 32), (64, 64)),
}


def make_groups(lengths: tuple[tuple[int, int], tuple[int, int]], prompts: int, n: int) -> list:
    """`n` samples of each of the prompts."""
    rng = random.Random(0)

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return [rng.randrange(1, 1000) for _ in range(rng.randint(*bounds))]

    groups = []
    for _ in range(prompts):
        prompt = tokens(lengths[0])
        groups.append([prompt + tokens(lengths[1]) for _ in range(n)])
    return groups


@torch.no_grad()
def plain(model, samples: list[list[int]], batch: int, device: torch.device) -> list[float]:
    """The loop of transformers' own."""
    scores: list[float] = []
    for first in range(0, len(samples), batch):
        rows = samples[first : first + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        scores += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for name, (family, sizes) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **COMMON, **sizes, initializer_range=0.05)
            made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            made.save_pretrained(Path(folder))
            peer = (
                AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
                .eval()
                .to(device)
            )
            world = World(0, 1, 0, device)
            own = Batches(
                load_reward_model(folder, Parallel(), world, torch.float32), options.batch, False
            )
        for workload, lengths in WORKLOADS.items():
            groups = make_groups(lengths, options.prompts, options.n)
            samples = [sample for group in groups for sample in group]
            found, expected = own(groups), plain(peer, samples, options.batch, device)
            worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            assert worst < 1e-4, worst
            mine, theirs = [], []
            for _ in range(options.repeats):
                mine.append(len(samples) / seconds(partial(own, groups)))
                loop = partial(plain, peer, samples, options.batch, device)
                theirs.append(len(samples) / seconds(loop))
            ratio = median(a / b for a, b in zip(mine, theirs, strict=True))
            rows.append([name, workload, middle(mine), middle(theirs), f"{ratio:.2f}"])
    print(machine("torch", "transformers"))
    header = ["model", "samples", "torchrft, samples/s", "plain loop, samples/s", "ratio"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
