"""Advantages and policy losses of 4,096 x 4,096 tokens, beside the forward pass they belong to.

    OMP_NUM_THREADS=1 python benchmarks/losses.py [--samples 4096] [--tokens 4096]

The forward pass is that of the smallest model there is here, the debug model, over as many tokens:
measured on 1/256 of them and multiplied, in the same run. Any real model takes longer.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from common import DEBUG_MODEL, machine, seconds, table

from torchrft.algorithms import advantages
from torchrft.algorithms.losses import LOSSES, policy_loss
from torchrft.models.loader import load_model

SHARE = 256


def forward_seconds(samples: int, tokens: int) -> float:
    """Seconds of the forward pass, body and head without gradient, over samples x tokens."""
    model = load_model(DEBUG_MODEL, "random").eval()
    ids = torch.randint(3, 50, (samples * tokens // SHARE // 64, 64))
    with torch.no_grad():
        model(ids[:64])  # warm up
        parts = [seconds(lambda part=part: model(part)) for part in ids.split(1024)]
    return sum(parts) * SHARE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    size = (options.samples, options.tokens)
    mask = torch.arange(size[1]) < torch.randint(1, size[1] + 1, (size[0], 1))
    rewards, group = torch.rand(size[0]), torch.arange(size[0]) // 16
    old, new = -torch.rand(size), -torch.rand(size)
    forward = forward_seconds(*size)
    rows = []

    def row(name: str, call) -> None:
        taken = median(seconds(call) for _ in range(3))
        rows.append([name, f"{taken:.2f}", f"{taken / forward:.2%}"])

    for name in ("group_norm", "reinforce_plus_plus", "gae"):
        extra = {"values": new} if name == "gae" else {}
        row(
            f"advantages: {name}",
            lambda name=name, extra=extra: advantages.compute(name, rewards, group, mask, **extra),
        )
    estimated = advantages.compute("group_norm", rewards, group, mask).advantages
    for name in LOSSES.names():

        def both(name=name) -> None:
            logprobs = new.clone().requires_grad_()
            policy_loss(name, logprobs, old, estimated, mask, ref_logprobs=old)[0].backward()

        row(f"loss with its backward pass: {name}", both)
    print(machine("torch", "transformers"))
    print(f"{size[0]} x {size[1]}; the debug model's forward pass takes {forward:.0f} s\n")
    print(table(["", "seconds", "of the forward pass"], rows))


if __name__ == "__main__":
    main()
