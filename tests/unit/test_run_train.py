"""run_train.sh and torchrft.launch: which processes start, and how a job ends.

Ranks are small scripts here, unless a test says otherwise.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_job import argv
from torch.distributed import TCPStore

from torchrft import launch, train
from torchrft.tools.signals import exit_on_signal

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "run_train.sh"
INHERITED = {
    name: value
    for name, value in os.environ.items()
    if name not in ("NGPU", "NNODES", "WORLD_SIZE", "RANK", "LOG_RANK", "RDZV_ENDPOINT")
}


def start(folder, rank, count=2, **variables):
    """A launcher in a process of its own, whose ranks run the text `rank`; they write `pid-N`."""
    head = (
        f"import os, signal, sys, time\nRANK = int(os.environ['RANK'])\nos.chdir({str(folder)!r})\n"
    )
    ready = "open(f'pid-{RANK}.tmp', 'w').write(str(os.getpid()))\n"
    ready += "os.rename(f'pid-{RANK}.tmp', f'pid-{RANK}')\n"
    (folder / "rank.py").write_text(head + "def ready():\n" + textwrap.indent(ready, "    ") + rank)
    code = f"""
        import sys
        from torchrft import launch
        launch.RANK = [sys.executable, {str(folder / "rank.py")!r}]
        launch.FAILED = (0.3, 15, 1.0)
        sys.exit(launch._one_host([], {count}))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    env = INHERITED | {"TMPDIR": str(folder)} | variables
    return subprocess.Popen(words, env=env, stdout=-1, stderr=-1, text=True)


