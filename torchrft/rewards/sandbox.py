"""Runs a program of unknown intent with its tests, in a process with limits.

docs/rewards.md says what is guaranteed.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache

_MEMORY = 2**30  # bytes of address space
_FILE = 2**24  # bytes of any file written

# Takes its orders from standard input before the program runs. The key signs the verdict, so that a
# program which prints or ends the process passes nothing.
_HARNESS = """
import json, os, resource, sys
seconds, memory, size, networked, key, program, tests = json.load(sys.stdin)
verdict = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(nowhere, fd)
for limit, value in (
    (resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(limit, (value, value))
if networked:
    def refuse(event, arguments):
        if event.split(".")[0] in ("socket", "ctypes", "subprocess") or event in (
            "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"):
            raise PermissionError(event + " is not allowed")
    import socket, subprocess, ctypes
    sys.addaudithook(refuse)
def run(tests, write=os.write, fd=verdict, key=key):
    scope = {"__name__": "__main__"}
    exec(compile(program, "response", "exec"), scope)
    passed = 0
    for test in tests:
        try:
            exec(compile(test, "test", "exec"), scope)
            passed += 1
        except Exception:
            pass
    write(fd, (key + " " + str(passed)).encode())
del key, verdict
run(tests)
"""


@cache
def _isolation() -> tuple[str, ...]:
    """A command that takes the network and sight of other processes away; empty if it may not."""
    words = "unshare --user --map-root-user --net --ipc --pid --fork --kill-child"
    command = tuple(words.split())
    if shutil.which("unshare") is None:
        return ()
    probe = subprocess.run([*command, "true"], capture_output=True)
    return command if probe.returncode == 0 else ()


def run_tests(program: str, tests: Sequence[str], seconds: float) -> int:
    """How many of `tests`, Python source that raises to fail, pass after `program` has run.

    0 as well if it cannot be compiled, ends the process, or takes more than `seconds` in all.
    """
    isolation, key = _isolation(), secrets.token_hex(16)
    orders = json.dumps([seconds, _MEMORY, _FILE, not isolation, key, program, list(tests)])
    with tempfile.TemporaryDirectory(prefix="torchrft-code-") as folder:
        try:
            done = subprocess.run(
                [*isolation, sys.executable, "-I", "-B", "-c", _HARNESS],
                input=orders.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "OPENBLAS_NUM_THREADS": "1"},
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return 0
    signed, _, passed = done.stdout.decode(errors="replace").partition(" ")
    return int(passed) if signed == key and passed.isdecimal() else 0
