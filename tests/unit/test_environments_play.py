"""One episode, and many on an engine: tokens, masks, branches, seeds, ends."""

import asyncio
import inspect
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from torchrft.environments.play import play
from torchrft.environments.player import Player
from torchrft.environments.protocol import (
    EnvironmentFault,
    Limits,
    Opening,
    ParsedResponse,
    Turn,
)
from torchrft.learn.batch import make_batch
from torchrft.tools.seeds import derive_seed
from torchrft.types import Completion, Prompt, Sample, SamplingParams, Score

STOP = 1
LIMITS = Limits(8, 64)


class Numbers:
    """A renderer whose texts are token ids: each message is its numbers and STOP."""

    def __init__(self, rewrites_after: int = 99) -> None:
        self.rewrites_after = rewrites_after  # replies, after which history is rendered anew

    def render_ids(self, messages, *, tools=None, add_generation_prompt=False):
        ids = [token for m in messages for token in [*map(int, m["content"].split()), STOP]]
        return [*ids, 9] if add_generation_prompt else ids

    def parse_response(self, ids, *, tools=None, prompt_ids=None):
        return ParsedResponse(" ".join(str(token) for token in ids if token != STOP))

    def bridge_to_next_turn(self, prompt_ids, ids, new_messages, *, tools=None, messages=()):
        assert messages[-1]["role"] == "assistant"
        self.rewrites_after -= 1
        if self.rewrites_after < 0:
            return None
        closing = [] if ids[-1] == STOP else [STOP]
        new = self.render_ids(new_messages, add_generation_prompt=True)
        return [*prompt_ids, *ids, *closing, *new]

    def get_stop_token_ids(self):
        return [STOP]


class Countdown:
    """Asks for `row["turns"]` replies; each is worth its first number, and is told again."""

    closed = 0

    def reset(self, row: Mapping, seed: int) -> Opening:
        self.left, self.seed = row["turns"], seed
        return Opening(({"role": "user", "content": row["prompt"]},))

    def step(self, reply) -> Turn:
        self.left -= 1
        first = int(reply["content"].split()[0])
        answer = ({"role": "user", "content": f"{first} 7"},)
        return Turn(answer, float(first), self.left == 0, {"first": float(first)})

    def close(self) -> None:
        Countdown.closed += 1


def completion(ids, version=3, index=0, sample=0):
    logprobs = tuple(-0.1 * token for token in ids)
    return Completion(index, sample, tuple(ids), logprobs, str(ids), "stop", version)


def scripted(*replies):
    """What generates these replies; the prompts that it was asked for are in `asked`."""
    asked = []

    async def generate(ids, turn):
        assert turn == len(asked)
        asked.append(list(ids))
        return completion(replies[turn])

    generate.asked = asked
    return generate


def played(generate, environment=None, row=None, renderer=None, limits=LIMITS):
    row = {"turns": 3, "prompt": "5 6", **(row or {})}
    environment = environment or Countdown()
    return asyncio.run(play(environment, row, 0, generate, renderer or Numbers(), limits))


def test_an_episode_is_one_row_of_what_was_sampled_and_observed():
    generate = scripted([4, 3, STOP], [2, STOP], [8, 8])
    episode = played(generate)
    (branch,) = episode.branches
    assert branch.prompt == (5, 6, STOP, 9)
    told = [(4, 3, STOP), (4, 7, STOP, 9), (2, STOP), (2, 7, STOP, 9), (8, 8)]
    assert branch.token_ids == sum(told, ())
    assert branch.sampled == sum(((k % 2 == 0,) * len(t) for k, t in enumerate(told)), ())
    assert branch.logprobs == tuple(
        -0.1 * token if own else 0.0
        for token, own in zip(branch.token_ids, branch.sampled, strict=True)
    )
    assert (branch.turn_ends, branch.turn_rewards) == ((3, 9, 15), (4.0, 2.0, 8.0))
    assert branch.versions == (3, 3, 3)
    assert (episode.reward, episode.status, episode.turns) == (14.0, "done", 3)
    assert episode.metrics == {"first": pytest.approx(14 / 3)}
    assert [message["role"] for message in episode.messages] == ["user", "assistant"] * 3 + ["user"]
    for asked in generate.asked:  # every prompt of the engine is the beginning of the row
        assert tuple(asked) == (branch.prompt + branch.token_ids)[: len(asked)]


