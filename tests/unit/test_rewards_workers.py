"""Rules in worker processes: what hangs, dies or leaks costs its sample; a bug stops the run."""

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards import RewardError, RewardResult, build_scorer
from torchrft.rewards.registry import RuleFault, make_rule
from torchrft.rewards.workers import Task, WorkerPool, _Run
from torchrft.types import Completion, Prompt

OWN = """
import asyncio, ctypes, os, sys, threading, time
from torchrft.rewards import RewardResult

kept = []

def behave(response):
    if response == "hang":
        while True:
            pass
    if response == "power":
        10 ** 10 ** 9
    if response == "exit":
        os._exit(3)
    if response == "crash":
        ctypes.string_at(0)
    if response == "leak":
        while True:
            kept.append(bytes(10**7))
    if response == "huge":
        bytes(10**12)
    if response == "bug":
        raise KeyError("level")
    if response == "nan":
        return float("nan")
    if response == "text":
        return "1"
    if response == "flood":
        print("seen")
        for stream in (sys.stdout, sys.stderr):
            for _ in range(100):
                stream.write("x" * 100_000)
        sys.stdout.flush()
    if response == "quit":
        sys.exit(1)
    if response == "interrupt":
        raise KeyboardInterrupt
    if response == "cancel":
        raise asyncio.CancelledError
    return float(len(response))

def many(responses):
    return [behave(response) for response in responses]

def fewer(responses):
    return [1.0] * (len(responses) - 1)

async def later(response):
    await asyncio.sleep({"slow": 60}.get(response, 0.01))
    return behave(response)

started = 0

async def meet(response):
    # Each waits until all three have started: only together do they ever end.
    global started
    started += 1
    while started < 3:
        await asyncio.sleep(0.001)
    return 1.0

async def all_later(responses, labels):
    await asyncio.sleep(0)
    return [RewardResult(len(r), parts={"half": len(r) / 2}, metrics={"one": 1}) for r in responses]

def pid():
    return os.getpid()

def parent():
    return os.getppid()

def modules():
    return float("torch" in sys.modules)

def inherits(response):
    pid = os.fork()
    if not pid:
        time.sleep(600)
    with open(response, "w") as file:
        file.write(f"{os.getpid()} {pid}")
    while True:
        pass
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def scored(path, function, *responses, workers=1, timeout=60.0, scorer=None, **entry):
    entry = RewardFunction(name=f"{path}:{function}", alias="own", **entry)
    reward = Reward(
        functions=[entry],
        reward_timeout=timeout,
        reward_workers=workers,
        reward_memory=0.2,
        error_reward=-1.0,
    )
    scorer = scorer or build_scorer(reward)
    prompts = [Prompt(10 + row, "", (1,), metadata={}) for row in range(len(responses))]
    completions = [
        Completion(row, 0, (1,), (0.0,), text, "stop") for row, text in enumerate(responses)
    ]
    try:
        return scorer.score(prompts, completions)
    finally:
        scorer.close()


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["hang", "power", "exit", "crash", "leak", "huge"])
def test_what_fails_costs_its_sample_only(bad, own, caplog):
    said = {
        "hang": "it took more than 2 s",
        "power": "it took more than 2 s",
        "exit": "it exited with 3",
        "crash": "it died of signal 11",
        "leak": "it took more than 0.2 GiB",
        "huge": "it took more than 0.2 GiB",
    }[bad]
    timeout = 2.0 if bad in ("hang", "power") else 60.0
    scores = scored(own, "behave", "ab", bad, "abc", timeout=timeout)
    assert [score.value for score in scores] == [2.0, -1.0, 3.0]
    assert [dict(score.metrics) for score in scores] == [{}, {"own/errors": 1.0}, {}]
    said = f"error_reward = -1; the first is prompt row 11: {said}"
    assert f"no verdict on 1 of 3 samples, which get {said}" in caplog.text


@pytest.mark.parametrize("function", ["behave", "many"])
def test_a_sample_whose_worker_was_killed_is_judged_again(function, own, tmp_path, caplog):
    with own.open("a") as file:
        file.write(f"""
plain, marker = behave, {str(tmp_path / "killed")!r}

def behave(response):
    if response == "kill" and not os.path.exists(marker):
        open(marker, "x").close()
        os.kill(os.getpid(), 9)
    return plain(response)