def wait_for(folder, count=2):
    deadline = time.monotonic() + 60
    while len(list(folder.glob("pid-?"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def result(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err.splitlines()


ENDS = {
    "all is well": ("pass", 0, []),
    "an exit code that says nothing": (
        "if RANK == 1: os._exit(9)\ntime.sleep(60)",
        *(1, ["error: rank 1 ended with exit code 9"]),
    ),
    "a kill": (
        "if RANK == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)",
        *(1, ["error: rank 0 was ended by SIGKILL; perhaps the host's memory ran out"]),
    ),
    "a crash in C": (
        "if RANK == 1: os.abort()\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)",
        *(1, ["error: rank 1 was ended by SIGABRT"]),
    ),
    "each says why": (
        "sys.stderr.write(f'error: no {RANK}\\n')\nos._exit(2)",
        *(2, ["error: no 0", "error: no 1"]),
    ),
    "the first failure counts": (
        "sys.stderr.write('error: why\\n')\ntime.sleep(0.2 * RANK)\nos._exit(2 - RANK)",
        *(2, ["error: why", "error: why"]),
    ),
    "stopped after a save": ("os._exit(143)", 143, []),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_line_for_each_rank_that_fails(tmp_path, name):
    rank, code, lines = ENDS[name]
    returned, out, errors = result(start(tmp_path, rank))
    assert (returned, out, sorted(errors)) == (code, "", lines)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_ranks_can_save_ends_them_at_once(tmp_path, signum, code):
    process = start(tmp_path, "ready()\ntime.sleep(60)")
    wait_for(tmp_path)
    process.send_signal(signum)
    ended = [f"error: rank {rank} was ended by SIGTERM" for rank in (0, 1)]
    assert result(process) == (code, "", ended)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_ranks_save_and_end_after_a_signal(tmp_path, signum, code):
    save = "    time.sleep(1)\n    os.write(1, b'saved %d\\n' % RANK)\n    os._exit(143)\n"
    rank = f"def save(*_):\n{save}signal.signal(15, save)\nready()\ntime.sleep(60)"
    process = start(tmp_path, rank)
    wait_for(tmp_path)
    process.send_signal(signum)
    returned, out, errors = result(process)
    assert (returned, sorted(out.splitlines()), errors) == (code, ["saved 0", "saved 1"], [])


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    rank = "from torchrft.tools.signals import end_with_launcher\n"
    rank += "signal.signal(15, signal.SIG_IGN)\nend_with_launcher()\nready()\ntime.sleep(600)"
    process = start(tmp_path, rank)
    wait_for(tmp_path)
    process.kill()
    process.communicate(timeout=300)  # it ends once the ranks, which hold the pipes, have ended


def test_a_rank_that_starts_after_its_launcher_has_ended_ends(tmp_path):
    code = "from torchrft.tools.signals import end_with_launcher; end_with_launcher(); print(1)"
    env = INHERITED | {"TORCHRFT_LAUNCHER": str(os.getpid()), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, env=env, stdout=-1, text=True).stdout == "1\n"
    env["TORCHRFT_LAUNCHER"] = "1"
    done = subprocess.run(words, env=env, stdout=-1, text=True)
    assert (done.returncode, done.stdout) == (137, "")


def test_a_second_ctrl_c_ends_ranks_that_are_saving(tmp_path):
    """The ranks hear SIGTERM from the first one and SIGINT from the second."""
    rank = (
        "def on(number, _):\n    print(number, flush=True)\n    number == 2 and os._exit(130)\n"
        "signal.signal(15, on)\nsignal.signal(2, on)\nready()\n[time.sleep(1) for _ in range(99)]"
    )
    process = start(tmp_path, rank, count=1)
    wait_for(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    assert result(process) == (130, "15\n2\n", [])


def test_a_rank_that_does_not_end_is_killed(tmp_path):
    rank = "signal.signal(15, signal.SIG_IGN)\nready()\ntime.sleep(60)"
    process = start(tmp_path, rank, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="0.5")
    wait_for(tmp_path)
    process.send_signal(signal.SIGTERM)
    returned, _, errors = result(process)
    assert (returned, len(errors)) == (143, 2)
    assert all("was ended by SIGKILL" in line for line in errors)


def test_ranks_meet_where_no_other_host_can_reach_them(tmp_path):
    rank = (
        "import socket\n"
        "if RANK == 0:\n"
        "    print(socket.socket(fileno=int(os.environ['TORCHRFT_STORE'])).getsockname())\n"
        "    print([os.environ[n] for n in ('MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK')])\n"
        "    print(os.environ['GLOO_SOCKET_IFNAME'])\n"
    )
    returned, out, errors = result(start(tmp_path, rank))
    address, place, device = out.splitlines()
    port = re.search(r"\d+", address.split(",")[1])[0]
    assert (returned, errors, address) == (0, [], f"('127.0.0.1', {port})")
    assert (place, device[:2]) == (str(["127.0.0.1", port, "0"]), "lo")


def test_log_rank_hides_output_but_no_fault(tmp_path):
    rank = "print('hello from', RANK, flush=True)\nif RANK: sys.exit('error: no')"
    assert result(start(tmp_path, rank, LOG_RANK="0")) == (1, "hello from 0\n", ["error: no"])


@pytest.mark.parametrize(("ngpu", "count"), [("2", 2), ("h100:4", 4), ("nvidia_h100-80gb.x:3", 3)])
def test_ngpu_may_be_slurms(monkeypatch, ngpu, count):
    started = []
    monkeypatch.setattr(launch, "_one_host", lambda argv, ranks: started.append(ranks) or 0)
    monkeypatch.setattr("torchrft.config.manager.check_only", lambda *_: 0)
    monkeypatch.setattr(launch, "exit_on_signal", lambda: None)
    for name, value in {"NGPU": ngpu, "NNODES": "1", "WORLD_SIZE": "7"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.main([]), started, os.environ["WORLD_SIZE"]) == (0, [count], str(count))


@pytest.mark.parametrize(
    "variables",
    [{"NGPU": "h100"}, {"NGPU": "0"}, {"NGPU": "h100:"}, {"NGPU": "a:2,b:2"}, {"NNODES": "two"}],
)
def test_what_is_no_number_is_refused(variables):
    result = subprocess.run([SCRIPT], env=INHERITED | variables, capture_output=True, text=True)
    ngpu, nnodes = variables.get("NGPU", "1"), variables.get("NNODES", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: NGPU={ngpu} and NNODES={nnodes} must be numbers from 1, like NGPU=8 (or h100:8)\n"
    )


@pytest.mark.parametrize(("grace", "shown"), [("abc", ""), ("-1", "0"), ("1e3", ""), ("60", "all")])
def test_other_settings_of_the_launcher_are_refused(grace, shown):
    env = INHERITED | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace, "LOG_RANK": shown}
    result = subprocess.run([SCRIPT], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace} must be seconds and LOG_RANK={shown} "
        "ranks, like 0,1\n"
    )


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("nowhere:port", "is no host:port (invalid literal for int() with base 10: 'port')"),
        ("localhost:99999", "is no host:port (no port has the number 99999)"),
        ("localhost:0", "is no host:port (no port has the number 0)"),
        ("nowhere.invalid:80", "is no host:port ("),
        ("head:80", "is 127.0.1.1 here, where no other host reaches it; write the address that"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(monkeypatch, capsys, endpoint, said):
    real = socket.getaddrinfo  # Debian gives a host's name this address in its own /etc/hosts
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **kinds: real("127.0.1.1" if host == "head" else host, *rest, **kinds),
    )
    code = launch._several_hosts([], 1, 2, endpoint)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith(f"error: RDZV_ENDPOINT={endpoint} {said}")


def test_hosts_ask_the_first_for_their_number(monkeypatch, capsys):
    """Of the same RDZV_ID only, and no more hosts than NNODES."""
    started = []
    monkeypatch.setattr(launch, "_job", lambda *values: started.append(values[1:]) or 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        store = TCPStore(
            *address, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        store.set("torchrft/job", "mine")
        endpoint = f"localhost:{address[1]}"
        codes = []
        for job in ("mine", "another", "mine", "mine"):
            monkeypatch.setenv("RDZV_ID", job)
            codes.append(launch._several_hosts([], 4, 3, endpoint))
    assert started == [(4, 4, address, None), (4, 8, address, None)]
    assert codes == [0, 1, 0, 2]
    lines = capsys.readouterr().err.splitlines()
    other, full = [line for line in lines if line.startswith("error: ")]
    assert lines[0] == f"waiting for the host of RDZV_ENDPOINT={endpoint}"
    assert other.endswith("the job RDZV_ID=mine has that port; choose another")
    assert full == f"error: 3 hosts have met at RDZV_ENDPOINT={endpoint} already; free its port"


def test_a_first_host_that_never_answers(monkeypatch, capsys):
    monkeypatch.setattr(launch, "MEETING", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        assert launch._several_hosts([], 1, 2, endpoint) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: the hosts did not meet at RDZV_ENDPOINT={endpoint}: ")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_start_of_one_process(tmp_path, signum, code):
    """The real entry point, while it imports."""
    words = [sys.executable, "-m", "torchrft.launch", *argv(save_path=tmp_path)]
    process = subprocess.Popen(words, env=INHERITED, stdout=-1, stderr=-1, text=True, cwd=ROOT)
    status = Path(f"/proc/{process.pid}/status")
    for _ in range(2000):  # until its handlers are there: bit 1 and bit 14 of the caught signals
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        if caught >> 14 & 1:
            break
        time.sleep(0.01)
    process.send_signal(signum)
    name = signal.Signals(signum).name
    assert result(process) == (code, "", [f"error: stopped by {name}"])


def test_a_bug_is_one_line_and_its_traceback_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchrft.trainer.Trainer.__init__", lambda *_: {}["absent"])
    assert train.main(argv(save_path=tmp_path / "run")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    file = tmp_path / "run" / "crashes" / "rank-0.txt"
    assert line.startswith("error: KeyError: 'absent' (")
    assert line.endswith(f"is in {file})")
    assert "Traceback" in file.read_text()


def test_a_fault_names_its_rank_among_several(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train._end_of_rank(ValueError("no\nroom"), 2) == 2
    assert capsys.readouterr().err == "error: no room (rank 1)\n"


def test_a_rank_leaves_sigterm_to_the_kernel_while_it_starts(monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        exit_on_signal()
        assert signal.getsignal(signal.SIGTERM) == before[0]
        assert signal.getsignal(signal.SIGINT) != before[1]
    finally:
        signal.signal(signal.SIGINT, before[1])
