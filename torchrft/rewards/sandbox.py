"""A process with limits for a program of unknown intent, and a conversation with it.

docs/rewards.md says what is guaranteed in each form of isolation.
"""

import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MEMORY = 2**30  # bytes of address space of a process
_SUM = 2**31  # bytes in memory of all processes together
_FILE = 2**24  # bytes of any file written
_SCRATCH = 2**26  # bytes of all files in /tmp
_TASKS = 128  # processes and threads
_ANSWER = 2**24  # bytes of an answer
_LOOK = 0.05  # seconds between looks at memory and processes
_LONGEST_START = 30.0  # seconds in which a process must be ready for the program
_LONGEST_END = 10.0  # seconds that the kernel may take to end what is killed
_NOBODY = 65534
_PATH = os.defpath + ":/usr/sbin:/sbin"

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/nix/store")
_PYTHON = ("bin", "lib", "lib64", "include", "share", "pyvenv.cfg")
# Builds a root of its own from read-only folders. The shell stays process 1, with capabilities, so
# that the program, which has none, cannot keep the namespace alive when its starter is killed.
_ROOT = f"""set -e
mount -n -t tmpfs -o size={_SCRATCH},mode=755 none /sys
cd /sys
mkdir etc proc
for file in FILES; do mkdir -p "./${{file%/*}}"; : > "./$file"; done
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
printf %s "$0" > etc/fstab
mount -n --all --fstab etc/fstab --target-prefix /sys
echo 0 > /proc/sys/user/max_user_namespaces || true
mount -n -t proc -o ro,nosuid,nodev,noexec proc proc 2> /dev/null || true
mount -n -o remount,ro none .
pivot_root . .
umount -n -l .
cd /tmp
setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
exit $?
"""
_SCRATCHES = [f"none {path} tmpfs size={_SCRATCH},X-mount.mkdir" for path in ("/tmp", "/dev/shm")]
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ENDING = "setpriv --pdeathsig KILL"  # what it becomes ends with the process that starts it
_NAMESPACES = (
    f"{_ENDING} unshare --user --map-root-user --net --ipc --uts --pid --mount --fork --kill-child"
)
_BWRAP = """bwrap --unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts
--disable-userns --die-with-parent --cap-drop ALL --proc /proc --dev /dev --chdir /tmp"""
_NSJAIL = f"""{_ENDING} nsjail -Mo -Q --keep_env --time_limit 0 --cwd /tmp
-m none:/tmp:tmpfs:size={_SCRATCH} -s /proc/self/fd/0:/dev/stdin -s /proc/self/fd/1:/dev/stdout
--rlimit_as hard --rlimit_cpu hard --rlimit_fsize hard --rlimit_nofile hard --rlimit_nproc hard
--rlimit_stack hard"""
_TOOLS: dict[str, tuple[str, ...]] = {
    "bubblewrap": ("bwrap",),
    "nsjail": ("setpriv", "nsjail"),
    "namespaces": ("setpriv", "unshare", "mount", "pivot_root"),
    "none": (),
}
_PROBE = "import socket; print(sum(name != 'lo' for _, name in socket.if_nameindex()), 'outside')"


@dataclass(frozen=True, slots=True)
class Isolation:
    """A way to start a process: a command in front of its own, and whom it runs as.

    `name` is "bubblewrap", "nsjail", "namespaces" or "none".
    """

    name: str
    command: tuple[str, ...] = ()
    user: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_safe(self) -> bool:
        return self.name != "none"

    def choose(self) -> None:
        """Makes it that of this process, which a worker must not find out by a try of its own."""
        _CHOSEN[:] = [self]

    def start(self, arguments: list[str], folder: str, **streams: Any) -> subprocess.Popen[bytes]:
        """Starts Python in a session of its own, with no more environment than it needs.

        A safe one brings an empty folder of its own, and does not see `folder`.
        """
        return subprocess.Popen(
            [*self.command, sys.executable, "-I", "-B", *arguments],
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": _PATH, "OPENBLAS_NUM_THREADS": "1"}
            | {"HOME": "/tmp" if self.is_safe else folder},
            start_new_session=True,
            **self.user,
            **streams,
        )


_CHOSEN: list[Isolation] = []


def _view() -> list[str]:
    """The folders and files of this machine that a program sees: those that Python needs."""
    python = os.path.dirname(os.path.realpath(sys.executable))
    prefixes = (sys.prefix, sys.base_prefix)  # perhaps a project's folder, with all that is in it
    paths = [*_SYSTEM, python, *(f"{prefix}/{name}" for prefix in prefixes for name in _PYTHON)]
    paths = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    return [path for path in paths if not any(path.startswith(f"{each}/") for each in paths)]


