"""Environments of other libraries, unchanged: the trainer takes a few steps in each."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import word_jobs
from word_jobs import no_faults, replies

from torchrft.environments import EnvironmentFault
from torchrft.environments.pool import EnvironmentPool
from torchrft.environments.registry import make

HERE = Path(__file__).parent
SERVER = HERE / "open_env.py"


def test_reasoning_gym(tmp_path):
    """Each reward is what the library's own answer says of the reply to the row's task."""
    import reasoning_gym

    words = ["<answer>Yes</answer>", "<answer>No</answer>"]
    rows = [{"seed": seed} for seed in range(20)]
    records, episodes = word_jobs.train(tmp_path, "reasoning_gym:syllogism", words, rows)
    no_faults(records, episodes)
    tasks = [reasoning_gym.create_dataset("syllogism", size=1, seed=s)[0] for s in range(20)]
    answers = {task["question"]: task["answer"] for task in tasks}
    rewards = []
    for episode in episodes:
        (reply,) = replies(episode)
        right = f"<answer>{answers[episode['messages'][0]['content']]}</answer>"
        rewards.append(episode["reward"])
        assert episode["reward"] == float(right in reply and not reply.endswith("<answer>"))
    assert set(rewards) == {0.0, 1.0}


def test_textarena(tmp_path):
    """A frozen lake: moves change what the policy sees next, and only what is new is sent."""
    words = ["[up]", "[down]", "[left]", "[right]"]
    rows = [{"seed": seed} for seed in range(20)]
    name = "textarena:FrozenLake-v0"
    options = {"max_turns": 3, "n_samples_per_prompt": 4, "train_batch_size": 16}
    records, episodes = word_jobs.train(tmp_path, name, words, rows, **options)
    no_faults(records, episodes)
    assert len({episode["reward"] for episode in episodes}) > 1
    moves = 0
    for episode in episodes:
        opening, *told = (m["content"] for m in episode["messages"] if m["role"] == "user")
        for reply, answer in zip(replies(episode), told, strict=False):
            assert opening[:60] not in answer
            if answer.startswith("You moved "):
                assert f"[{answer.split()[2]}]" in reply
                moves += 1
    assert moves > 0


def test_skyrl_gym(tmp_path):
    """The multi-turn form of gsm8k: a well-formed answer earns little, the right one ends it."""
    words = [f"#### {number}" for number in range(1, 5)]
    rows = [
        {
            "prompt": f"1 + {number % 4}",
            "reward_spec": {"ground_truth": str(1 + number % 4)},
            "extra_info": {"max_turns": 3},
        }
        for number in range(20)
    ]
    records, episodes = word_jobs.train(tmp_path, "skyrl_gym:gsm8k_multi_turn", words, rows)
    no_faults(records, episodes)
    seen = set()
    for episode in episodes:
        truth = str(1 + int(episode["prompt"][-1]))
        rewards = [reward for branch in episode["branches"] for reward in branch["turn_rewards"]]
        for reply, reward in zip(replies(episode), rewards, strict=True):
            said = [one for one in "1234" if f"#### {one}" in reply]
            if len(said) == 1 and reply.endswith(said[0]):
                assert reward == pytest.approx(1.0 if said == [truth] else 0.2 / 3)
            elif not said:
                assert reward == 0.0
            seen.add(round(reward, 3))
        assert (rewards[-1] == 1.0) or len(rewards) == 3
    assert seen == {0.0, 0.067, 1.0}


@pytest.fixture(scope="module")
def url():
    """An OpenEnv server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SERVER, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout.readline() == b"ready\n"
        yield f"http://127.0.0.1:{port}"
        os.killpg(server.pid, signal.SIGKILL)


OPEN_ENV = {"action": "message", "observation": "text"}
ROWS = [{"word": "abcd"[number % 4]} for number in range(20)]


def check_echo(records, episodes):
    no_faults(records, episodes)
    assert {record["reward/environment/turns"] for record in records} == {3.0}
    for episode in episodes:
        said, word = replies(episode), episode["messages"][0]["content"][0]
        assert episode["reward"] == sum(word in reply for reply in said)
        told = [m["content"] for m in episode["messages"] if m["role"] == "user"]
        assert told[1:] == [reply * 2 for reply in said[:2]]
    assert len({episode["reward"] for episode in episodes}) > 1
    # The samples of a row have one seed, different rows different ones.
    openings = {(episode["row"], episode["messages"][0]["content"]) for episode in episodes}
    rows = {row for row, _ in openings}
    assert len(openings) == len(rows) == len({opening.split()[1] for _, opening in openings})


def test_openenv_by_url(tmp_path, url):
    options = {"environment.options": OPEN_ENV}
    check_echo(*word_jobs.train(tmp_path, f"openenv:{url}", list("abcd"), ROWS, **options))


