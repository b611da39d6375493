"""The HTTP client: who is asked, for how long, how often, and what ends a request."""

import asyncio
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from reward_servers import Reply, Scripted, free_port, raw_server, wait_until

from torchrft.tools import http
from torchrft.tools.http import Deadline, Server, ServerError, ServerGroup, run, run_all


def servers(*urls):
    return [Server(url, "server_urls") for url in urls]


def group(*urls, **options):
    return ServerGroup(
        servers(*urls), "the group", LookupError, **{"longest_rest": 30.0, **options}
    )


def answer(own, deadline=30.0, tries=sys.maxsize):
    """The JSON that a server of the group gives for an empty object."""

    def ask(server):
        return server.ask("/", {}, Deadline(deadline))

    return run(own.answer("the text", ask, Deadline(deadline, "timeout"), tries))


# ------------------------------------------------------------ one server


def test_a_failure_that_may_pass_is_tried_again_with_back_off(monkeypatch):
    replies = [Reply(drop=True), Reply(b"<html>"), Reply({}, 429), Reply([7])]
    slept = []
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda s: slept.append(s) or sleep(0))
    with Scripted(list(replies)) as scripted:
        [server] = servers(scripted.url)
        assert run(server.ask("/a", {"b": 1}, Deadline(30), retries=3)) == [7]
        assert [asked[0] for asked in scripted.asked] == ["/a"] * 4
        assert [s for s in slept if s] == [0.01, 0.02, 0.04]
        scripted.script = list(replies)
        with pytest.raises(ConnectionError, match="JSONDecodeError"):
            run(server.ask("/a", {}, Deadline(30), retries=1))
        scripted.script = [Reply({}, 404)]
        with pytest.raises(ServerError, match="HTTP 404"):
            run(server.ask("/a", {}, Deadline(30), retries=5))
        assert len(scripted.asked) == 4 + 2 + 1
    with pytest.raises(
        ConnectionError, match=r"^ConnectionRefusedError: \[Errno 111\] Connection ref"
    ):
        run(server.ask("/a", {}, Deadline(30)))


def test_retries_end_with_the_deadline():
    began = time.monotonic()
    [server] = servers(f"http://127.0.0.1:{free_port()}")
    said = r"no answer to /a within request_timeout = 0\.6 seconds"
    with pytest.raises(ConnectionError, match=said):
        run(server.ask("/a", None, Deadline(0.6, "request_timeout"), retries=10**6))
    assert 0.6 <= time.monotonic() - began < 5


def test_a_path_lies_below_the_servers_url():
    for url in ("http://a:1/x", "http://a:1/x/", "http://a:1/x?y=1"):
        assert Server(url, "o").under("/health") == "http://a:1/x/health"


def test_no_proxy_is_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Scripted([Reply({"a": 1})]) as scripted:
        [server] = servers(scripted.url)
        assert run(server.ask("/", {}, Deadline(30))) == {"a": 1}


def test_an_answer_that_does_not_end_is_not_taken_in():
    """It is left at its limit, whatever its length says."""
    sent = [0]

    def flood(connection: socket.socket):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
        while True:
            sent[0] += connection.send(b"1," * 5000)

    with raw_server(flood) as url:
        [server] = servers(url)
        with pytest.raises(ValueError, match="an answer of more than 100000 bytes"):
            run(server.exchange(url, {}, Deadline(30), limit=100_000))
    assert sent[0] < 20 << 20  # what the kernel's buffers take


def test_each_request_has_a_connection_of_its_own():
    """A server that was restarted would have closed one that was kept."""
    connections = []

    def one_answer(connection: socket.socket):
        connections.append(1)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with raw_server(one_answer) as url:
        [server] = servers(url)
        for _ in range(3):
            assert run(server.ask("/", {}, Deadline(30))) == {}
    assert len(connections) == 3


# ------------------------------------------------------------ several servers


def test_servers_take_turns_and_the_least_busy_one_is_asked():
    with Scripted([Reply(1)]) as one, Scripted([Reply(2)]) as two, Scripted([Reply(3)]) as three:
        own = group(one.url, two.url, three.url, turn=1)
        assert [answer(own) for _ in range(4)] == [2, 3, 1, 2]
        own.servers[0].outstanding = own.servers[2].outstanding = 1
        assert [answer(own) for _ in range(4)] == [2, 2, 2, 2]


def test_a_server_that_failed_rests_and_the_others_take_over(caplog):
    caplog.set_level("INFO", "torchrft")
    with Scripted([Reply({}, 500), Reply("first")]) as one, Scripted([Reply("other")]) as two:
        own = group(one.url, two.url)
        assert [answer(own) for _ in range(3)] == ["other"] * 3
        assert len(one.asked) == 1
        assert [server.failures for server in own.servers] == [1, 0]
        own.servers[0].rests_until = 0.0
        assert "first" in {answer(own), answer(own)}
        assert [server.fault for server in own.servers] == [None, None]
    assert [record.message for record in caplog.records] == [
        f"{one.url} is asked again in 0.5 s: HTTP 500: {{}}",
        f"{one.url} answers again",
    ]


