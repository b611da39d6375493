"""Environments in worker processes: a fault costs its own episode, never another one or the run."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from torchrft.environments import EnvironmentFault, Opening, Turn
from torchrft.environments.pool import EnvironmentPool
from torchrft.environments.registry import register

OWN = """
import asyncio, ctypes, os, random, signal, sys, time
from torchrft.environments import Opening, Turn

kept, steps = [], []

def say(text):
    return ({"role": "user", "content": text},)

def behave(text, reward=1.0):
    if text == "hang":
        while True:
            pass
    if text == "power":
        10 ** 10 ** 9
    if text == "exit":
        os._exit(3)
    if text == "crash":
        ctypes.string_at(0)
    if text == "leak":
        while True:
            kept.append(bytes(10**7))
    if text == "raise":
        raise KeyError("level")
    if text == "quit":
        sys.exit(1)
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "flood":
        print("seen")
        for stream in (sys.stdout, sys.stderr):
            for _ in range(100):
                stream.write("x" * 100_000)
            stream.flush()
    if text == "fork":
        if not os.fork():
            return Turn(say("from the child"), 5.0)
    if text == "none":
        return None
    if text == "nan":
        return Turn(reward=float("nan"))
    if text == "metric":
        return Turn(metrics={"speed": float("inf")})
    if text == "reward":
        return Turn(reward="much")
    if text == "assistant":
        return Turn(({"role": "assistant", "content": "me"},))
    if text == "no text":
        return Turn(({"role": "user", "content": None},))
    if text == "surrogate":
        return Turn(say(chr(0xD800)))
    if text == "no data":
        return Turn(({"role": "user", "content": "a", "extra": object()},))
    if text == "deep":
        value = []
        for _ in range(100):
            value = [value]
        return Turn(({"role": "user", "content": "a", "extra": value},))
    if text == "long":
        return Turn(say("x" * 10**7))
    if text == "pid":
        return Turn(say(str(os.getpid())), reward)
    if text == "random":
        return Turn(say(str(random.random())), reward)
    if text == "drift":
        return Turn(say(str(time.time_ns())))
    if text == "torch":
        return Turn(say(str("torch" in sys.modules)))
    if text == "garbage":
        for fd in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{fd}"):
                if os.readlink(f"/proc/self/fd/{fd}").startswith("socket"):
                    os.write(int(fd), b"no json\\n")
        while True:
            pass
    return Turn(say(text), reward, done=text == "end", metrics={"length": len(text)})

class Own:
    def __init__(self, scale=1.0):
        self.total = 0.0
        self.scale = scale

    def reset(self, row, seed):
        behave(row.get("start", ""))
        return Opening(say(f"{row['n']} {seed}"), row.get("tools", ()))

    def step(self, reply):
        self.total += self.scale
        return behave(reply["content"], self.total)

    def close(self):
        behave("hang" if self.total == 7 else "")

class Slow(Own):
    def step(self, reply):
        time.sleep(0.1)
        return super().step(reply)

class Later(Own):
    async def step(self, reply):
        await asyncio.sleep({"sleep": 60, "meet": 0.3}.get(reply["content"], 0.001))
        return super().step(reply)

class Refused:
    def __init__(self):
        raise RuntimeError("no server at :1")

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def reply(text):
    return {"role": "assistant", "content": text}


async def episode(pool, *texts, n=0, seed=5, **row):
    """The turns of an episode; the last is an EnvironmentFault if it ended so."""
    turns, seat = [], None
    try:
        seat, opening = await pool.open({"n": n, **row}, seed, row_number=n)
        assert opening.messages == ({"role": "user", "content": f"{n} {seed}"},)
        for text in texts:
            turns.append(await seat.step(reply(text)))
    except EnvironmentFault as fault:
        turns.append(fault)
    if seat is not None:
        await seat.close()
    return turns


def played(path, *episodes, name="Own", count=1, timeout=20.0, memory=2**28, **options):
    """All episodes at once, each a tuple of replies."""
    pool = EnvironmentPool(f"{path}:{name}", options, count, timeout, memory)

    async def play():
        return await asyncio.gather(*(episode(pool, *e, n=n) for n, e in enumerate(episodes)))

    try:
        return asyncio.run(play())
    finally:
        pool.close()


def test_turns_come_as_they_were_given(own):
    (turns,) = played(own, ("a", "end"), scale=2.0)
    message = {"role": "user", "content": "a"}
    assert turns[0] == Turn((message,), 2.0, False, {"length": 1.0})
    assert (turns[1].reward, turns[1].done) == (4.0, True)


def test_many_episodes_share_few_processes(own):
    episodes = played(own, *[("pid",) * 3] * 40, count=2)
    assert len({turn.messages[0]["content"] for turns in episodes for turn in turns}) == 2
    assert {tuple(turn.reward for turn in turns) for turns in episodes} == {(1.0, 2.0, 3.0)}


