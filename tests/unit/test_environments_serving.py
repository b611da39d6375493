"""Episodes on the native engine: in rounds and freely, and what their sessions save."""

import asyncio

import pytest
import tiny_job
from test_environments_job import OPTIONS
from test_environments_play import Countdown, Numbers, Seats, prompts
from test_native_engine import make
from tiny_job import records, rollout

from torchrft.config.manager import ConfigError
from torchrft.environments.player import Player
from torchrft.environments.protocol import Limits, Turn
from torchrft.rollout.native.serving import NativeServing
from torchrft.types import Branch, SamplingParams

SAMPLING = SamplingParams(n=2, max_new_tokens=6, max_total_tokens=200, seeds=((1, 2), (3, 4)))


class Sized(Countdown):
    """Countdown, whatever is said."""

    def step(self, reply):
        self.left -= 1
        return Turn(({"role": "user", "content": "5 7"},), 1.0, self.left == 0)


def play(make_environment, in_rounds, sampling=SAMPLING, engine=None):
    engine = engine or make(initializer_range=0.02)[0]
    player = Player(
        engine,
        Seats(make_environment),
        Numbers(),
        Limits(8, 200),
        lambda prompt: prompt.metadata,
        in_rounds=in_rounds,
    )
    rows = prompts(4, 3)
    return player.generate(rows, sampling)


def rounded(branch: Branch):
    return (branch.prompt, branch.token_ids, branch.sampled, branch.turn_ends)


def test_both_schedules_sample_the_same_tokens():
    rounds, free = play(Sized, True), play(Sized, False)
    assert rounds == play(Sized, True)  # to the last bit
    for one, other in zip(rounds, free, strict=True):
        assert list(map(rounded, one.branches)) == list(map(rounded, other.branches))
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({one.token_ids for one in rounds}) == 4


def test_freely_no_episode_waits_for_another():
    """Each but one cannot go on before that one has ended, which rounds would never see."""
    first = []

    class Waiting(Sized):
        def __init__(self):
            self.is_first = not first
            first[:] = first or [asyncio.Event()]

        async def step(self, reply):
            if not self.is_first:
                await asyncio.wait_for(first[0].wait(), 60)
            turn = super().step(reply)
            if self.is_first and turn.done:
                first[0].set()
            return turn

        async def close(self):
            super().close()

    assert [one.metrics["turns"] for one in play(Waiting, False)] == [4, 4, 3, 3]


def test_turns_compute_their_new_tokens_alone(monkeypatch):
    seen, close = {}, NativeServing.close

    def closing(self, failed=False):
        seen["prefilled"] = self.scheduler.prefilled
        seen["held"] = list(self.scheduler.sessions.held)
        close(self, failed)

    monkeypatch.setattr(NativeServing, "close", closing)
    found = play(Sized, True)
    # The first prompts once for the samples of a row; later, what is observed, and the last token
    # of each reply, which was sampled but not read.
    first = sum(len(found[i].branches[0].prompt) for i in (0, 2))
    later = [
        end - begin - sum(branch.sampled[begin:end]) + 1
        for one in found
        for branch in one.branches
        for begin, end in zip(branch.turn_ends, branch.turn_ends[1:], strict=False)
    ]
    assert seen == {"prefilled": first + sum(later), "held": []}


def test_an_engine_that_fails_is_closed():
    engine = make(initializer_range=0.02)[0]
    with pytest.raises(ValueError, match="leaves no room for a response: max_len is 5"):
        play(Sized, False, SamplingParams(n=2, max_total_tokens=5), engine)
    assert engine.serving is None


def test_the_schedule_of_a_job(tmp_path):
    """On a CPU rounds, if not said otherwise; the tokens are the same."""
    options = OPTIONS | {"max_steps": 1}
    for schedule in (None, "free"):
        job = tiny_job.run(tmp_path / str(schedule), **options, episode_schedule=schedule)
        assert job.sampler.in_rounds == (schedule is None)
    rounds, free = (rollout(tmp_path / name, 1) for name in ("None", "free"))
    assert [row["messages"] for row in rounds] == [row["messages"] for row in free]
    (record,) = records(tmp_path / "free")
    assert record["reward/environment/turns"] == 3.0
    with pytest.raises(ConfigError, match='episode_schedule = "free" lets what is'):
        tiny_job.tiny_config(**options, episode_schedule="free", deterministic=True)
