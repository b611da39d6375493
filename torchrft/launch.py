"""Start a job's processes on this host: `python -m torchrft.launch`, with the flags of the job.

run_train.sh calls it and documents the environment variables that it reads. A job that fails ends
with a line for each rank that failed, and with 128 + signal, 2 for a wrong config, or 1.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrft.tools.signals import SECONDS_BETWEEN_KEY_PRESSES, exit_on_signal

# A rank that fails leaves the others without it. They may say so, then they are ended.
SECONDS_TO_SPEAK = 5.0
SECONDS_TO_END = 30.0
RANK = [sys.executable, "-m", "torchrft.train"]
# Exit codes of `torchrft.train`: a rank that ends with one of them has said why.
SPOKEN = (0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def main(argv: list[str]) -> int:
    """Runs the job of `argv` and returns its exit code."""
    exit_on_signal()
    ngpu, nnodes = os.environ.get("NGPU", "1"), os.environ.get("NNODES", "1")
    ranks = re.fullmatch(r"(?:[A-Za-z0-9._-]+:)?([1-9][0-9]*)", ngpu)
    hosts = re.fullmatch(r"([1-9][0-9]*)", nnodes)
    if ranks is None or hosts is None:
        like = "must be numbers from 1, like NGPU=8 (or h100:8)"
        return _refuse(f"NGPU={ngpu} and NNODES={nnodes} {like}")
    count, endpoint = int(ranks[1]), os.environ.get("RDZV_ENDPOINT")
    os.environ["WORLD_SIZE"] = str(count * int(hosts[1]))
    os.environ.pop("RANK", None)  # of a job that has started this one
    if os.environ["WORLD_SIZE"] == "1":
        from torchrft import train

        train.run(argv)
    # A wrong config is refused here, in one process, before any other starts.
    from torchrft.config.manager import check_only
    from torchrft.preflight import job_faults

    if code := check_only(argv, job_faults):
        return 0 if code == 10 else code
    if hosts[1] == "1":
        return _one_host(argv, count)
    if not endpoint:
        return _refuse(f"NNODES={nnodes} needs RDZV_ENDPOINT=host:port, the same on all machines")
    return _several_hosts(argv, count, int(hosts[1]), endpoint)


def _refuse(text: str, code: int = 2) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


def _one_host(argv: list[str], count: int) -> int:
    """Ranks that meet at a socket of the loopback device, which no other host can reach."""
    heard: list[tuple[int, float]] = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, lambda number, _: heard.append((number, time.monotonic())))
    shown = os.environ.get("LOG_RANK", "").split(",")
    loopback = min((name for _, name in socket.if_nameindex()), key=lambda n: n[:2] != "lo")
    ranks, logs = [], {}
    with socket.create_server(("127.0.0.1", 0)) as store:
        host, port = store.getsockname()
        meeting = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
        for rank in range(count):
            env = {"GLOO_SOCKET_IFNAME": loopback, **os.environ, **meeting}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"TORCHRFT_STORE": str(store.fileno())}  # where rank 0 answers
            output = None
            if shown != [""] and str(rank) not in shown:
                output, logs[rank] = tempfile.mkstemp(".log", f"torchrft-rank{rank}-")
            process = subprocess.Popen(
                [*RANK, *argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[] if rank else [store.fileno()],
                process_group=0,  # Ctrl-C comes from here, once
            )
            ranks.append(process)
    return _exit_code(_wait(ranks, heard), heard[0][0] if heard else None, logs)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], heard: list[tuple[int, float]]
) -> dict[int, int]:
    """Exit codes in the order in which ranks ended, without those that others' failure ended.

    `heard` grows by signals, with their times. The first one lets the ranks save and end.
    """
    codes: dict[int, int] = {}
    ended: set[int] = set()
    due: list[tuple[float, int]] = []  # what the ranks that are left get, and when
    asked = failed = insisted = False
    while len(codes) < len(ranks):
        now = time.monotonic()
        codes |= {r: p.returncode for r, p in enumerate(ranks) if p.poll() is not None}
        if heard and not asked:
            grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 600))
            grace = SECONDS_TO_END if failed else grace
            asked, due = True, [(now, signal.SIGTERM), (now + grace, signal.SIGKILL)]
        presses = [at for signum, at in heard if signum == signal.SIGINT]
        if not insisted and presses and presses[-1] > heard[0][1] + SECONDS_BETWEEN_KEY_PRESSES:
            insisted, due = True, [(now, signal.SIGINT), (now + 5, signal.SIGKILL)]
        if not failed and any(code not in SPOKEN[:1] + SPOKEN[3:] for code in codes.values()):
            at = now + SECONDS_TO_SPEAK
            failed, due = True, [(at, signal.SIGTERM), (at + SECONDS_TO_END, signal.SIGKILL)]
        while due and due[0][0] <= now:
            signum = due.pop(0)[1]
            left = [rank for rank in range(len(ranks)) if rank not in codes]
            ended |= set() if asked else set(left)
            for rank in left:
                ranks[rank].send_signal(signum)
        time.sleep(0.05)
    return {rank: code for rank, code in codes.items() if code >= 0 or rank not in ended}


def _exit_code(codes: Mapping[int, int], signum: int | None, logs: Mapping[int, str]) -> int:
    """Exit code of a job whose ranks ended with `codes`; a line for each that could not speak."""
    for rank, code in codes.items():
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += "; perhaps the host's memory ran out" if -code == signal.SIGKILL else ""
        if rank in logs and code:
            how += f"; its output is in {logs[rank]}"
        if code not in SPOKEN or (rank in logs and code):
            _refuse(f"rank {rank} {how}")
        elif rank in logs:
            Path(logs[rank]).unlink()
    failed = [128 - code if code < 0 else code for code in codes.values() if code]
    if signum is not None and failed:
        return 128 + signum
    return next((code if code in SPOKEN else 1 for code in failed), 0)


def _several_hosts(argv: list[str], count: int, hosts: int, endpoint: str) -> int:
    """torchrun, which lets the hosts find each other; without its tables and tracebacks."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.disable(logging.CRITICAL)
    shown = os.environ.get("LOG_RANK", "")
    words = ["--nnodes", str(hosts), "--nproc-per-node", str(count), "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", endpoint, "--rdzv-id", os.environ.get("RDZV_ID", "torchrft")]
    words += ["--local-ranks-filter", shown, "--tee", "3"] if shown else []
    try:
        run.run(run.parse_args([*words, "-m", "torchrft.train", *argv]))
    except ChildFailedError as error:
        return _exit_code({rank: f.exitcode for rank, f in error.failures.items()}, None, {})
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, ValueError) as error:
        text = f"the hosts did not meet at RDZV_ENDPOINT={endpoint}: {error}"
        return _refuse(text, 2 if isinstance(error, ValueError) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
