"""Agents in their processes, many at once: ends, limits, calls that nobody waits for."""

import threading
from pathlib import Path

import pytest
import torch
from test_environments_play import STOP, Numbers

from torchrft.environments.play import Row
from torchrft.environments.player import Player
from torchrft.environments.pool import EnvironmentPool
from torchrft.environments.protocol import Limits
from torchrft.environments.recording import Call, Recorder
from torchrft.types import Completion, Kept, Prompt, SamplingParams

AGENT = f"agent:{Path(__file__)}:talk"


def talk(row, base_url, api_key):
    """As the row's prompt says."""
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages = [{"role": "user", "content": row["prompt"]}]

    def ask():
        return client.chat.completions.create(model="m", messages=messages)

    if row["prompt"] == "7":  # leaves while a call is under way
        threading.Thread(target=ask, daemon=True).start()
        threading.Event().wait(3.0)
        return 0.25
    if row["prompt"] == "08":  # keeps the round open until that one has left
        threading.Event().wait(6.0)
        return len(ask().choices)
    replies = 0
    try:
        while replies < int(row["prompt"]):
            messages.append(ask().choices[0].message.model_dump(exclude_none=True))
            messages.append({"role": "user", "content": "5"})
            replies += 1
    except BadRequestError as error:
        if row["prompt"] == "6" or error.code != "max_turns":
            raise
    return replies


class Engine:
    """Token 20 and STOP for everything; counts what it is asked at a time."""

    def __init__(self):
        self.sizes = []

    def generate(self, prompts, sampling):
        self.sizes.append(len(prompts) * sampling.n)
        return [
            Completion(i, j, (20, STOP), (-0.5, -0.25), "20", "stop", 0)
            for i in range(len(prompts))
            for j in range(sampling.n)
        ]

    def close(self):
        """Nothing is held."""


@pytest.fixture
def play():
    pools = []

    def playing(*prompts, in_rounds=True, timeout=60.0):
        pools.append(EnvironmentPool(AGENT, {}, 2, timeout))
        engine = Engine()
        made = Player(
            engine,
            pools[-1],
            Numbers(),
            Limits(3, 64),
            lambda prompt: {"prompt": prompt.text},
            in_rounds=in_rounds,
            are_agents=True,
        )
        given = [Prompt(i, text, (1,)) for i, text in enumerate(prompts)]
        return made.generate(given, SamplingParams(n=1)), engine

    yield playing
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("in_rounds", [True, False])
def test_agents_go_side_by_side(play, in_rounds):
    found, engine = play("1", "2", "3", in_rounds=in_rounds)
    assert [c.reward for c in found] == [1.0, 2.0, 3.0]
    assert [len(c.branches[0].turn_ends) for c in found] == [1, 2, 3]
    assert [c.metrics["status/done"] for c in found] == [1.0] * 3
    if in_rounds:
        assert engine.sizes == [3, 2, 1]


def test_limits_and_calls_that_nobody_waits_for(play):
    """The fourth call is refused; one agent takes that as its end, another one raises."""
    found, engine = play("4", "6", "7", "08")
    assert [c.metrics["status/turns"] for c in found] == [1.0, 1.0, 0.0, 0.0]
    assert [c.reward for c in found] == [3.0, 0.0, 0.25, 1.0]
    assert [c.fault for c in found] == [None] * 4
    assert engine.sizes[1:] == [2, 2]


def test_what_draws_were_among_lies_as_the_tokens_do():
    """Rows are told in the order of their last calls, and with them what truncation kept."""
    recorder = Recorder(None, Numbers(), Limits())
    for number, prompt in enumerate([(3,), (4,), (3, 20, STOP, 5)]):
        kept = Kept(torch.tensor([20, 1]) + number, torch.tensor([1, 1]))
        reply = Completion(0, 0, (20, STOP), (-0.5, -0.25), "", "stop", number, kept)
        recorder.add(Call(prompt, reply))
    episode = recorder.episode("done", None, 1.0)
    assert [branch.versions for branch in episode.branches] == [(1,), (0, 2)]
    assert episode.kept.ids.tolist() == [21, 2, 20, 1, 22, 3]
    assert len(Row((1, 2))) == 2
