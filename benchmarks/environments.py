"""Episodes: the driver's own time per turn, slow environments, and sessions.

    OMP_NUM_THREADS=1 python benchmarks/environments.py [--repeats 3] [--episodes 256] [--tokens 32]

1. Driver: episodes on an engine that answers at once, so that what is left is the player, the
   renderer and the environment's process.
2. Slow environments: the same turns on the native engine with environments that sleep and that do
   not, alternately, by each schedule. The throughput is sampled tokens per second.
3. Sessions: prompt tokens that the native engine computes, with and without them, and the time.

Environments sleep as `async` ones do, so that one process has many of them. Ratios are medians of
neighbors in time: other jobs of the machine slow both down alike.
"""

import argparse
import asyncio
import os
from dataclasses import replace
from statistics import median
from time import process_time

from torchrft.environments import Opening, Turn


class Echo:
    """Repeats the reply's beginning after `sleep` seconds, `turns` times."""

    def __init__(self, turns=4, sleep=0.0):
        self.left, self.sleep = turns, sleep

    def reset(self, row, seed):
        """The row's prompt."""
        return Opening(({"role": "user", "content": row["prompt"]},))

    async def step(self, reply):
        """The same answer, however long it takes."""
        self.left -= 1
        if self.sleep:
            await asyncio.sleep(self.sleep)
        return Turn(({"role": "user", "content": "1 2 3"},), done=self.left == 0)

    def close(self):
        """Nothing is held."""


def main() -> None:
    """Prints the three tables."""
    # The environments' processes import this file, too: they need nothing of the following.
    import torch
    from common import DEBUG_MODEL, machine, middle, seconds, table
    from transformers import AutoModelForCausalLM

    from torchrft.environments.player import Player
    from torchrft.environments.pool import EnvironmentPool
    from torchrft.environments.protocol import Limits
    from torchrft.environments.renderer import ChatRenderer
    from torchrft.models.loader import load_config, load_tokenizer
    from torchrft.rollout.native.engine import NativeEngine
    from torchrft.rollout.native.serving import NativeServing
    from torchrft.rollout.native.sessions import Sessions
    from torchrft.rollout.weight_sync import named_full_tensors
    from torchrft.types import Completion, Prompt, SamplingParams

    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("repeats", 3), ("episodes", 256), ("turns", 4), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds")
    options = parser.parse_args()
    turns, sleep = options.turns, options.sleep
    torch.manual_seed(0)
    config, tokenizer = load_config(DEBUG_MODEL), load_tokenizer(DEBUG_MODEL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    engine = NativeEngine(config, tokenizer, (1,), options.episodes)
    engine.update_weights(named_full_tensors(model), version=0)
    prompts = [Prompt(i, "", (), label=f"{i}") for i in range(options.episodes)]
    sampling = SamplingParams(
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        max_total_tokens=turns * (options.tokens + 16) + 16,
        seeds=tuple((i,) for i in range(options.episodes)),
    )

    class AtOnce:
        """An engine that takes no time."""

        def generate(self, prompts, sampling):
            """`tokens` equal tokens for each."""
            ids = (5,) * options.tokens
            row = ids, (-1.0,) * len(ids), "1", "stop"
            return [Completion(i, 0, *row) for i in range(len(prompts))]

        def close(self):
            """Nothing is held."""

    def player(engine, sleep, in_rounds):
        environment = f"{__file__}:Echo"
        workers = min(len(os.sched_getaffinity(0)), 16)
        pool = EnvironmentPool(environment, {"turns": turns, "sleep": sleep}, workers, 60.0)
        limits = Limits(turns, sampling.max_total_tokens)
        made = Player(
            engine,
            pool,
            ChatRenderer(tokenizer, [1]),
            limits,
            lambda prompt: {"prompt": prompt.label},
            in_rounds=in_rounds,
        )
        made.generate(prompts[:8], replace(sampling, seeds=sampling.seeds[:8]))  # starts processes
        return made

    def tokens(player):
        """Sampled tokens per second."""
        found = []
        taken = seconds(lambda: found.extend(player.generate(prompts, sampling)))
        count = sum(len(one.token_ids) for one in found)
        assert count == options.episodes * turns * options.tokens, count
        return count / taken

    print(machine("torch", "transformers"))
    print(f"{options.episodes} episodes of {turns} turns of {options.tokens} tokens\n")

    def driver(in_rounds):
        """The driver's milliseconds a turn: by the clock, and of this process's processor time."""
        each, count = player(AtOnce(), 0.0, in_rounds), options.episodes * turns
        costs = []
        for _ in range(options.repeats):
            busy = process_time()
            clock = seconds(lambda: each.generate(prompts, sampling))
            costs.append((clock / count * 1e3, (process_time() - busy) / count * 1e3))
        each.environments.close()
        return [middle(column) for column in zip(*costs, strict=True)]

    rows = [(name, *driver(name == "rounds")) for name in ("rounds", "free")]
    print(table(("schedule", "driver, ms a turn", "of processor time"), rows), "\n")

    players = {
        (name, slow): player(engine, sleep if slow else 0.0, name == "rounds")
        for name in ("rounds", "free")
        for slow in (False, True)
    }
    speeds = {key: [] for key in players}
    for _ in range(options.repeats):
        for key, each in players.items():
            speeds[key].append(tokens(each))
    rows = [
        (
            name,
            middle(speeds[name, False]),
            middle(speeds[name, True]),
            f"{median(map(_ratio, speeds[name, True], speeds[name, False])):.2f}",
        )
        for name in ("rounds", "free")
    ]
    print(table(("schedule", "tokens/s", f"sleeping {sleep:g} s", "ratio"), rows), "\n")

    def computed(with_sessions):
        """Prompt tokens that the engine computed, and the seconds of each run."""
        find, close, counts = Sessions.find, NativeServing.close, []

        def closing(self, failed=False):
            counts.append(self.scheduler.prefilled)
            close(self, failed)

        NativeServing.close = closing
        if not with_sessions:
            Sessions.find = lambda *_: None
        try:
            taken = [
                seconds(lambda: players["rounds", False].generate(prompts, sampling))
                for _ in range(options.repeats)
            ]
        finally:
            Sessions.find, NativeServing.close = find, close
        return str(counts[0]), middle(taken)

    rows = [("with", *computed(True)), ("without", *computed(False))]
    print(table(("sessions", "prompt tokens computed", "seconds"), rows))
    for each in players.values():
        each.environments.close()


def _ratio(one: float, other: float) -> float:
    return one / other


if __name__ == "__main__":
    main()