def test_a_reply_without_a_stop_token_is_closed_by_an_observed_one():
    (branch,) = played(scripted([4], [2, STOP]), row={"turns": 2}).branches
    assert branch.token_ids == (4, STOP, 4, 7, STOP, 9, 2, STOP)
    assert branch.sampled == (True, *[False] * 5, True, True)


def test_what_cannot_go_on_exactly_begins_a_branch():
    generate = scripted([4, 3, STOP], [2, STOP], [8, STOP])
    episode = played(generate, renderer=Numbers(rewrites_after=1))
    first, second = episode.branches
    assert first.turn_rewards == (4.0, 2.0)
    assert second.turn_rewards == (8.0,)
    assert second.prompt == (*(5, 6, 1, 4, 3, 1, 4, 7, 1, 2, 1, 2, 7, 1), 9)
    assert second.token_ids == (8, STOP)
    assert (episode.reward, episode.turns) == (14.0, 3)
    rows = [branch.prompt + branch.token_ids for branch in episode.branches]
    for asked in generate.asked:
        assert any(row[: len(asked)] == tuple(asked) for row in rows)


@pytest.mark.parametrize(
    ("limits", "status", "turns"),
    [(Limits(2, 64), "turns", 2), (Limits(8, 12), "length", 2), (Limits(8, 4), "length", 0)],
)
def test_limits(limits, status, turns):
    episode = played(scripted([4, STOP], [2, STOP], [8, STOP]), limits=limits)
    assert (episode.status, episode.turns) == (status, turns)
    assert all(branch.sampled[-1] for branch in episode.branches)


class Broken(Countdown):
    def __init__(self, where, error):
        self.where, self.error = where, error

    def reset(self, row, seed):
        if self.where == "reset":
            raise self.error
        return super().reset(row, seed)

    def step(self, reply):
        if self.where == "step":
            raise self.error
        return super().step(reply)

    def close(self):
        super().close()
        if self.where == "close":
            raise self.error


@pytest.mark.parametrize(
    ("where", "error", "status", "turns", "fault"),
    [
        ("reset", ValueError("no"), "error", 0, "ValueError: no"),
        ("step", EnvironmentFault("slow", "timeout"), "timeout", 1, "slow"),
        ("close", RuntimeError("x"), "done", 3, None),
    ],
)
def test_a_fault_of_the_environment_ends_its_episode(where, error, status, turns, fault):
    before = Countdown.closed
    episode = played(scripted([4, STOP], [2, STOP], [8, STOP]), Broken(where, error))
    assert (episode.status, episode.turns, episode.fault) == (status, turns, fault)
    assert Countdown.closed == before + 1


def test_a_template_that_refuses_the_messages_ends_the_episode():
    class Strict(Numbers):
        def bridge_to_next_turn(self, *args, **options):
            raise KeyError("role")

    episode = played(scripted([4, STOP]), renderer=Strict())
    assert episode.status == "error"
    assert episode.fault == "its messages do not fit the chat template: 'role'"


# ------------------------------------------------------------------ many


