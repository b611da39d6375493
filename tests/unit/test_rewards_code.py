"""Rewards for programs: how tests are read, what earns nothing, and what the sandbox keeps in."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from programs import ADD, ASSERTS, HONEST, HOSTILE, NOTHING, REFUSED

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards import build_scorer, rules, sandbox
from torchrft.rewards.code_tests import _is_output, passed_tests, read_tests
from torchrft.rewards.registry import LabelError
from torchrft.rewards.sandbox import Isolation, Sandbox
from torchrft.types import Completion, Prompt

FENCE = "```python\n{}\n```"
WAYS = [way.name for way in sandbox._isolations() if sandbox._works(way)]


def earned(label, program, seconds=20.0, **options):
    return rules.code(FENCE.format(program), label, seconds=seconds, **options)


def passed(program, sources, seconds=20.0):
    return passed_tests(program, read_tests(sources), seconds)


@pytest.fixture
def unsafe(monkeypatch):
    way = next(way for way in sandbox._isolations() if way.name == "none" and sandbox._works(way))
    monkeypatch.setattr(sandbox, "isolation", lambda: way)


@pytest.fixture
def safe():
    if not sandbox.isolation().is_safe:
        pytest.skip("no isolation works on this machine: no bwrap, no nsjail, no namespaces")


# --------------------------------------------------------------------------- what is earned


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_programs_that_solve_the_task_earn_1(name):
    assert earned(*HONEST[name]) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_programs_that_do_not_solve_it_earn_0(name, safe):
    assert earned(*HOSTILE[name], seconds=2.0) == 0.0


def test_the_tables_are_as_large_as_they_should_be():
    assert len(HONEST) >= 30
    assert len(HOSTILE) >= 35


@pytest.mark.parametrize(
    "name", ["equal to everything", "tests changed in frames", "stdin, all lines"]
)
def test_no_isolation_gives_no_reward_away(name, unsafe):
    assert earned(*HOSTILE[name], seconds=2.0) == 0.0
    assert earned(ASSERTS, ADD) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (ADD, 2),
        ("def add(a, b):\n    return 3", 1),
        ("def add(a, b) return", 0),
        ("import sys\nsys.exit(0)", 0),
        ("add = lambda a, b: a + b\nx = ' ' * 2**31", 0),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))\n" + ADD, 0),
        ("import subprocess\nsubprocess.run('true')\n" + ADD, 2),
        ("input()\n" + ADD, 0),
        ("open('x', 'w').write('y')\n" + ADD, 2),
        ("with open('x', 'wb') as file:\n    file.write(b'z' * 2**25)\n" + ADD, 0),
        ("print('z' * 10**7)\n" + ADD, 2),
    ],
)
def test_what_becomes_of_programs(program, expected):
    assert passed(program, ASSERTS) == expected
    assert not Path("x").exists()


def test_a_program_without_end_is_ended():
    assert passed("def add(a, b):\n    while True: pass", ASSERTS, 1.0) == 0


def test_partial_counts_tests():
    half = "def add(a, b):\n    return 3"
    assert (earned(ASSERTS, half), earned(ASSERTS, half, partial=True)) == (0.0, 0.5)
    ends = ADD.replace("return", "if a < 0: quit()\n    return")
    assert earned([*ASSERTS, ASSERTS[0]], ends, partial=True) == 2 / 3
    dies = "import os\n" + ADD.replace("return", "if a < 0: os._exit(0)\n    return")
    assert earned([*ASSERTS, ASSERTS[0]], dies, partial=True) == 1 / 3
    outputs = {"inputs": ["1", "2", "3"], "outputs": ["1", "4", "9"]}
    assert earned(outputs, "print(int(input()) ** 2 % 5)", partial=True) == 2 / 3


@pytest.mark.parametrize(
    ("wanted", "written", "is_equal"),
    [
        ("1\n2\n", "1  \n2", True),
        ("1\n2", "1 2", False),
        ("1\n2", "1\n\n2", False),
        ("1 2", "1  2.0", True),
        ("0.5", "0.5000004", True),
        ("0.5", "0.50001", False),
        ("1e6", "1000000.5", True),
        ("1000000", "1000000.5", False),
        (str(10**30), str(10**30 + 1), False),
        ("a b", "a  b", False),
        (" *\n***", " *\n***\n", True),
        (" *\n***", "*\n***", False),
        ("Case 1: 0.50", "Case 1: 0.5", True),
        ("YES", "yes", False),
        ("1.0", "nan", False),
        ("nan", "nan", True),
        ("inf", "1e999", False),
        ("1.5", "inf", False),
        ("", "", True),
        ("", "x", False),
        ("10.0", "1_0.0", False),
        ("5", "\uff15", False),
    ],
)
def test_outputs(wanted, written, is_equal):
    assert _is_output(wanted, [written]) is is_equal


# ------------------------------------------------------------------------- labels at the start

NEEDS_OBJECTS = [
    "assert Point(1, 2) == Point(1, 2)",
    "assert f(1) == Color.RED",
    "assert isinstance(f(1), Point)",
    "xs = [2, 1]\nsort(xs)\nassert xs == [1, 2]",
    "xs = [2, 1]\nr = sort(xs)\nassert xs == [1, 2]",
    "import random\nassert f(random.random()) == 1\nx = random.random()\nassert f(x) == x",
    "def near(a, b):\n    return abs(a - b) < 1\nassert near(f(1), 2)",
    "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass",
    "assert all(f(x) == x for x in range(3))",
    "with open('x') as file:\n    assert f(file) == 1",
    "s = Stack()\nn = len(s.items())\ns.push(1)\nassert n == 0",
    "assert f(1).__class__ == int",
    "assert ().__class__.__base__.__subclasses__()",
    "assert '{0.__class__}'.format(f(1)) == ''",
    "for i in range(10**9):\n    assert f(i) == i",
    "assert False",
    "assert hash(f(1)) == hash(2)",
    "assert issubclass(type(f(1)), int)",
    "assert f(1).equals(2)",
    "assert list(map(f, [1])) == [1]",
    "assert f(1) is f",
    "while f(1):\n    pass",
]


@pytest.mark.parametrize("label", [*NEEDS_OBJECTS, *REFUSED.values()])
def test_tests_that_a_program_could_forge_are_refused(label):
    text = r"needs the program's own objects, for .*allow_forgeable_tests = true, with which"
    with pytest.raises(LabelError, match=text):
        read_tests(label)
    scorer = build_scorer(Reward(functions=[RewardFunction(name="code")], allow_unsafe_code=True))
    assert read_tests(label, forgeable=True)
    scorer.close()


def test_forgeable_tests_run_where_they_are_allowed():
    label = ["xs = [2, 1]\nsort(xs)\nassert xs == [1, 2]", "assert isinstance(xs, list)"]
    program = "def sort(xs):\n    xs.sort()"
    assert earned(label, program, allow_forgeable_tests=True) == 1.0
    wrong = earned(label, "def sort(xs):\n    pass", allow_forgeable_tests=True, partial=True)
    assert wrong == 0.5
    # What can be read is read, whatever is allowed.
    assert earned(*HOSTILE["equal to everything"], allow_forgeable_tests=True) == 0.0


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ({"inputs": ["1"], "outputs": []}, "needs lists of as many inputs as outputs"),
        ({"inputs": "1", "outputs": "1"}, "needs lists of as many inputs as outputs"),
        ([{"input": "1"}], "has a case without input or output"),
        ([{"input": "1", "output": "1", "type": "functional"}], "that fn_name does not name: None"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "f(x)"}, r"does not name: 'f\(x\)'"),
        ([{"input": "1", "output": "1", "type": "html"}], "a case of type 'html': use 'stdin' or"),
        ({}, "is no test"),
        ({"inputs": [], "outputs": []}, "is no test"),
        ('{"ground_truth": 3}', "is no test"),
        (None, "is no test"),
        (["assert 1", 3], "is no test"),
        ("assert (", "is no Python"),
        ("(" * 10_000, "is no Python"),
        ("def test_f(x):\n    assert f(x) == 1", "tests nothing"),
        ({"inputs": ["1"], "outputs": [None]}, "a case whose input or output is None"),
        *((label, "tests nothing: it asks the program for no answer") for label in NOTHING),
    ],
)
def test_labels_that_are_no_tests_are_refused(label, text):
    with pytest.raises(LabelError, match=text):
        read_tests(label)


def test_tests_without_an_assertion_count_with_the_next():
    label = ["s = Stack()", "s.push(3)", "s.push(4)", "assert s.pop() == 4", "assert s.pop() == 3"]
    stack = HONEST["class"][1]
    assert len(read_tests(label)) == 2
    assert passed(stack, label) == 2
    assert passed("pass", label) == 0
    assert passed(stack.replace("append(x)", "append(3)"), label) == 1
    assert len(read_tests(["def g():\n    pass", "try:\n    g()\nfinally:\n    f()"], True)) == 1


def test_all_is_asked_whatever_the_answers_are():
    """A program that hears no further question would know that it was wrong."""
    label = [f"assert f({i}) == {i} and g({i}) == 0" for i in range(4)]
    tests = read_tests(label)
    asked = []

    class Asked(Sandbox):
        def ask(self, question):
            asked.append(question["call"])
            return super().ask(question)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchrft.rewards.code_tests.Sandbox", Asked)
        for program in ("def f(x):\n    return 9\ng = f", "f = g = lambda x: x", "pass"):
            assert passed_tests(program, tests, 20.0) in (0, 1)
            assert asked == [f"{name}({i})" for i in range(4) for name in "fg"]
            asked.clear()


def test_a_question_holds_inputs_alone():
    """Neither the expected value nor what it is compared by goes where the program is."""
    label = (
        "want = [7, 8]\nassert abs(f(1) - 42.5) < 1e-3\nassert f(x=[2]) == want and g(3)[0] in {9}"
    )
    asked = [
        question for (test,) in [read_tests(label)] for each in test for question in each.questions
    ]
    assert [question["call"] for question in asked] == ["f(1)", "f(x=[2])", "g(3)[0]"]


# ----------------------------------------------------------------------------- the sandbox


def test_no_isolation_is_refused(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation("none"))
    functions = [RewardFunction(name="code")]
    with pytest.raises(ValueError, match=r"install bubblewrap .* or set allow_unsafe_code = true"):
        build_scorer(Reward(functions=functions))
    build_scorer(Reward(functions=[RewardFunction(name="exact_match")])).close()
    logging.getLogger("torchrft").propagate = True
    with caplog.at_level(logging.WARNING, "torchrft"):
        build_scorer(Reward(functions=functions, allow_unsafe_code=True)).close()
    assert "programs run without isolation" in caplog.text


def test_the_best_isolation_that_works_is_chosen(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda tool, path=None: f"/tools/{tool}")
    ways = list(sandbox._isolations())
    names = list(dict.fromkeys(way.name for way in ways))
    assert names == ["bubblewrap", "nsjail", "namespaces", "none"]
    for way in ways[:-1]:
        command = " ".join(way.command)
        assert ("/home" in command, os.path.expanduser("~") in way.command) == (False, False)
    bwrap, nsjail = (next(way for way in ways if way.name == name) for name in names[:2])
    assert bwrap.command[0] == "/tools/bwrap"
    words = " ".join(bwrap.command)
    for option in ("--unshare-net", "--unshare-pid", "--die-with-parent", "--cap-drop ALL"):
        assert option in words
    assert f"--ro-bind {sys.prefix}/lib {sys.prefix}/lib" in words
    assert "--bind /" not in words.replace("--ro-bind", "")
    assert "/tools/setpriv --pdeathsig KILL /tools/nsjail -Mo" in " ".join(nsjail.command)
    assert f"-R {sys.prefix}/lib" in " ".join(nsjail.command)


def test_an_isolation_is_tried_before_it_is_believed(tmp_path, monkeypatch):
    """A `bwrap` that only starts its command, or fails, is none."""
    fake = tmp_path / "bwrap"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for text in ('while [ "$1" != /dev/shm ]; do shift; done\n', "exit 1\n"):
        fake.write_text(f'#!/bin/sh\n{text}shift 3\nexec "$@"')
        fake.chmod(0o755)
        ways = [way for way in sandbox._isolations() if way.name == "bubblewrap"]
        assert ways
        assert not any(map(sandbox._works, ways))


@pytest.mark.parametrize("name", dict.fromkeys(WAYS))
def test_every_isolation_of_this_machine(name, monkeypatch, tmp_path):
    """Programs work in it, have no network, no environment, and leave nothing behind."""
    way = next(way for way in sandbox._isolations() if way.name == name and sandbox._works(way))
    monkeypatch.setattr(sandbox, "isolation", lambda: way)
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        program = (
            "import ctypes, os, socket\ndef reach(port):\n    try:\n"
            "        socket.create_connection(('127.0.0.1', port))\n    except OSError:\n"
            "        return False\n    return True\n"
            "def environment():\n    return dict(os.environ)\n"
            "def deep():\n    for i in range(500):\n"
            "        os.mkdir('d' * 9)\n        os.chdir('d' * 9)\n"
            "    os.mkdir('shut', 0)\n    return True\n"
        )
        with Sandbox(program, 60.0) as box:

            def ask(call):
                answer = box.ask({"call": call})
                return answer and json.loads(answer)

            assert ask(f"reach({server.getsockname()[1]})") is not way.is_safe
            assert "SECRET" not in str(ask("environment()"))
            if way.is_safe:
                assert ask("os.path.exists('/etc/passwd') or os.path.exists('/home')") is False
                # Of this machine's /tmp it sees what leads to this Python.
                shown = {view.split("/")[2] for view in sandbox._view() if view[:5] == "/tmp/"}
                assert set(ask("os.getpid() < 99 and os.listdir('/tmp')")) == shown
                # In a namespace of its own a program would have capabilities again.
                assert ask("ctypes.CDLL(None).unshare(0x10000000)") == -1
                assert ask("[open('/tmp/x', 'w').write('y')]") == [1]
                for path in ("/x", "/usr/x", sys.prefix + "/x", "/proc/sys/kernel/core_pattern"):
                    assert ask(f"[open({path!r}, 'a')] and 1") is None
            assert ask("deep()") is True
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\nif os.fork():\n    os._exit(0)\n"
        "os.setsid()\nif os.fork():\n    os._exit(0)\ntime.sleep(99)",
        "import os, signal\nos.kill(0, signal.SIGKILL)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
    ],
    ids=["fork bomb", "daemon", "its group", "all"],
)
def test_what_a_program_starts_ends_with_it(program, safe):
    """Processes of the sandbox are known by their namespace, which is this machine's no more."""
    before, start = _namespaces(), time.monotonic()
    assert passed(program, ["assert f() == 1"], 1.5) == 0
    assert time.monotonic() - start < 20
    while _namespaces() - before:  # the kernel is at it
        assert time.monotonic() - start < 60
        time.sleep(0.01)


