"""HTTP servers on 127.0.0.1 that tests ask for rewards: scripted, raw, the app, and the program."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn

from torchrft.rewards.server_gate import LIMITS
from torchrft.types import Score

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError("30 seconds have passed")


# ------------------------------------------------------------ scripted


@dataclass
class Reply:
    """An answer; `drop` closes the connection instead, `hang` waits so many seconds first."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    hang: float = 0.0


class Scripted:
    """Answers POSTs by `script(body)`, or by a list of replies of which the last one stays.

    `asked` are (path, headers, parsed body) of the POSTs, `checks` counts GETs of /health.
    """

    def __init__(
        self,
        script: Callable[[Any], Reply] | list[Reply],
        port: int = 0,
        health: Reply | None = None,
    ) -> None:
        self.script, self.health = script, health or Reply({}, 404)
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.checks = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.checks += 1
                self.reply(outer.health)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    raw = gzip.decompress(raw)
                body = json.loads(raw)
                with outer.lock:
                    outer.asked.append((self.path, dict(self.headers), body))
                self.reply(outer.next(body))

            def reply(self, reply: Reply) -> None:
                if reply.hang:
                    outer.released.wait(reply.hang)
                if reply.drop:
                    return
                body = reply.body
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(OSError):
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": len(content), **reply.headers}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:
                pass

        self.released = threading.Event()
        self.server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def next(self, body: Any) -> Reply:
        if not isinstance(self.script, list):
            return self.script(body)
        with self.lock:
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The url of a server that lets `answer` write to each connection, after some of a request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    answer(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


# ------------------------------------------------------------ the app


@dataclass
class Source:
    name: str = "length"
    arguments: tuple[str, ...] = ("response",)


class StubScorer:
    """Rewards each response with `rule(prompt, completion)`, by default its length."""

    def __init__(self, rule: Callable[..., float] | None = None, *sources: Source) -> None:
        self.rule = rule or (lambda prompt, completion: float(len(completion.text)))
        self.sources = {source.name: source for source in sources or (Source(),)}
        self.seen: list[Any] = []
        self.closed = False

    def score(self, prompts: Any, completions: Any) -> list[Score]:
        self.seen += zip([prompts[c.prompt_index] for c in completions], completions, strict=True)
        values = [self.rule(prompts[c.prompt_index], c) for c in completions]
        return [Score(value, {"length": value}) for value in values]

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def app_server(app: Any, **options: Any) -> Iterator[str]:
    """The url of an app that uvicorn serves in another thread, with the program's limits."""
    options = {**LIMITS, "log_level": "error", "lifespan": "on", **options}
    config = uvicorn.Config(app, host="127.0.0.1", port=0, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


# ------------------------------------------------------------ the program


class Program:
    """`python -m torchrft.rewards.server`, which can be killed and started again."""

    def __init__(self, log: Path, *words: str, **environment: str) -> None:
        self.port = free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}/score", log
        self.words = [sys.executable, "-m", "torchrft.rewards.server", "--port", str(self.port)]
        self.words += words
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