class Engine:
    """Replies with one token, the seed's last digit or the prompt's length, and STOP."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling):
        self.calls.append((prompts, sampling))
        out = []
        for i, prompt in enumerate(prompts):
            for j in range(sampling.n):
                seed = sampling.seeds[i][j] if sampling.seeds else len(prompt.token_ids)
                out.append(completion([2 + seed % 7, STOP], len(self.calls), i, j))
        return out

    def close(self):
        self.closed = True


class Seats:
    def __init__(self, make=Countdown):
        self.new = make
        self.closed = False

    async def open(self, row, seed, row_number=None):
        seat = self.new()
        if inspect.iscoroutinefunction(seat.step):
            return seat, seat.reset(row, seed)
        step, close = seat.step, seat.close

        async def async_step(reply):
            return step(reply)

        async def async_close():
            close()

        seat.step, seat.close = async_step, async_close
        return seat, seat.reset(row, seed)

    def close(self):
        self.closed = True


def player(engine, make=Countdown):
    return Player(engine, Seats(make), Numbers(), Limits(8, 64), lambda p: p.metadata)


def prompts(*turns):
    rows = enumerate(turns)
    return [Prompt(row, "", (), metadata={"turns": n, "prompt": f"5 {n}"}) for row, n in rows]


def test_episodes_go_in_rounds_with_seeds_of_their_own():
    engine = Engine()
    seeds = ((11, 12), (13, 14))
    found = player(engine).generate(prompts(2, 3), SamplingParams(n=2, seeds=seeds))
    assert [(c.prompt_index, c.sample_index) for c in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # The first turn's prompts are equal for the samples of a row: one prefill each.
    assert [len(call[0]) for call in engine.calls] == [2, 4, 2]
    assert [call[1].n for call in engine.calls] == [2, 1, 1]
    assert engine.calls[0][1].seeds == tuple(
        tuple(derive_seed(seed, 0) for seed in row) for row in seeds
    )
    assert engine.calls[1][1].seeds == tuple(
        (derive_seed(seed, 1),) for row in seeds for seed in row
    )
    assert engine.calls[0][1].stop_token_ids == (STOP,)
    for one in found:
        first = [turn for branch in one.branches for turn in branch.turn_rewards]
        assert one.reward == sum(first)
        assert one.token_ids == tuple(t for value in first for t in (int(value), STOP))
        assert len(one.logprobs) == len(one.token_ids)
        assert one.policy_version == 1
        assert one.metrics["status/done"] == 1.0
        assert one.metrics["status/error"] == 0.0
        assert one.metrics["turns"] == len(first)


def test_environments_of_one_prompt_have_one_seed():
    made = []

    class Kept(Countdown):
        def __init__(self):
            made.append(self)

    sampling = SamplingParams(n=2, seeds=((11, 12), (13, 14)))
    player(Engine(), Kept).generate(prompts(1, 1), sampling)
    assert made[0].seed == made[1].seed != made[2].seed == made[3].seed
    greedy = SamplingParams(temperature=0.0)
    player(Engine(), Kept).generate(prompts(1, 1), greedy)
    assert made[4].seed != made[5].seed
    player(Engine(), Kept).generate(prompts(1, 1), greedy)
    assert [e.seed for e in made[4:6]] == [e.seed for e in made[6:8]]


def test_slow_environments_change_nothing():
    class Slow(Countdown):
        async def step(self, reply):
            await asyncio.sleep(0.02 * (self.left % 2))
            return super().step(reply)

    sampling = SamplingParams(n=3, seeds=((1, 2, 3), (4, 5, 6)))
    quick, slow = Engine(), Engine()
    start = time.monotonic()
    assert player(quick).generate(prompts(4, 3), sampling) == player(slow, Slow).generate(
        prompts(4, 3), sampling
    )
    assert quick.calls == slow.calls
    assert time.monotonic() - start < 60


def test_an_engine_that_fails_ends_the_call():
    class Fails(Engine):
        def generate(self, prompts, sampling):
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        player(Fails()).generate(prompts(2, 2), SamplingParams())


def test_an_episode_without_a_reply_teaches_nothing():
    class Fails(Countdown):
        def reset(self, row, seed):
            if row["turns"] == 1:
                raise ValueError("no such row")
            return super().reset(row, seed)

    rows = prompts(1, 2)
    found = player(Engine(), Fails).generate(rows, SamplingParams(seeds=((1,), (2,))))
    assert [c.fault for c in found] == ["ValueError: no such row", None]
    samples = [Sample(rows[c.prompt_index], c, Score(1.0), 0) for c in found]
    batch = make_batch(samples)
    assert batch.mask.sum(1).tolist() == [0, 4]
    assert [len(rows) for rows in batch.branches] == [1, 1]
    with pytest.raises(ValueError, match="2 tokens and 1 log-probs"):
        make_batch(
            [replace(samples[1], completion=replace(found[1], token_ids=(1, 2), logprobs=(0.0,)))]
        )


def test_closing_ends_environments_and_engine():
    one = player(Engine())
    one.close()
    assert one.environments.closed
    assert one.engine.closed