def _isolations() -> Iterator[Isolation]:
    """All that may do on this machine, the best first."""
    view = _view()
    paths = [path.replace("\\", "\\134").replace(" ", "\\040") for path in view]
    shown = [f"{path} {path} none rbind,ro,nosuid,nodev,X-mount.mkdir" for path in paths]
    # Root could change a device that is not read-only; writing to it is another matter.
    devices = [f"{path} {path} none bind,ro,nosuid,noexec" for path in _DEVICES]
    fstab = "\n".join([*_SCRATCHES, *shown, *devices, ""])
    files = [shlex.quote(path) for path in (*view, *_DEVICES) if not os.path.isdir(path)]
    root = _ROOT.replace("FILES", " ".join(files))
    commands = {
        "bubblewrap": [
            *(*_BWRAP.split(), "--size", str(_SCRATCH), "--tmpfs", "/tmp"),
            *("--size", str(_SCRATCH), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
            *("--remount-ro", "/proc"),  # files of /proc/sys belong to root, which the job may be
            *(word for path in view for word in ("--ro-bind", path, path)),
            *("--remount-ro", "/"),
        ],
        "nsjail": [
            *_NSJAIL.split(),
            *(word for path in (*view, *_DEVICES) for word in ("-R", path)),
            "--",
        ],
        "namespaces": [*_NAMESPACES.split(), "sh", "-c", root, fstab],
        "none": _ENDING.split() if shutil.which("setpriv") else [],
    }
    # Root becomes nobody where nobody can start this Python.
    nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    search = os.environ.get("PATH", "") + os.pathsep + _PATH
    for name, command in commands.items():
        tools = {tool: shutil.which(tool, path=search) for tool in _TOOLS[name]}
        if all(tools.values()):
            words = tuple(tools.get(word) or word for word in command)
            if os.geteuid() == 0:
                yield Isolation(name, words, nobody)
            if os.geteuid() != 0 or name in ("namespaces", "none"):  # root owns bwrap's devices
                yield Isolation(name, words)


def isolation() -> Isolation:
    """The best isolation that works on this machine, for this user; it takes a try to know."""
    if not _CHOSEN:
        _CHOSEN.append(next(filter(_works, _isolations()), Isolation("none")))
    return _CHOSEN[0]


def _works(way: Isolation) -> bool:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    try:
        with way.start(["-S", "-c", _PROBE], "/", **streams) as process:
            try:
                said, _ = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                return False
    except OSError:  # nobody may not start it
        return False
    return said == b"0 outside\n" if way.is_safe else said.endswith(b"outside\n")


class Sandbox(ExitStack):
    """A program in a process of its own, until `seconds` from its start; a context manager."""

    def __init__(self, program: str, seconds: float) -> None:
        super().__init__()
        self.program, self.seconds, self.deadline = program, seconds, 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.is_script = False

    def ask(self, question: Mapping[str, Any]) -> str | None:
        """What the process answers to a question, in JSON; None if it does not, or not in time.

        A question is one of code_asserts.Check. Scripts and calls have processes of their own.
        Raises RuntimeError if no process can be started.
        """
        is_script, token = "stdin" in question, secrets.token_hex(8)
        if self.process is None or is_script != self.is_script:
            self.close()
            self.is_script = is_script
            self._start()
        try:
            self._send([token, question])
            line = self._receive().decode()
        except (OSError, ValueError):
            self.close()
            return None
        # An answer names its question, so that none counts that was there before.
        start = f'["{token}", '
        return line[len(start) : -1] if line.startswith(start) else None

    def _start(self) -> None:
        way, self.received = isolation(), bytearray()
        folder = "/"
        if not way.is_safe:
            folder = tempfile.mkdtemp(prefix="torchrft-code-")
            self.callback(_remove, folder)
            if way.user:
                os.chown(folder, _NOBODY, _NOBODY)
        self.socket, theirs = socket.socketpair()
        self.enter_context(self.socket)
        with theirs:
            arguments = ["-X", "utf8", "-c", _CHILD.read_text()]
            self.process = way.start(arguments, folder, stdin=theirs, stdout=theirs)
        self.callback(_kill, self.process, way)
        seconds = int(self.seconds) + 1
        limits = {"RLIMIT_CPU": seconds, "RLIMIT_AS": _MEMORY, "RLIMIT_FSIZE": _FILE}
        limits |= {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}
        release = [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]]
        if way.is_safe and release >= [5, 14]:  # before, all processes of the user counted
            limits["RLIMIT_NPROC"] = _TASKS
        self.deadline = time.monotonic() + _LONGEST_START
        try:
            self._send([self.program, limits])
            self._receive()  # it is ready
        except OSError as error:
            self.close()
            raise RuntimeError(f"the sandbox ({way.name}) does not start: {error!r}") from error
        self.deadline = time.monotonic() + self.seconds

    def _send(self, message: Any) -> None:
        self.socket.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> bytes:
        """A line; raises OSError if none comes within the limits."""
        self.socket.settimeout(_LOOK)
        look = time.monotonic() + _LOOK
        while (end := self.received.find(b"\n")) < 0:
            now = time.monotonic()
            if now > self.deadline or (now > look and self._is_too_large()):
                raise TimeoutError
            look = now + _LOOK if now > look else look
            with suppress(TimeoutError):
                data = self.socket.recv(2**20)
                self.received += data
                if not data or len(self.received) > _ANSWER:
                    raise ConnectionError
        line = bytes(self.received[:end])
        del self.received[: end + 1]
        return line

    def _is_too_large(self) -> bool:
        """Whether all processes together take more than they may."""
        tasks = pages = 0
        for pid in _family(self.process.pid) if self.process else ():
            with suppress(OSError):
                tasks += len(os.listdir(f"/proc/{pid}/task"))
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return tasks > _TASKS or pages * os.sysconf("SC_PAGE_SIZE") > _SUM


def _kill(process: subprocess.Popen[bytes], way: Isolation) -> None:
    family = _family(process.pid)
    # The first process of a namespace takes all others along, wherever they have hidden, and is
    # the last to end.
    for pid in family[1:2] if way.is_safe else family[::-1]:
        with suppress(OSError), open(os.pidfd_open(pid), "rb", 0) as handle:
            signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)
            select.select([handle], [], [], _LONGEST_END)
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for each in pids:  # grows as it goes
        if len(pids) > 8 * _TASKS:
            break
        with suppress(OSError):  # it has ended, perhaps while it is looked at
            for path in Path(f"/proc/{each}/task").glob("*/children"):
                pids += map(int, path.read_text().split())
    return pids


def _remove(folder: str) -> None:
    """Removes a folder however deep it is, and whatever permissions are in it."""
    # The tools of the system go down by descriptors, for which no path is too long.
    subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
    subprocess.run(["rm", "-rf", folder])