""")
    scores = scored(own, function, "ab", "kill", "abc")
    assert [(score.value, dict(score.metrics)) for score in scores] == [(2, {}), (4, {}), (3, {})]
    assert "no verdict" not in caplog.text


def test_a_rule_that_never_judges_ends_the_run(own, monkeypatch, caplog):
    """It is named at its first failure, and not every sample has to wait for it."""
    monkeypatch.setattr("torchrft.rewards.workers._EARLY", 4)
    with pytest.raises(RewardError) as caught:
        scored(own, "behave", *["exit"] * 8)
    what = f"reward function '{own}:behave': no verdict on"
    assert str(caught.value) == (
        f"{what} 3 of 3 samples so far, the last because it exited with 3; mend it, or raise "
        "max_reward_failures = 0.5"
    )
    assert [line for line in caplog.messages if "no verdict" in line] == [
        f"{what} {count} of all samples so far, the last because it exited with 3"
        for count in (1, 2)
    ]


def test_lost_samples_are_told_at_doublings(caplog):
    """Of all calls: a judge's parser is called for each sample, and must not fill the log."""
    pool = WorkerPool([Task("a", {}, False), Task("b", {}, False)], 1, 1.0, 1)
    for more in [1] * 9 + [32]:
        lost = dict.fromkeys(range(more), RewardResult(0.0, error="late"))
        pool._count_failures(_Run(1, [], False, 1.0, deque(), lost, set()), more, "late")
    pool._count_failures(_Run(0, [], False, 1.0, deque(), {}, set()), 1, "late")
    told = "reward function {!r}: no verdict on {} of all samples so far, the last because late"
    assert caplog.messages == [
        *(told.format("b", count) for count in (1, 2, 4, 8, 41)),
        told.format("a", 1),
    ]


LONG = """
from torchrft.rewards import RewardResult
from torchrft.rewards.registry import LabelError

class Mute(Exception):
    def __str__(self):
        raise ValueError("x" * 5_000_000)
    __repr__ = __str__

def f(response):
    if response == "text":
        raise ValueError("x" * 5_000_000)
    if response == "name":
        raise type("N" * 5_000_000, (Exception,), {})("why")
    if response == "mute":
        raise Mute
    if response == "label":
        raise LabelError("x" * 5_000_000)
    if response == "file":
        exec(compile("1 / 0", "f" * 5_000_000, "exec"))
    if response == "value":
        return "x" * 5_000_000
    return RewardResult(0.0, error="x" * 5_000_000)
"""


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("text", "ValueError: xxx"),
        ("name", "NNN"),
        ("mute", "Mute, whose text cannot be had"),
        ("label", "xxx"),
        ("file", "ZeroDivisionError: division by zero (fff"),
        ("value", "a reward must be a finite number, got 'xxx"),
        ("error", None),
    ],
)
def test_a_failure_is_told_in_few_words(bad, words, tmp_path):
    """They are shortened before they leave their process."""
    path = tmp_path / "own.py"
    path.write_text(LONG)
    rule = make_rule(f"{path}:f", {})
    if words is None:
        [result] = rule([{"response": bad}], 1.0)
        assert len(result.error) < 2100
        return
    with pytest.raises(RuleFault) as raised:
        rule([{"response": bad}], 1.0)
    assert raised.value.text.startswith(words)
    assert len(pickle.dumps(raised.value)) < 2500
    with pytest.raises(RewardError, match="prompt row 10") as told:
        scored(path, "f", bad)
    assert words in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["behave", "many", "later"])
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("bug", r"KeyError: 'level' \(.*own\.py, line \d+\)"),
        ("nan", "a reward must be a finite number, got nan"),
        ("text", "a reward must be a finite number, got '1'"),
        ("quit", "SystemExit: 1"),
        ("interrupt", r"KeyboardInterrupt:  \(.*own\.py, line \d+\)"),
        ("cancel", "CancelledError: "),
    ],
)
def test_a_bug_stops_the_run_and_names_source_and_row(function, bad, text, own):
    row = {"many": "10" if bad not in ("nan", "text") else "11", "later": "1[01]"}.get(
        function, "11"
    )
    with pytest.raises(RewardError, match=f"reward function 'own', prompt row {row}: {text}"):
        scored(own, function, "a", bad, "c")


