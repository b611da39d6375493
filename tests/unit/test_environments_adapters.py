"""Environments of other libraries, played for real where they are installed."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from torchrft.environments import Opening, Turn
from torchrft.environments.pool import EnvironmentPool
from torchrft.environments.registry import ADAPTERS, make


def needs(library):
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


def played(name, rows, policy, options=None):
    """The turns of all rows, two processes, all at once; `policy(k)` replies in turn k."""
    pool = EnvironmentPool(name, options or {}, 2, 60.0)

    async def play(number, row):
        seat, opening = await pool.open(row, number)
        turns = [opening]
        while len(turns) < 20 and (len(turns) == 1 or not turns[-1].done):
            content = policy(len(turns) - 1)
            turns.append(await seat.step({"role": "assistant", "content": content}))
        await seat.close()
        return turns

    async def play_all():
        return await asyncio.gather(*(play(number, row) for number, row in enumerate(rows)))

    try:
        return asyncio.run(play_all())
    finally:
        pool.close()


@pytest.mark.parametrize("library", sorted(ADAPTERS))
def test_a_missing_library_says_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "openenv.core", None)
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", None)
    with pytest.raises(ValueError, match=f"pip install {library.replace('_', '-')}$"):
        make(f"{library}:http://x", {})


@needs("reasoning_gym")
def test_reasoning_gym():
    rows = [{"seed": 7}, {"seed": 7}, {}]
    first, second, other = played("reasoning_gym:leg_counting", rows, lambda turn: "<answer>188")
    assert "15 dogs, 9 wasps, 4 flatworms" in first[0].messages[0]["content"]
    assert first == second
    assert first[1] == Turn(reward=1.0, done=True)
    assert other[0] != first[0]
    assert other[1].reward == 0.0


@needs("textarena")
def test_textarena():
    def policy(turn):
        return f"[{turn + 1}]"

    rows = [{"seed": 3}, {"seed": 3}, {"seed": 4}]
    first, second, _ = played("textarena:GuessTheNumber-v0-hardcore", rows, policy)
    assert first == second
    assert first[1].messages == ({"role": "user", "content": "The target number is higher."},)
    assert first[-1].done


@needs("skyrl_gym")
def test_skyrl_gym():
    row = {
        "prompt": [{"role": "user", "content": "1+1"}],
        "reward_spec": {"ground_truth": "2"},
        "extra_info": {"max_turns": 3},
    }
    (turns,) = played("skyrl_gym:gsm8k_multi_turn", [row], lambda turn: f"#### {turn}")
    assert turns[0] == Opening(({"role": "user", "content": "1+1"},))
    assert [turn.reward for turn in turns[1:]] == [pytest.approx(0.2 / 3)] * 2 + [1.0]
    assert "#### ANSWER" in turns[1].messages[0]["content"]
    assert (turns[-1].done, turns[-1].messages) == (True, ())


SERVER = """
import sys, uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_app

class Say(Action):
    message: str

class Heard(Observation):
    text: str = ""

class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, word="", **more):
        self.count = 0
        return Heard(text=f"{word} {seed}")

    def step(self, action, timeout_s=None, **more):
        self.count += 1
        return Heard(text=action.message * 2, reward=float(self.count), done=self.count == 2)

    @property
    def state(self):
        return State()

uvicorn.run(create_app(Echo, Say, Heard, max_concurrent_envs=8), port=int(sys.argv[1]))
"""


@needs("openenv")
def test_openenv(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    with subprocess.Popen([sys.executable, path, str(port)], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            name, rows = f"openenv:http://127.0.0.1:{port}", [{"word": "a"}, {"word": "b"}]
            both = played(name, rows, lambda turn: f"hi{turn}", {"observation": "text"})
            (whole,) = played(name, [{"word": "c"}], lambda turn: "x")
        finally:
            server.kill()
    for number, turns in enumerate(both):
        assert turns[0].messages[0]["content"] == f"{'ab'[number]} {number}"
        assert turns[1] == Turn(({"role": "user", "content": "hi0hi0"},), 1.0)
        assert turns[2] == Turn(reward=2.0, done=True)
    assert json.loads(whole[1].messages[0]["content"])["text"] == "xx"