def test_a_process_has_no_torch(own):
    for name in ("Own", "Later"):
        assert played(own, ("torch",), name=name)[0][0].messages[0]["content"] == "False"


def test_all_libraries_of_a_process_do_without_torch():
    code = (
        "import sys, torchrft.environments.pool, torchrft.environments.worker\n"
        "import torchrft.environments.tools, torchrft.environments.registry\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FAULTS = {
    "raise": "KeyError: 'level' (",
    "quit": "SystemExit: 1 (",
    "interrupt": "KeyboardInterrupt:",
    "none": "step must return Turn(...), got None",
    "nan": "reward: input should be a finite number, got nan",
    "metric": "metrics.speed: input should be a finite number, got inf",
    "reward": "reward: input should be a valid number, unable to parse",
    "assistant": "a turn must not hold a message of the role assistant",
    "no text": "messages.0.content: input should be a valid string, got None",
    "surrogate": "UnicodeEncodeError: 'utf-8' codec can't encode character",
    "no data": "an answer holds text, numbers, lists and dictionaries, got <object",
    "deep": "is nested more than 64 deep",
    "long": "the limit is 1048576",
}
DEATHS = {
    "exit": "its process ended by itself",
    "crash": "its process died of signal 11",
    "leak": "it took more than 0.25 GiB of memory",
    "garbage": "it has written to its process's socket",
}


@pytest.mark.parametrize("name", ["Own", "Later"])
@pytest.mark.parametrize("faults", [FAULTS, DEATHS], ids=["faults", "deaths"])
def test_a_fault_costs_its_episode(own, name, faults):
    good, *all_bad = played(own, ("a", "b", "c"), *(("a", text, "b") for text in faults), name=name)
    assert [turn.reward for turn in good] == [1.0, 2.0, 3.0]
    for row, (bad, words) in enumerate(zip(all_bad, faults.values(), strict=True), 1):
        assert bad[0].reward == 1.0
        assert bad[1].status == "error"
        assert str(bad[1]).startswith(f"environment '{own}:{name}', row {row}: ")
        assert words in str(bad[1])
        assert len(bad) == 2


@pytest.mark.parametrize("name", ["Own", "Later"])
@pytest.mark.parametrize("text", ["hang", "power"])
def test_what_hangs_is_killed_and_the_others_are_made_again(own, name, text):
    bad, good, other = played(
        own, ("a", text), ("a", "b", "c"), ("b", "c", "d", "end"), name=name, timeout=0.5
    )
    assert bad[1].status == "timeout"
    assert str(bad[1]).endswith("row 0: it took more than 0.5 s")
    assert [turn.reward for turn in good] == [1.0, 2.0, 3.0]
    assert [turn.reward for turn in other] == [1.0, 2.0, 3.0, 4.0]


def test_an_episode_that_sleeps_costs_no_process(own):
    late, good = played(own, ("sleep",), ("pid", "meet", "meet", "pid"), name="Later", timeout=2.0)
    assert late[0].status == "timeout"
    assert good[0].messages == good[3].messages


def test_async_methods_wait_side_by_side(own):
    start = time.monotonic()
    episodes = played(own, *[("meet",)] * 60, name="Later")
    assert {turns[0].reward for turns in episodes} == {1.0}
    assert time.monotonic() - start < 60 * 0.3


def test_the_time_in_the_queue_does_not_count(own):
    # Thirty turns of 0.1 s one after the other, each with half a second and its grace.
    episodes = played(own, *[("a",)] * 30, name="Slow", timeout=0.5)
    assert [turns[0].reward for turns in episodes] == [1.0] * 30


def test_random_numbers_follow_the_seed_alone(own):
    alone = played(own, ("random", "random"))[0]
    together = played(own, *[("random", "random")] * 3, name="Later")
    assert together == [alone] * 3
    assert alone[0].messages != alone[1].messages


def test_an_episode_that_cannot_be_made_again_ends(own):
    async def play(pool):
        drifting, _ = await pool.open({"n": 1}, 0, row_number=1)
        await drifting.step(reply("drift"))
        await episode(pool, "hang")
        with pytest.raises(EnvironmentFault, match=r"row 1: made again .* answers in another way"):
            await drifting.step(reply("a"))
        await drifting.close()
        return await episode(pool, "a")

    pool = EnvironmentPool(f"{own}:Own", {}, 1, 0.5)
    assert asyncio.run(play(pool))[0].reward == 1.0
    pool.close()


def test_a_process_killed_from_outside_costs_nothing(own):
    async def play(pool):
        seat, _ = await pool.open({"n": 1}, 0)
        other, _ = await pool.open({"n": 2}, 0)
        pid = int((await other.step(reply("pid"))).messages[0]["content"])
        await seat.step(reply("a"))
        os.kill(pid, signal.SIGKILL)
        turn = await seat.step(reply("b"))
        with pytest.raises(EnvironmentFault, match="answers in another way"):
            await other.step(reply("a"))
        return turn.reward

    pool = EnvironmentPool(f"{own}:Own", {}, 1, 20.0)
    assert asyncio.run(play(pool)) == 2.0
    pool.close()