def test_what_was_asked_before_does_not_end_a_rest():
    """One request is under way when the server asks for a pause; its answer comes later."""

    def script(body):
        if body == "slow":
            wait_until(lambda: len(scripted.asked) == 2)
            return Reply("answer", hang=0.3)
        return Reply({}, 429, {"Retry-After": "40"})

    with Scripted(script) as scripted:
        own = group(scripted.url)

        async def ask(body):
            return await own.answer(body, lambda s: s.ask("/", body, Deadline(30)), Deadline(30))

        async def both():
            return await asyncio.gather(ask("slow"), ask("refused"), return_exceptions=True)

        slow, refused = run(both())
    [server] = own.servers
    assert slow == "answer"
    assert "HTTP 429" in str(refused)
    assert server.rests_until > time.monotonic() + 30
    assert (server.failures, server.fault) == (0, "HTTP 429: {}")  # the next rest is short again


def test_a_server_is_left_out_until_its_owner_readmits_it(caplog):
    with Scripted([Reply({}, 503)]) as one, Scripted([Reply("fine")]) as two:
        own = group(one.url, two.url, until="the next day")
        assert [answer(own) for _ in range(3)] == ["fine"] * 3
        assert own.servers[0].rests_until == math.inf
        own.rest(own.servers[0], "again")
        own.rest(own.servers[1], "broken")
        with pytest.raises(LookupError) as caught:
            answer(own)
        own.readmit(own.servers[1])
        assert answer(own) == "fine"
    assert str(caught.value) == (
        "the group: the text found no answer before the next day "
        f"({one.url}: HTTP 503: {{}}; {two.url}: broken); is the server running?"
    )
    assert f"{one.url} is left out until the next day: HTTP 503: {{}}" in caplog.text
    assert "again" not in caplog.text.replace("answers again", "")


def test_tries_and_time_end(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)
    with Scripted([Reply({}, 500)]) as scripted:
        own = group(scripted.url)
        with pytest.raises(LookupError, match="the text found no answer in 3 tries"):
            answer(own, tries=3)
        assert len(scripted.asked) == 3
        with pytest.raises(LookupError, match=r"no answer within timeout = 0\.3 seconds \(http"):
            answer(own, deadline=0.3)
        own.servers[0].rests_until = time.monotonic() + 100
        began = time.monotonic()
        with pytest.raises(LookupError, match="within timeout = 90 seconds"):
            answer(own, deadline=90.0)  # a wait that the time does not allow is not begun
        assert time.monotonic() - began < 30


# ------------------------------------------------------------ many requests


def test_results_are_in_order_and_so_many_run_at_a_time():
    running, most = [0], [0]

    async def call(item):
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.02 if item % 2 else 0.001)
        running[0] -= 1
        return item * item

    assert run_all(call, range(20), 3, "items") == [i * i for i in range(20)]
    assert most[0] == 3
    assert run_all(call, []) == []


def test_the_first_failure_ends_the_others():
    ended = []

    async def call(item):
        if item == 1:
            raise KeyError("one")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(item)

    with pytest.raises(KeyError, match="one"):
        run_all(call, range(3))
    wait_until(lambda: sorted(ended) == [0, 2])


class Stopped(BaseException):
    pass


def test_what_interrupts_the_caller_ends_its_requests():
    """As a signal does that comes while a rollout or rewards are awaited."""

    def stop(signum, frame):
        raise Stopped

    arrived, gone = threading.Event(), threading.Event()

    def hang(connection: socket.socket):
        arrived.set()  # a request, of which `raw_server` has read the beginning
        with suppress(ConnectionError):  # a reset is an end as well
            while connection.recv(1 << 16):  # the rest of the request, then its end
                pass
        gone.set()

    with raw_server(hang) as url:
        [server] = servers(url)
        previous = signal.signal(signal.SIGUSR2, stop)
        try:
            main = threading.main_thread().ident
            threading.Thread(
                target=lambda: arrived.wait(30) and signal.pthread_kill(main, signal.SIGUSR2)
            ).start()
            with pytest.raises(Stopped):
                run(server.exchange(url, {}, Deadline(60)))
        finally:
            signal.signal(signal.SIGUSR2, previous)
        assert gone.wait(30)


def test_a_process_ends_while_a_request_is_under_way():
    """Nothing waits for the event loop's thread."""
    with Scripted([Reply(hang=60)]) as scripted:
        code = (
            "import threading, time\n"
            "from torchrft.tools.http import Deadline, Server, run\n"
            f"ask = Server('{scripted.url}', 'x').ask('/', {{}}, Deadline(60))\n"
            "threading.Thread(target=run, args=(ask,), daemon=True).start()\n"
            "time.sleep(1)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
