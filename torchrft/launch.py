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
import time
from collections.abc import Sequence

from torchrft.tools.signals import (
    LAUNCHER,
    SECONDS_BETWEEN_KEY_PRESSES,
    STOPS,
    exit_on_signal,
    heard_signals,
)

Codes = dict[int, int]  # exit codes, by rank

RANK = [sys.executable, "-m", "torchrft.train"]
# Its exit codes; a rank that ends with one of them has said why. Those above 128: that it saved.
SPOKEN = (1, 2, 0, *(128 + signum for signum in STOPS))
# Seconds until the ranks that are left get a signal, which one, and seconds until they are killed:
# after a signal they save, after a rank failed they may say so, after a second Ctrl-C they end.
SIGNALLED = (0.0, signal.SIGTERM, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 600)))
FAILED = (5.0, signal.SIGTERM, 30.0)
INSISTED = (0.0, signal.SIGINT, 5.0)


def main(argv: list[str]) -> int:
    """Runs the job of `argv` and returns its exit code."""
    exit_on_signal()
    ngpu, nnodes = os.environ.get("NGPU", "1"), os.environ.get("NNODES", "1")
    sizes = re.fullmatch(r"(?:[A-Za-z0-9._-]+:)?([1-9]\d*) ([1-9]\d*)", f"{ngpu} {nnodes}")
    if sizes is None:
        like = "must be numbers from 1, like NGPU=8 (or h100:8)"
        return _refuse(f"NGPU={ngpu} and NNODES={nnodes} {like}")
    count, hosts = map(int, sizes.groups())
    os.environ["WORLD_SIZE"] = str(count * hosts)
    for name in ("RANK", "LOCAL_RANK"):  # of a job that has started this one
        os.environ.pop(name, None)
    if count * hosts == 1:
        from torchrft import train

        train.run(argv)
    # A wrong config is refused here, in one process, before any other starts.
    from torchrft.config.manager import check_only
    from torchrft.preflight import job_faults

    if code := check_only(argv, job_faults):
        return 0 if code == 10 else code
    if hosts == 1:
        return _one_host(argv, count)
    if not (endpoint := os.environ.get("RDZV_ENDPOINT")):
        return _refuse(f"NNODES={nnodes} needs RDZV_ENDPOINT=host:port, the same on all machines")
    return _several_hosts(argv, count, hosts, endpoint)


def _refuse(text: str, code: int = 2) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


def _one_host(argv: list[str], count: int) -> int:
    """Ranks that meet at a socket of the loopback device, which no other host can reach."""
    heard: list[tuple[int, float]] = []
    for signum in heard_signals(STOPS):
        signal.signal(signum, lambda number, _: heard.append((number, time.monotonic())))
    shown = os.environ.get("LOG_RANK") or ",".join(map(str, range(count)))
    loopback = min((name for _, name in socket.if_nameindex()), key=lambda name: name[:2] != "lo")
    ranks = []
    with socket.create_server(("127.0.0.1", 0)) as store:
        env = {"GLOO_SOCKET_IFNAME": loopback, **os.environ, "LOCAL_WORLD_SIZE": str(count)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1])}
        env["TORCHRFT_STORE"] = str(store.fileno())  # where rank 0 answers
        env[LAUNCHER] = str(os.getpid())
        for rank in map(str, range(count)):
            process = subprocess.Popen(
                [*RANK, *argv],
                env={**env, "RANK": rank, "LOCAL_RANK": rank},
                stdin=subprocess.DEVNULL,
                stdout=None if rank in shown.split(",") else subprocess.DEVNULL,
                pass_fds=[store.fileno()] if rank == "0" else [],
                process_group=0,  # Ctrl-C comes from here, once
            )
            ranks.append(process)
    return _exit_code(_wait(ranks, heard), heard[0][0] if heard else None)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], heard: list[tuple[int, float]]) -> Codes:
    """Exit codes in the order in which ranks ended, without those that others' failure ended.

    `heard` grows by signals, with their times.
    """
    codes: Codes = {}
    ended: set[int] = set()
    stage, due = 0, list[tuple[float, int]]()
    while len(codes) < len(ranks):
        now = time.monotonic()
        codes |= {r: p.returncode for r, p in enumerate(ranks) if p.poll() is not None}
        second = [at for signum, at in heard[1:] if signum == signal.SIGINT]
        insists = second and second[-1] > heard[0][1] + SECONDS_BETWEEN_KEY_PRESSES
        failed = any(code not in SPOKEN[2:] for code in codes.values())
        reached = 3 if insists else 2 if failed else 1 if heard else 0
        if reached > stage:
            stage = reached
            wait, asks, grace = (SIGNALLED, FAILED, INSISTED)[stage - 1]
            due = [(now + wait, asks), (now + wait + grace, signal.SIGKILL)]
        while due and due[0][0] <= now:
            number = due.pop(0)[1]
            left = [rank for rank in range(len(ranks)) if rank not in codes]
            ended |= set() if heard else set(left)
            for rank in left:
                ranks[rank].send_signal(number)
        time.sleep(0.05)
    return {rank: code for rank, code in codes.items() if code >= 0 or rank not in ended}


def _exit_code(codes: Codes, signum: int | None = None) -> int:
    """Exit code of a job whose ranks ended with `codes`; a line for each that could not speak."""
    for rank, code in codes.items():
        if code < 0:
            memory = "; perhaps the host's memory ran out" if -code == signal.SIGKILL else ""
            _refuse(f"rank {rank} was ended by {signal.Signals(-code).name}{memory}")
        elif code not in SPOKEN:
            _refuse(f"rank {rank} ended with exit code {code}")
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
    os.environ[LAUNCHER] = str(os.getpid())
    names = ",".join(["SIGQUIT", *(signum.name for signum in STOPS)])
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", names)
    shown = os.environ.get("LOG_RANK", "")
    words = ["--nnodes", str(hosts), "--nproc-per-node", str(count), "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", endpoint, "--rdzv-id", os.environ.get("RDZV_ID", "torchrft")]
    words += ["--local-ranks-filter", shown, "--tee", "3"] if shown else []
    try:
        run.run(run.parse_args([*words, "-m", "torchrft.train", *argv]))
    except ChildFailedError as error:
        return _exit_code({rank: f.exitcode for rank, f in error.failures.items()})
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, ValueError) as error:
        text = f"the hosts did not meet at RDZV_ENDPOINT={endpoint}: {error}"
        return _refuse(text, 2 if isinstance(error, ValueError) else 1)
    finally:
        logging.disable(logging.NOTSET)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