def _namespaces():
    names = set()
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        with suppress(OSError):
            names.add(os.readlink(path))
    return names


def test_a_process_that_ends_while_it_is_looked_at_is_no_fault(monkeypatch):
    def glob(path, pattern):
        raise FileNotFoundError(str(path))

    monkeypatch.setattr(Path, "glob", glob)
    assert sandbox._family(os.getpid()) == [os.getpid()]


def test_memory_and_processes_are_bounded_in_sum(safe, monkeypatch):
    monkeypatch.setattr(sandbox, "_SUM", 2**28)
    hungry = "import os, time\nos.fork(), os.fork()\nx = b'x' * 2**27\ntime.sleep(60)"
    crowd = (
        "import os, time\nfor i in range(200):\n    if os.fork() == 0:\n        time.sleep(60)\n"
    )
    for program in (hungry, crowd + "time.sleep(60)"):
        start = time.monotonic()
        assert passed(program, ["assert f() == 1"], 50.0) == 0
        assert time.monotonic() - start < 40  # long before its deadline


def test_a_sandbox_ends_with_its_worker(safe):
    """Also one whose worker had no time to end it."""
    code = (
        "from torchrft.rewards.sandbox import Sandbox\nimport os\n"
        "box = Sandbox('import time\\ndef f(): time.sleep(600)', 600.0)\n"
        "try:\n    box.deadline = 0\n    box._start()\n    print(box.process.pid, flush=True)\n"
        "finally:\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_workers_isolate_as_the_job_does(safe, monkeypatch):
    """A worker with a try of its own might go without, and a reward of 0 would hide a failure."""
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation("namespaces", ("/bin/false",)))
    scorer = build_scorer(Reward(functions=[RewardFunction(name="code")], reward_workers=1))
    try:
        prompt = Prompt(row=0, text="Add.", token_ids=(1,), label=ASSERTS)
        completion = Completion(0, 0, (1, 1), (-0.1, -0.1), FENCE.format(ADD), "stop")
        (score,) = scorer.score([prompt], [completion])
        assert (score.value, score.metrics["code/errors"]) == (0.0, 1.0)
    finally:
        scorer.close()