def test_openenv_in_process(tmp_path):
    options = {"environment.options": OPEN_ENV}
    check_echo(*word_jobs.train(tmp_path, f"openenv:{SERVER}:Echo", list("abcd"), ROWS, **options))


def test_a_server_that_dies_in_mid_episode_costs_the_episodes_of_that_moment(tmp_path, url):
    """It comes back, so only the sessions that it held end, each as a counted error."""
    rows = [{**row, "dies": number == 5} for number, row in enumerate(ROWS)]
    options = {"environment.options": OPEN_ENV, "max_reward_failures": 1}
    records, episodes = word_jobs.train(tmp_path, f"openenv:{url}", list("abcd"), rows, **options)
    lost = [episode for episode in episodes if episode["fault"] is not None]
    assert {5} <= {episode["row"] for episode in lost}
    assert 8 <= len(lost) <= 32  # at most the episodes of one rollout
    for episode in lost:
        assert "the server has ended the session" in episode["fault"]
        assert f"openenv:{url}" in episode["fault"]
        assert len(replies(episode)) in (2, 3)  # what came before is kept
    assert sum(record.get("reward/environment/errors", 0) for record in records) == len(lost)
    fine = [episode for episode in episodes if episode["fault"] is None]
    assert {len(replies(episode)) for episode in fine} == {3}


def test_a_class_in_trls_style(tmp_path):
    """Calls are made, answered by the tool, and what they did is what the reward says."""
    call = '<tool_call>\n{"name": "increment", "arguments": {"by": %d}}\n</tool_call>'
    name = f"{HERE / 'trl_counter.py'}:Counter"
    tools = make(name, {}).specs
    rows = [{"target": number % 3 + 1} for number in range(20)]
    words = [call % number for number in (1, 2)]
    records, episodes = word_jobs.train(tmp_path, name, words, rows, tools=tools)
    no_faults(records, episodes)
    called = 0
    for episode in episodes:
        answers = [json.loads(m["content"]) for m in episode["messages"] if m["role"] == "tool"]
        target = int(episode["messages"][0]["content"][-2])
        total = answers[-1] if answers else 0
        called += len(answers)
        assert answers == sorted(answers)
        if episode["messages"][-1]["role"] != "tool":
            assert episode["reward"] == pytest.approx(1.0 if total == target else total / 10)
    assert called > 0


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("reasoning_gym:leg_count", {}, "has no 'leg_count'; it has leg_counting, "),
        ("reasoning_gym:leg_counting", {"legs": 3}, "unexpected keyword argument 'legs'"),
        ("reasoning_gym:leg_counting", {"min_animals": 0}, "min_animals must be positive"),
        ("textarena:FrozenLak", {}, "has no 'FrozenLak'; it has FrozenLake-v0, "),
        ("textarena:TicTacToe-v0", {}, "number of players has to be 2, received 1"),
        ("textarena:FrozenLake-v0", {"x": 1}, "unexpected keyword argument 'x'"),
        ("skyrl_gym:gsm8", {}, "has no 'gsm8'; it has gsm8k, for example"),
        ("openenv:http://127.0.0.1:1", {}, "no server of OpenEnv answers there"),
        ("openenv:ftp://localhost", {}, "write its URL as http://host:port"),
        (f"openenv:{SERVER}:Echoes", {}, "has no function 'Echoes'"),
        (f"openenv:{SERVER}:Echo", {"action": "say"}, "has no 'say'; it has message, "),
        (f"openenv:{SERVER}:Echo", {"turn": 3}, "unexpected keyword argument 'turn'"),
        (f"openenv:{SERVER}:Echo", {"action_class": "Sai"}, "has no 'Sai'; it has Say, "),
        (f"openenv:{SERVER}:State", {}, "makes no Environment of openenv.core.env_server"),
    ],
)
def test_wrong_names_and_options_are_a_sentence_before_the_start(name, options, said):
    pool = EnvironmentPool(name, options, 1, 20.0)
    try:
        with pytest.raises(ValueError, match=f"^environment {name!r} cannot be made: .*{said}"):
            asyncio.run(pool.check())
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("name", "options", "row", "said"),
    [
        (
            "reasoning_gym:leg_counting",
            {},
            {"seed": "7"},
            "the column \"seed\" holds '7', no whole",
        ),
        ("skyrl_gym:gsm8k", {}, {"prompt": "1"}, "reward_spec field is required"),
        (f"openenv:{SERVER}:Echo", {}, {}, "missing 1 required positional argument: 'word'"),
        (f"openenv:{SERVER}:Echo", {"observation": "txt"}, {"word": "a"}, "has no 'txt'; it has"),
    ],
)
def test_wrong_rows_cost_their_episode(name, options, row, said):
    pool = EnvironmentPool(name, options, 1, 20.0)
    try:
        with pytest.raises(EnvironmentFault, match=said):
            asyncio.run(pool.open(row, 1))
    finally:
        pool.close()
