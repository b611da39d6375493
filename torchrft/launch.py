"""Start a job's processes on this host: `python -m torchrft.launch`, with the flags of the job.

run_train.sh calls it and documents the environment variables that it reads. A job that fails ends
with a line for each rank that failed, and with 128 + signal, 2 for a wrong config, or 1.
"""

import errno
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from queue import Empty, SimpleQueue

from torchrft.tools.signals import (
    LAUNCHER,
    SECONDS_BETWEEN_KEY_PRESSES,
    STOPS,
    exit_on_signal,
    heard_signals,
)
from torchrft.tools.text import one_line

Codes = dict[int, int]  # exit codes, by rank
Address = tuple[str, int]  # of a socket
Listener = socket.socket | None  # None on all hosts but the first

RANK = [sys.executable, "-m", "torchrft.train"]
# Its exit codes; a rank that ends with one of them has said why. Those above 128: that it saved.
SPOKEN = (1, 2, 0, *(128 + signum for signum in STOPS))
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # the variable with the seconds to save in after a signal
# Seconds until the ranks that are left get a signal, which one, and seconds until they are killed:
# after a rank failed others may say so, after a second Ctrl-C they end.
FAILED = (5.0, signal.SIGTERM, 30.0)
INSISTED = (0.0, signal.SIGINT, 5.0)
MEETING = 600.0  # seconds in which the first host of several must answer


def main(argv: list[str]) -> int:
    """Runs the job of `argv` and returns its exit code."""
    exit_on_signal()
    ngpu, nnodes = os.environ.get("NGPU", "1"), os.environ.get("NNODES", "1")
    sizes = re.fullmatch(r"(?:[A-Za-z0-9._-]+:)?([1-9]\d*) ([1-9]\d*)", f"{ngpu} {nnodes}")
    if sizes is None:
        like = "must be numbers from 1, like NGPU=8 (or h100:8)"
        return _refuse(f"NGPU={ngpu} and NNODES={nnodes} {like}")
    grace, shown = os.environ.get(GRACE, "600"), os.environ.get("LOG_RANK", "")
    if not re.fullmatch(r"\d+(\.\d+)? [\d,]*", f"{grace} {shown}"):
        return _refuse(f"{GRACE}={grace} must be seconds and LOG_RANK={shown} ranks, like 0,1")
    count, hosts = map(int, sizes.groups())
    os.environ["WORLD_SIZE"] = str(count * hosts)
    for name in ("RANK", "LOCAL_RANK"):  # of a job that has started this one
        os.environ.pop(name, None)
    if count * hosts == 1:
        from torchrft import train

        train.run(argv)
    # A wrong config is refused here, in one process, before any other starts.
    from torchrft.build.preflight import job_faults
    from torchrft.config.manager import check_only
    from torchrft.sources import SOURCES

    if code := check_only(argv, job_faults, SOURCES):
        return 0 if code == 10 else code
    if hosts == 1:
        return _one_host(argv, count)
    if not (endpoint := os.environ.get("RDZV_ENDPOINT")):
        return _refuse(f"NNODES={nnodes} needs RDZV_ENDPOINT=host:port, the same on all machines")
    return _several_hosts(argv, count, hosts, endpoint)


def _refuse(text: str, code: int = 2) -> int:
    print(f"error: {one_line(text)}", file=sys.stderr)
    return code


def _one_host(argv: list[str], count: int) -> int:
    """Ranks that meet at the loopback device, which no other host can reach."""
    listener = socket.create_server(("127.0.0.1", 0))
    return _job(argv, count, 0, listener.getsockname(), listener)


def _job(argv: list[str], count: int, first: int, store: Address, listener: Listener) -> int:
    """Runs the ranks from `first` on; all meet at `store`, where rank 0 answers by `listener`."""
    heard: list[tuple[int, float]] = []
    for signum in heard_signals(STOPS):
        signal.signal(signum, lambda number, _: heard.append((number, time.monotonic())))
    shown = os.environ.get("LOG_RANK") or ",".join(map(str, range(count)))
    env = _interface(store) | os.environ | {"LOCAL_WORLD_SIZE": str(count)}
    env |= {"MASTER_ADDR": store[0], "MASTER_PORT": str(store[1]), LAUNCHER: str(os.getpid())}
    env["TORCHRFT_STORE"] = str(listener.fileno()) if listener else ""
    ranks = []
    for local in range(count):
        process = subprocess.Popen(
            [*RANK, *argv],
            env={**env, "RANK": str(first + local), "LOCAL_RANK": str(local)},
            stdin=subprocess.DEVNULL,
            stdout=None if str(local) in shown.split(",") else subprocess.DEVNULL,
            pass_fds=[listener.fileno()] if listener and local == 0 else [],
            process_group=0,  # Ctrl-C comes from here, once
        )
        ranks.append(process)
    if listener:
        listener.close()
    return _exit_code(_wait(ranks, heard), heard[0][0] if heard else None)


def _interface(address: Address) -> dict[str, str]:
    """Has gloo and nccl listen at the network interface that leads to `address`, and no other."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR, for IPv4 alone
                if socket.inet_ntoa(answer[20:24]) == own:
                    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {}


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


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
            signalled = (0.0, signal.SIGTERM, float(os.environ.get(GRACE, 600)))
            wait, asks, grace = (signalled, FAILED, INSISTED)[stage - 1]
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
    """The host whose address the endpoint is has the first ranks; others ask it for a number."""
    name, _, port = endpoint.rpartition(":")
    try:
        if not 0 < int(port) < 2**16:
            raise ValueError(f"no port has the number {port}")
        found = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM)
        address = str(found[0][4][0]), int(port)
    except (OSError, ValueError) as error:
        return _refuse(f"RDZV_ENDPOINT={endpoint} is no host:port ({error})")
    if ip_address(address[0]).is_loopback and name not in ("localhost", address[0]):
        return _refuse(
            f"RDZV_ENDPOINT={endpoint} is {address[0]} here, where no other host reaches it; write "
            "the address that this host has in their network"
        )
    try:
        listener = socket.create_server(address, family=_family(address))
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return _refuse(f"RDZV_ENDPOINT={endpoint} cannot be used: {error}")
    else:
        return _job(argv, count, 0, address, listener)
    print(f"waiting for the host of RDZV_ENDPOINT={endpoint}", file=sys.stderr)
    answers = SimpleQueue[int | str]()
    # In a thread, since torch waits without a deadline for a server that says nothing.
    threading.Thread(target=lambda: answers.put(_number(address)), daemon=True).start()
    try:
        number = answers.get(timeout=MEETING)
    except Empty:
        number = f"no answer within {MEETING:g} seconds"
    if isinstance(number, str):
        return _refuse(f"the hosts did not meet at RDZV_ENDPOINT={endpoint}: {number}", 1)
    if number >= hosts:
        return _refuse(f"{hosts} hosts have met at RDZV_ENDPOINT={endpoint} already; free its port")
    return _job(argv, count, number * count, address, None)


def _number(address: Address) -> int | str:
    """This host's number, from 1, as rank 0's store gives it; or why there is none."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # it tells of every attempt
    from torch.distributed import TCPStore

    try:
        patience = timedelta(seconds=MEETING)
        store = TCPStore(*address, None, False, patience, wait_for_workers=False)
        job = store.get("torchrft/job").decode()
        if job != os.environ.get("RDZV_ID", ""):
            return f"the job RDZV_ID={job} has that port; choose another"
        return int(store.add("torchrft/hosts", 1))
    except RuntimeError as error:
        return str(error).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