def test_faults_of_an_opening(own):
    async def play(pool):
        hung = await episode(pool, start="hang", n=1)
        raised = await episode(pool, start="raise", n=2)
        tools = await episode(pool, tools=["add"], n=3)
        return [hung[0], raised[0], tools[0], *await episode(pool, "a", unfit={1, 2})]

    pool = EnvironmentPool(f"{own}:Own", {}, 1, 0.5)
    hung, raised, tools, unfit = asyncio.run(play(pool))
    assert (hung.status, raised.status, tools.status) == ("timeout", "error", "error")
    assert "row 2: KeyError: 'level'" in str(raised)
    assert "tools.0: input should be a valid dictionary, got 'add'" in str(tools)
    assert "no plain data" in str(unfit)
    assert pool.episodes == [0]
    pool.close()


def test_a_close_that_hangs_costs_nothing(own):
    bad, good = played(own, ("a",), ("a", "a"), scale=7.0, timeout=0.5)
    assert [turn.reward for turn in bad] == [7.0]
    assert [turn.reward for turn in good] == [7.0, 14.0]


def test_output_is_shown_within_bounds(own, capfd):
    bad, good = played(own, ("flood", "a"), ("b",))
    assert [turn.reward for turn in bad] == [1.0, 2.0]
    assert good[0].reward == 1.0
    shown = capfd.readouterr().err
    assert shown.startswith("seen\n")
    assert "more output is left out" in shown
    assert len(shown) < 20_200


def test_a_fork_of_an_environment_answers_nothing(own):
    (turns,) = played(own, ("fork", "a", "b"))
    assert [turn.reward for turn in turns] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Refused", "cannot be made: RuntimeError: no server at :1"),
        ("nothing", "cannot be made: int is no environment; write a class with reset"),
        ("Missing", "has no function 'Missing'"),
    ],
)
def test_an_environment_that_cannot_be_made_is_said_at_once(own, name, words):
    pool = EnvironmentPool(f"{own}:{name}", {}, 2, 20.0)
    with pytest.raises(ValueError, match=words):
        asyncio.run(pool.check())
    with pytest.raises(ValueError, match=words):
        asyncio.run(pool.open({"n": 1}, 0))
    pool.close()


@register("adding")
class Adding:
    def reset(self, row, seed):
        return Opening(({"role": "user", "content": f"{row['n']} {seed}"},))

    def step(self, reply):
        return Turn(reward=len(reply["content"]), done=True)

    def close(self): ...


def test_what_is_registered_here_is_found_there():
    pool = EnvironmentPool("adding", {}, 1, 20.0)
    (turn,) = asyncio.run(episode(pool, "four"))
    assert turn == Turn(reward=4.0, done=True)
    pool.close()


def test_wrong_options_are_said_at_once(own):
    pool = EnvironmentPool(f"{own}:Own", {"scael": 1.0}, 1, 20.0)
    with pytest.raises(ValueError, match="unexpected keyword argument 'scael'"):
        asyncio.run(pool.check())
    pool.close()


def test_a_cancelled_step_leaves_the_process_usable(own):
    async def play(pool):
        seat, _ = await pool.open({"n": 1}, 0)
        step = asyncio.ensure_future(seat.step(reply("sleep")))
        await asyncio.sleep(0.1)
        step.cancel()
        await seat.close()
        return await episode(pool, "a")

    pool = EnvironmentPool(f"{own}:Later", {}, 1, 20.0)
    assert asyncio.run(play(pool))[0].reward == 1.0
    pool.close()


def test_close_ends_all_processes_and_waits(own):
    async def play(pool):
        seat, _ = await pool.open({"n": 1}, 0)
        pids.append(int((await seat.step(reply("pid"))).messages[0]["content"]))
        step = asyncio.ensure_future(seat.step(reply("hang")))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(pool.close)
        with pytest.raises(asyncio.CancelledError):
            await step

    pids = []
    asyncio.run(play(EnvironmentPool(f"{own}:Own", {}, 1, 600.0)))
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_processes_end_with_a_trainer_that_is_killed(own):
    code = (
        "import asyncio, time\n"
        "from torchrft.environments.pool import EnvironmentPool\n"
        "async def main():\n"
        f"    pool = EnvironmentPool('{own}:Own', {{}}, 1, 600.0)\n"
        "    seat, _ = await pool.open({'n': 1}, 0)\n"
        "    print((await seat.step({'content': 'pid'})).messages[0]['content'], flush=True)\n"
        "    await seat.step({'content': 'hang'})\n"
        "asyncio.run(main())\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    time.sleep(0.2)
    trainer.kill()
    trainer.communicate()
    for _ in range(500):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail("the worker outlives its trainer")