def test_a_list_of_another_length_is_a_bug(own):
    with pytest.raises(RewardError, match="row 10: 2 rewards are expected in a list, got"):
        scored(own, "fewer", "a", "b")


def test_results_are_in_order_whatever_the_number_of_workers(own):
    texts = ["a" * (i % 7) for i in range(60)]
    for workers in (1, 3):
        scores = scored(own, "behave", *texts, workers=workers)
        assert [score.value for score in scores] == [float(i % 7) for i in range(60)]


@pytest.mark.slow
def test_several_workers_work(own):
    assert len({score.value for score in scored(own, "pid", *"abcdefgh", workers=2)}) <= 2
    assert len({score.value for score in scored(own, "pid", *"abcdefgh", workers=1)}) == 1
    assert os.getpid() not in {score.value for score in scored(own, "pid", "a")}
    assert {score.value for score in scored(own, "pid", "a", "b", isolate=False)} == {os.getpid()}


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    for cores, ranks, share in ((16, 4, 4), (96, 2, 8), (2, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        scorer = build_scorer(
            Reward(functions=[RewardFunction(name="code")], allow_unsafe_code=True)
        )
        assert scorer.sources["code"].pool.count == share


def test_workers_start_without_torch(own):
    assert scored(own, "modules", "a")[0].value == 0.0


@pytest.mark.slow
def test_async_functions_run_together(own):
    assert [score.value for score in scored(own, "meet", "a", "b", "c")] == [1.0] * 3
    slow = scored(own, "later", "a", "slow", "abc", timeout=1.0)
    assert [score.value for score in slow] == [1.0, -1.0, 3.0]
    assert slow[1].metrics == {"own/errors": 1.0}
    blocked = scored(own, "later", "a", "hang", "abc", timeout=0.3)
    assert [score.value for score in blocked] == [-1.0] * 3


@pytest.mark.parametrize("isolate", [True, False])
def test_typed_results_of_an_async_batch(own, isolate):
    one, two = scored(own, "all_later", "ab", "abcd", isolate=isolate)
    assert one.parts == {"own": 2.0, "own/half": 1.0}
    assert two.parts == {"own": 4.0, "own/half": 2.0}
    assert one.metrics == two.metrics == {"own/one": 1.0}


@pytest.mark.slow
def test_only_the_culprit_of_a_chunk_is_lost(own, tmp_path):
    """Quick samples travel together; those before and behind the one that dies have results."""
    texts = ["a" * (i % 5) for i in range(300)]
    bad = {0: "exit", 77: "exit", 78: "crash", 150: "huge", 299: "exit"}
    for place, text in bad.items():
        texts[place] = text
    scores = scored(own, "behave", *texts, workers=2)
    for place, score in enumerate(scores):
        expected = -1.0 if place in bad else float(place % 5)
        assert (place, score.value, bool(score.metrics)) == (place, expected, place in bad)
    texts = ["a", "b", "bug", *["c"] * 200]
    with pytest.raises(RewardError, match="row 12: KeyError"):
        scored(own, "behave", *texts, workers=1)


def test_a_batch_is_one_call_with_the_seconds_of_all(own):
    scores = scored(own, "many", "a", "exit", "b")
    assert [score.value for score in scores] == [-1.0] * 3


def test_a_file_that_loads_here_but_not_there_is_an_error(own):
    only_here = f"if os.getpid() != {os.getpid()}: raise OSError('gone')"
    own.write_text(f"import os\n{only_here}\ndef f(): return 1")
    with pytest.raises(RewardError, match=r"a worker process .* does not start: .*gone"):
        scored(own, "f", "a")


def test_a_fault_leaves_the_pool_usable(own):
    entry = RewardFunction(name=f"{own}:behave", alias="own")
    scorer = build_scorer(Reward(functions=[entry], reward_workers=2))
    prompt = Prompt(0, "", (1,))
    completions = [
        Completion(0, i, (1,), (0.0,), text, "stop") for i, text in enumerate(["a", "bug"])
    ]
    for _ in range(2):
        with pytest.raises(RewardError, match="KeyError"):
            scorer.score([prompt], completions)
        assert scorer.score([prompt], completions[:1])[0].value == 1.0
    scorer.close()


def test_threads_may_share_a_scorer(own):
    entry = RewardFunction(name=f"{own}:behave", alias="own")
    scorer = build_scorer(Reward(functions=[entry], reward_workers=2))
    found = {}

    def ask(count):
        prompt, completion = (
            Prompt(0, "", (1,)),
            Completion(0, 0, (1,), (0.0,), "a" * count, "stop"),
        )
        found[count] = [scorer.score([prompt], [completion])[0].value for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(count,)) for count in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scorer.close()
    assert found == {count: [float(count)] * 5 for count in range(4)}


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(own, tmp_path):
    """Also one that hangs at that moment, with what it has forked."""
    note = tmp_path / "pids"
    code = (
        "import sys\nsys.path.insert(0, sys.argv[2])\n"
        "from test_rewards_workers import scored\n"
        "scored(sys.argv[1], 'inherits', sys.argv[3])\n"
    )
    words = [sys.executable, "-c", code, str(own), str(Path(__file__).parent), str(note)]
    trainer = subprocess.Popen(words)
    wait_until(lambda: note.exists() and len(note.read_text().split()) == 2)
    pids = [int(pid) for pid in note.read_text().split()]
    assert not any(map(is_gone, pids))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: all(map(is_gone, pids)))


def test_a_killed_worker_takes_along_what_it_has_forked(own, tmp_path):
    note = tmp_path / "pids"
    (score,) = scored(own, "inherits", str(note), timeout=2.0)
    assert score.metrics == {"own/errors": 1.0}
    wait_until(lambda: all(is_gone(int(pid)) for pid in note.read_text().split()))


HALF = "b'\\0\\0\\1\\0 a part of 256 bytes'"


@pytest.mark.slow
@pytest.mark.parametrize("junk", ["b'\\0\\0\\0\\4junk'", "b'\\0\\0\\0\\5\\x80\\4K\\1.'", HALF])
def test_what_a_function_writes_to_its_workers_socket_costs_its_sample(tmp_path, monkeypatch, junk):
    monkeypatch.setattr("torchrft.rewards.workers._BLOCKED", struct.pack("ll", 1, 0))
    path = tmp_path / "writes.py"
    path.write_text(f"""
import os, stat, time
def writes(response):
    if response == "junk":
        for fd in range(3, 64):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    os.write(fd, {junk})
            except OSError:
                pass
        time.sleep(60)
    return float(len(response))
""")
    entry = RewardFunction(name=f"{path}:writes")
    made = build_scorer(Reward(functions=[entry], error_reward=-1.0, reward_workers=1))
    texts = ["a", "junk", "bb"]
    prompt = Prompt(0, "p", (1,))
    scores = made.score(
        [prompt], [Completion(0, i, (1,), (0.0,), t, "stop") for i, t in enumerate(texts)]
    )
    made.close()
    assert [score.value for score in scores] == [1.0, -1.0, 2.0]


def test_a_child_that_a_function_forked_does_not_answer_for_its_worker(tmp_path):
    path = tmp_path / "forks.py"
    path.write_text("""
import os, time
def forks():
    if os.fork() == 0:
        return 1.0
    time.sleep(0.2)
    return 0.25
def number(response):
    return float(response)
""")
    entries = [RewardFunction(name=f"{path}:{name}") for name in ("forks", "number")]
    made = build_scorer(Reward(functions=entries, reward_workers=1))
    prompt = Prompt(0, "p", (1,))
    given = [Completion(0, i, (1,), (0.0,), f"{100 + i}", "stop") for i in range(4)]
    for _ in range(2):
        values = [tuple(score.parts.values()) for score in made.score([prompt], given)]
        assert values == [(0.25, 100.0 + i) for i in range(4)]
    made.close()


def test_a_function_cannot_flood_the_console(own, capfd, caplog):
    """Of what it prints, the beginning is shown, and how much more there was."""
    assert [score.value for score in scored(own, "behave", "flood", "flood")] == [5.0, 5.0]
    shown = capfd.readouterr()
    assert "seen" in shown.out + shown.err
    assert len(shown.out + shown.err) < 10_000
    assert "reward functions printed" in caplog.text
    assert "bytes more, which are left out" in caplog.text