def test_of_python_only_its_own_folders_are_seen(monkeypatch, tmp_path):
    """A project may lie in the folder of a virtual environment, with its data."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(sandbox.sys, "prefix", str(tmp_path))
    shown = [path for path in sandbox._view() if path.startswith(str(tmp_path))]
    assert shown == [str(tmp_path / "lib")]


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation("namespaces", ("/bin/false",)))
    with pytest.raises(RuntimeError, match=r"the sandbox \(namespaces\) does not start"):
        earned(ASSERTS, ADD)


@pytest.mark.slow
def test_devices_cannot_be_changed(safe):
    program = (
        "import os\ndef f(name, mode):\n    open('/dev/null', 'w').write('x')\n"
        "    assert open('/dev/' + name, 'rb').read(1) is not None\n"
        "    os.chmod('/dev/' + name, mode)\n    return 1\n"
    )
    for name in ("null", "zero", "random", "urandom"):
        before = os.stat(f"/dev/{name}")
        test = f"assert f({name!r}, {before.st_mode & 0o7777}) == 1"
        assert earned(test, program) == 0.0
        assert earned(test, program.replace("os.chmod", "print")) == 1.0
        assert earned(test, program.replace("os.chmod(", "os.utime(").replace(", mode)", ")")) == 0
        assert os.stat(f"/dev/{name}").st_mtime == before.st_mtime


def test_a_script_is_bounded_also_where_it_was_started():
    """What starts scripts has limits as well, for they may reach it."""
    program = "import os, resource\nprint(open(f'/proc/{os.getppid()}/limits').read())"
    with Sandbox(program, 20.0) as box:
        limits = box.ask({"stdin": ""})
    assert re.search(r"Max address space +1073741824 ", limits)
    assert re.search(r"Max file size +16777216 ", limits)


@pytest.mark.slow
def test_judging_has_a_deadline(safe):
    start = time.monotonic()
    label = ["assert f(0) == 1", "assert set(f(1)) == {1, 2}"]
    program = "def f(n):\n    return [i * (2**61 - 1) for i in range(10**5)] if n else 1"
    assert passed(program, label, 2.0) == 1
    assert time.monotonic() - start < 20


def test_folders_of_any_depth_are_removed(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    start = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(1100):
            os.mkdir("d" * 9)
            os.chdir("d" * 9)
        os.mkdir("shut", 0o000)
    finally:
        os.chdir(start)
    sandbox._remove(str(folder))
    assert not folder.exists()
