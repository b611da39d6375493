"""The client of reward servers: what it sends, what it retries, and what it refuses."""

import gzip
import json
import math
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import tiny_job
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reward_servers import Program, Reply, Scripted, free_port, raw_server, wait_until

from torchrft.config.reward_config import Reward
from torchrft.rewards import remote as remote_module
from torchrft.rewards.remote import RemoteRewards, parse_answer
from torchrft.rewards.source import RewardError, RewardRequest
from torchrft.tools import http as http_module
from torchrft.tools.http import Deadline, Server, ServerError, _seconds, run
from torchrft.types import Completion, Prompt


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A first wait that a test can bear."""
    monkeypatch.setattr(http_module, "FIRST_WAIT", 0.01)


def requests(count, **given):
    """Of `count` prompts with the rows 10, 11, ..., whose responses are "r0", "r1", ..."""
    prompts = [
        Prompt(10 + i, f"p{i}=", (1, i), **{"label": str(i), "metadata": {"level": i}, **given})
        for i in range(count)
    ]
    return [
        RewardRequest(prompt, Completion(i, 0, (5, i), (-0.1, -0.1), f"r{i}", "stop"))
        for i, prompt in enumerate(prompts)
    ]


def exchange(url, body, seconds):
    server = Server(url, "remote_rm_url")
    return run(server.exchange(server.under("/"), body, Deadline(seconds)))


def client(*urls, **fields):
    return RemoteRewards(Reward(remote_rm_url=list(urls), **fields))


def numbered(body):
    """Each response's number as its reward."""
    values = [float(text[1:]) for text in body["responses"]]
    return Reply({"rewards": values, "extra_logs": {"half": [v / 2 for v in values], "one": 1}})


def scores(results):
    return [result.score for result in results]


# ------------------------------------------------------------ what is sent


@pytest.mark.parametrize("path", ["", "/", "/score", "/a/get_reward?k=1"])
def test_the_url_is_used_as_it_is_given(path):
    with Scripted(numbered) as server:
        client(server.url + path).score(requests(1))
    assert [asked[0] for asked in server.asked] == [path or "/"]


def test_the_request_has_the_documented_form():
    good = Reply({"rewards": [0, 0]})
    with Scripted([good]) as server:
        client(server.url).score(requests(2))
        client(server.url, remote_rm_protocol="predecessor").score(requests(2))
    assert [asked[2] for asked in server.asked] == [
        {
            "query": ["p0=r0", "p1=r1"],
            "prompts": ["p0=", "p1="],
            "responses": ["r0", "r1"],
            "labels": ["0", "1"],
            "images": [[], []],
            "metadata": [{"level": 0}, {"level": 1}],
        },
        {"queries": ["p0=r0", "p1=r1"], "prompts": ["p0=", "p1="], "references": ["0", "1"]},
    ]
    assert server.asked[0][1]["Content-Type"] == "application/json"


def test_a_server_gets_more_if_it_says_that_it_takes_it():
    health = Reply({"status": "ok", "takes": ["rows", "token_ids", "anything"]})
    with Scripted(numbered, health=health) as server:
        client(server.url).score(requests(2))
    body = server.asked[0][2]
    assert body["rows"] == [10, 11]
    assert body["token_ids"] == [[5, 0], [5, 1]]
    assert "finish_reasons" not in body
    assert "anything" not in body


def test_requests_are_compressed_only_for_a_server_that_announces_it():
    label = "x" * 5000
    for announced in ({}, {"Accept-Encoding": "gzip"}):
        with Scripted(numbered, health=Reply({}, headers=announced)) as server:
            client(server.url).score(requests(3, label=label))
        _, headers, body = server.asked[0]
        assert headers.get("Content-Encoding") == ("gzip" if announced else None)
        assert body["labels"] == [label] * 3
        assert int(headers["Content-Length"]) < 1000 or not announced


def test_answers_may_be_compressed():
    zipped = gzip.compress(json.dumps({"rewards": [0.25]}).encode())
    with Scripted([Reply(zipped, headers={"Content-Encoding": "gzip"})]) as server:
        assert scores(client(server.url).score(requests(1))) == [0.25]
    assert server.asked[0][1]["Accept-Encoding"] == "gzip"


def test_the_token_is_sent(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", " sécret\n")
    with Scripted(numbered, health=Reply({"authorized": True})) as server:
        client(server.url, remote_rm_token_env="MY_TOKEN").score(requests(1))
        sent = server.asked[0][1]["Authorization"].encode("latin-1")
        assert sent == "Bearer sécret".encode()
        server.health = Reply({"authorized": False})
        with pytest.raises(
            ValueError, match=f"{server.url} refuses the token: remote_rm_token_env"
        ):
            client(server.url, remote_rm_token_env="MY_TOKEN")
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ValueError, match='remote_rm_token_env = "MY_TOKEN": the variable is not'):
        client("http://127.0.0.1:1", remote_rm_token_env="MY_TOKEN")


@pytest.mark.parametrize("bad", [{1, 2}, datetime(2026, 1, 1), b"x", object()])
def test_a_label_that_json_cannot_hold_names_its_row(bad):
    with Scripted(numbered) as server:
        source = client(server.url)
        rows = [*requests(1), *requests(1, metadata={"x": bad})]
        with pytest.raises(
            RewardError, match="prompt row 10: its label or metadata cannot be sent"
        ):
            source.score(rows)
    assert server.asked == []


# ------------------------------------------------------------ order, batches, threads


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("threads", [1, 5])
def test_results_do_not_depend_on_batches_and_threads(size, threads):
    """Whatever comes back first; every sample is asked about once."""
    under_way, most, lock = [0], [0], threading.Lock()

    def answer(body):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02 if "r0" in body["responses"] else 0.001)
        with lock:
            under_way[0] -= 1
        return numbered(body)

    with Scripted(answer) as one, Scripted(answer) as other:
        source = client(
            one.url, other.url, remote_rm_batch_size=size, remote_rm_concurrency=threads
        )
        results = source.score(requests(17))
    assert scores(results) == [float(i) for i in range(17)]
    assert [r.metrics for r in results] == [{"half": i / 2, "one": 1.0} for i in range(17)]
    sent = [asked[2]["responses"] for server in (one, other) for asked in server.asked]
    assert max(map(len, sent)) == min(size, 17)
    assert sorted(text for texts in sent for text in texts) == sorted(f"r{i}" for i in range(17))
    assert most[0] <= threads


def test_no_request_is_made_for_no_sample():
    with Scripted(numbered) as server:
        assert client(server.url).score([]) == []
    assert server.asked == []


# ------------------------------------------------------------ failures that pass


def test_transient_failures_are_retried():
    truncated = Reply(b'{"rewards": [1', headers={"Content-Length": "30"})
    passing = [
        Reply(drop=True),
        Reply({"error": "busy"}, 429, {"Retry-After": "0"}),
        Reply({"error": "oops"}, 500),
        Reply(b"<html>", 503),
        truncated,
    ]
    with Scripted([*passing, Reply({"rewards": [0.5, 0.5]})]) as server:
        source = client(server.url, remote_rm_retries=5)
        assert scores(source.score(requests(2))) == [0.5, 0.5]
        assert len(server.asked) == 6
        assert len({json.dumps(asked[2]) for asked in server.asked}) == 1
        assert source.servers[0].failures == 0
        server.script = [Reply({"error": "still broken"}, 500)]
        with pytest.raises(RewardError) as caught:
            client(server.url, remote_rm_retries=2).score(requests(2))
    assert len(server.asked) == 6 + 3
    assert str(caught.value) == (
        "reward source 'remote': prompt rows 10, 11 found no answer in 3 tries "
        f"({server.url}: HTTP 500: still broken); is the server running?"
    )


def test_waits_double_up_to_a_limit_and_the_server_may_ask_for_more(monkeypatch, caplog):
    monkeypatch.setattr(http_module, "FIRST_WAIT", 0.5)
    with Scripted(numbered) as server:
        source = client(server.url)
    [one] = source.servers
    for failures in range(9):
        began = time.monotonic()
        source.group.rest(one, ConnectionError("x"))
        assert one.failures == failures + 1
        assert one.rests_until >= began + 0.5
    source.group.rest(one, ServerError(server.url, 429, "busy", 77.0))
    assert one.rests_until >= began + 77
    waits = ["0.5", "1", "2", "4", "8", "16", "30", "30", "30"]
    assert [record.message for record in caplog.records] == [
        *(f"{server.url} is asked again in {wait} s: x" for wait in waits),
        f"{server.url} is asked again in 77 s: HTTP 429: busy",
    ]


def test_retry_after_is_read_in_both_forms():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    assert _seconds("17") == 17
    assert _seconds(later) == pytest.approx(40, abs=2)
    for nonsense in ("", "-1", "nan", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "1" * 400):
        assert 0 <= _seconds(nonsense) < math.inf
    with Scripted([Reply({}, 503, {"Retry-After": "9"})]) as server:
        with pytest.raises(ServerError) as caught:
            exchange(server.url, {}, 5)
        assert caught.value.retry_after == 9


def test_a_dead_servers_work_moves_and_comes_back():
    port = free_port()
    with Scripted(numbered) as alive:
        dead = f"http://127.0.0.1:{port}"
        source = client(dead, alive.url, remote_rm_batch_size=1)
        assert scores(source.score(requests(6))) == [0, 1, 2, 3, 4, 5]
        assert len(alive.asked) == 6
        with Scripted(numbered, port) as revived:
            source.servers[0].rests_until = 0.0
            assert scores(source.score(requests(6))) == [0, 1, 2, 3, 4, 5]
            assert revived.asked
            assert revived.checks >= 1
        assert len(alive.asked) + len(revived.asked) == 12


def test_a_server_that_is_not_well_gets_no_work():
    with Scripted(numbered) as good, Scripted(numbered, health=Reply({}, 503)) as bad:
        source = client(bad.url, good.url, remote_rm_batch_size=1)
        source.score(requests(4))
        source.servers[0].rests_until = 0.0
        source.score(requests(4))
    assert bad.checks >= 2
    assert bad.asked == []
    assert len(good.asked) == 8


def test_a_server_that_hangs_is_left():
    stuck = Reply({"rewards": [9]}, hang=60)
    with Scripted([stuck]) as bad, Scripted(numbered) as good:
        bad.health = Reply({"status": "ok"})
        source = client(bad.url, good.url, remote_rm_timeout=1, remote_rm_batch_size=1)
        assert scores(source.score(requests(2))) == [0, 1]
    assert bad.asked
    assert source.servers[0].fault == "no answer within remote_rm_timeout = 1 seconds"


def test_the_deadline_ends_all_retries():
    with Scripted([Reply({}, 500)]) as server:
        source = client(server.url, remote_rm_retries=10**6, remote_rm_deadline=0.3)
        with pytest.raises(RewardError, match=r"within remote_rm_deadline = 0\.3 seconds \(http"):
            source.score(requests(1))
    assert len(server.asked) > 1


# ------------------------------------------------------------ failures that stay


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": "labels are too odd"}, "labels are too odd"),
        ({"error": {"message": "no such model"}}, "no such model"),
        ({"detail": "Not Found"}, "Not Found"),
        (b"plain words", "plain words"),
    ],
)
def test_a_4xx_stops_with_the_servers_words(status, body, words):
    with Scripted([Reply(body, status)]) as server, pytest.raises(RewardError) as caught:
        client(server.url).score(requests(6))
    assert str(caught.value) == (
        f"reward source 'remote', {server.url} refuses prompt rows 10, 11, 12, 13, ...: "
        f"HTTP {status}: {words}"
    )
    assert len(server.asked) == 1


def test_a_refusal_does_not_wait_for_other_batches():
    def answer(body):
        return Reply({"error": "no"}, 400) if "r1" in body["responses"] else Reply(hang=60)

    with Scripted(answer) as server:
        source = client(server.url, remote_rm_batch_size=1)
        with pytest.raises(RewardError, match="refuses prompt rows 11: HTTP 400: no"):
            source.score(requests(3))
        # The requests under way end as well, long before their answers would come.
        wait_until(lambda: source.servers[0].outstanding == 0)
        assert not server.released.is_set()


def test_no_server_at_all_is_told_before_training():
    port = free_port()
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/score"]
    with pytest.raises(ValueError) as caught:
        client(*urls)
    told = "ConnectionRefusedError: [Errno 111] Connection refused"
    assert str(caught.value) == (
        f"no reward server can be reached: {urls[0]}: {told}; {urls[1]}: {told}; start it or "
        "correct remote_rm_url"
    )


@pytest.mark.parametrize(
    "url", ["localhost:5000", "ftp://a", "http://", "http://a:port", "http://a:99999", "http://[1"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match=r"remote_rm_url holds .*; write each as http://host:port"):
        client(url)


GOOD = {"rewards": [1, 0.5]}
BAD = {
    "no_json": (b"<html>fine</html>", "the answer is no JSON .*: <html>fine"),
    "empty": (b"", "the answer is no JSON"),
    "not_utf8": (b'{"rewards": "\xff"}', "the answer is no JSON"),
    "deep": (b"[" * 200_000, "the answer is no JSON"),
    "a_list": ([1, 0.5], 'the answer has no list "rewards"'),
    "other_key": ({"scores": [1, 0.5]}, 'the answer has no list "rewards": {"scores"'),
    "one_number": ({"rewards": 0.5}, 'the answer has no list "rewards"'),
    "too_few": (
        {"rewards": [1]},
        '"rewards" has 1 values for 2 samples, of the prompt rows 10, 11',
    ),
    "too_many": ({"rewards": [1, 2, 3]}, '"rewards" has 3 values for 2 samples'),
    "null": ({"rewards": [1, None]}, "prompt row 11, must be a finite number, got None"),
    "text": ({"rewards": [1, "1"]}, "prompt row 11, must be a finite number, got '1'"),
    "boolean": ({"rewards": [True, 1]}, "prompt row 10, must be a finite number, got True"),
    "nested": ({"rewards": [[1], [0]]}, r"prompt row 10, must be a finite number, got \[1\]"),
    "nan": (b'{"rewards": [1, NaN]}', "prompt row 11, must be a finite number, got nan"),
    "infinity": (
        b'{"rewards": [-Infinity, 1]}',
        "prompt row 10, must be a finite number, got -inf",
    ),
    "overflow": (b'{"rewards": [1, 1e999]}', "prompt row 11, must be a finite number, got inf"),
    "huge": (b'{"rewards": [1, 1%s]}' % (b"0" * 400), "prompt row 11, must be a finite number"),
    "digits": (b'{"rewards": [1, %s]}' % (b"1" * 5000), "the answer is no JSON"),
    "logs": ({**GOOD, "extra_logs": [1]}, '"extra_logs" must be an object'),
    "log_text": (
        {**GOOD, "extra_logs": {"a": [1, "x"]}},
        "the log 'a', prompt row 11, must be a finite number, got 'x'",
    ),
    "log_length": ({**GOOD, "extra_logs": {"a": [1]}}, "the log 'a' has 1 values for 2 samples"),
    "log_nan": (b'{"rewards": [1, 1], "extra_logs": {"a": NaN}}', "the log 'a', prompt row 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_answers_that_are_none_stop_the_run(case):
    body, words = BAD[case]
    with Scripted([Reply(body)]) as server, pytest.raises(RewardError, match=words) as caught:
        client(server.url).score(requests(2))
    assert str(caught.value).startswith(f"reward source 'remote', {server.url}")
    assert len(server.asked) == 1


def test_logs_may_leave_samples_out_and_cannot_replace_rewards():
    body = {"rewards": [1, 2], "extra_logs": {"a": [None, 3], "rewards": [7, 8], "b": None}}
    first, second = parse_answer(json.dumps(body).encode(), [0, 1], "u")
    assert (first.score, first.metrics) == (1.0, {"rewards": 7.0})
    assert (second.score, second.metrics) == (2.0, {"a": 3.0, "rewards": 8.0})


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (lambda: gzip.compress(b"0" * (1 << 27)), "an answer of more than 67108864 bytes"),
        (lambda: b"no gzip", "no valid gzip"),
        (lambda: gzip.compress(b'{"rewards": [1]}')[:-12], "the answer is no JSON"),
    ],
    # Fixed names: a gzip header holds the time, and two test processes must collect the same tests.
    ids=["bomb", "not gzip", "truncated"],
)
def test_bad_gzip_and_bombs_are_refused(raw, words):
    reply = Reply(raw(), headers={"Content-Encoding": "gzip"})
    with Scripted([reply]) as server, pytest.raises(RewardError, match=f"{server.url}: {words}"):
        client(server.url).score(requests(1))


# ------------------------------------------------------------ fuzzing

numbers = st.one_of(
    st.integers(), st.floats(), st.text(max_size=3), st.none(), st.booleans(), st.just(10**400)
)
answers = st.one_of(
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {"rewards": st.one_of(numbers, st.lists(numbers, max_size=3))},
        optional={
            "extra_logs": st.one_of(
                numbers,
                st.dictionaries(
                    st.text(max_size=3),
                    st.one_of(numbers, st.lists(numbers, max_size=3)),
                    max_size=3,
                ),
            )
        },
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=400, deadline=None)
@given(answers, st.integers(0, 3))
@example(b'{"rewards": [0, 0]}', 2)
def test_any_answer_is_a_right_one_or_an_error(content, count):
    """Never a number that the server did not give, nor another exception."""
    try:
        results = parse_answer(content, list(range(count)), "http://x")
    except RewardError as error:
        assert "http://x" in str(error)  # noqa: PT017
        return
    said = json.loads(content)["rewards"]
    assert [type(value) in (int, float) for value in said] == [True] * count
    assert [result.score for result in results] == [float(value) for value in said]
    assert all(math.isfinite(v) for r in results for v in (r.score, *r.metrics.values()))


pieces = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 500 X\r\n",
        b"HTTP/1.0 200 OK\r\n", b"HTTP/9 abc\r\n", b"Content-Length: 19\r\n",
        b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n",
        b"Retry-After: x\r\n", b"\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"-5\r\n", b"zz\r\n",
        b'{"rewards": [0.125]}', b"\x00\xff", b": \r\n", b"A" * 70000,
    ]
)  # fmt: skip


def test_any_bytes_on_the_wire_are_an_answer_or_an_error():
    current = [b""]
    with raw_server(lambda connection: connection.sendall(current[0])) as url:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.one_of(st.binary(max_size=300), st.lists(pieces, max_size=8).map(b"".join)))
        def attempt(content):
            current[0] = content
            try:
                answer = exchange(url, {"a": 1}, 5.0)
            except (ConnectionError, TimeoutError, ServerError, ValueError):
                return
            assert content.startswith(b"HTTP/")
            assert answer in content or b"chunked" in content

        attempt()


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_an_answer_that_trickles_in_is_cut_off(start):
    """Each byte is in time, the whole is not: in the status line, in headers, in a body."""

    def trickle(connection: socket.socket):
        connection.sendall(start)
        for _ in range(400):
            connection.sendall(b"1")
            time.sleep(0.02)

    with raw_server(trickle) as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no answer within 0\.3 seconds"):
            exchange(url, None, 0.3)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("zipped", [False, True])
def test_an_answer_without_a_length_that_breaks_off_is_asked_for_again(zipped):
    """HTTP/1.0: the end of the connection is the end of the answer, or of the server."""
    whole = json.dumps({"rewards": [0.5], "extra_logs": {}}).encode()
    whole, head = (gzip.compress(whole), b"Content-Encoding: gzip\r\n") if zipped else (whole, b"")
    said = []

    def answer(connection: socket.socket):
        cut = whole[: -12 if zipped else -3]  # gzip ends with 8 bytes of checks
        said.append(whole if len(said) > 2 else cut)  # the first asks for the health
        connection.sendall(b"HTTP/1.0 200 OK\r\n" + head + b"\r\n" + said[-1])

    with raw_server(answer) as url:
        assert scores(client(url).score(requests(1))) == [0.5]
    assert len(said) > 3


def test_an_answer_without_a_length_that_is_no_json_is_not_asked_for_again():
    told = []

    def answer(connection: socket.socket):
        told.append(1)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n<html>login</html>")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):  # closed with the request unread, it would be reset
            pass

    with raw_server(answer) as url:
        source = client(url)
        with pytest.raises(RewardError, match=r"the answer is no JSON .*: <html>login</html>"):
            source.score(requests(1))
    assert len(told) == 2  # the health, and the score


def test_a_client_works_again_after_a_request_that_failed():
    """A reward server that asks another one goes on."""
    replies = [Reply({"error": "no"}, 400), Reply({"rewards": [2]})]
    with Scripted(replies) as server:
        source = client(server.url)
        with pytest.raises(RewardError, match="refuses prompt rows 10: HTTP 400: no"):
            source.score(requests(1))
        assert scores(source.score(requests(1))) == [2.0]


# ------------------------------------------------------------ training

RULE = '''
import pathlib
import time

FOLDER = pathlib.Path(__file__).parent
calls = 0


def parity(response):
    """Like any rule; once it is armed, it gets stuck in the middle of the second step."""
    global calls
    calls += (FOLDER / "armed").exists()
    if calls == 22:
        (FOLDER / "armed").unlink()
        (FOLDER / "stuck").touch()
        time.sleep(120)
    return float(sum(map(ord, response)) % 2 == 0)
'''


@pytest.fixture(scope="module")
def parity_server(tmp_path_factory):
    """`python -m torchrft.rewards.server` with `parity`; its folder, where it can be armed."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "rule.py").write_text(RULE)
    name = f"{folder}/rule.py:parity"
    entry = f'{{ name = "{name}", alias = "parity", isolate = false }}'
    (folder / "server.toml").write_text(f"[reward]\nfunctions = [{entry}]\n")
    program = Program(folder / "log.txt", "--config", str(folder / "server.toml"))
    try:
        program.wait()
        yield program, folder, name
    finally:
        program.kill()


@pytest.mark.slow
def test_rewards_survive_a_kill_of_the_server(parity_server, tmp_path, monkeypatch):
    """The server is killed while it scores and started again: the run does not notice."""
    monkeypatch.setattr(remote_module, "_LONGEST_REST", 0.2)
    program, folder, name = parity_server
    fields = {"functions": None, "remote_rm_url": program.url, "remote_rm_batch_size": 4}
    fields["remote_rm_retries"] = 1000
    local = tiny_job.run(tmp_path / "local", functions=name)
    whole = tiny_job.run(tmp_path / "whole", **fields)
    (folder / "armed").touch()

    def kill():
        while not (folder / "stuck").exists():
            time.sleep(0.01)
        program.kill()
        program.start()

    killer = threading.Thread(target=kill)
    killer.start()
    broken = tiny_job.run(tmp_path / "broken", **fields)
    killer.join()
    assert (folder / "stuck").exists()
    rewards = [
        [record["reward/mean"] for record in tiny_job.records(tmp_path / run)]
        for run in ("local", "whole", "broken")
    ]
    assert len(set(rewards[0])) > 1
    assert rewards[0] == rewards[1] == rewards[2]
    record = tiny_job.records(tmp_path / "broken")[-1]
    assert record["reward/remote/parity"] == rewards[0][-1]  # the server's part, logged by name
    expected = tiny_job.weights(local)
    for job in (whole, broken):
        for key, value in tiny_job.weights(job).items():
            assert torch.equal(value, expected[key]), key


def test_a_run_without_its_server_does_not_start(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=f"no reward server can be reached: {url}: "):
        tiny_job.run(tmp_path, functions=None, remote_rm_url=url)


def test_a_reward_that_is_none_stops_the_run_before_the_optimizer(tmp_path):
    def nothing(body):
        return Reply({"rewards": [None] * len(body["prompts"])})

    with Scripted(nothing) as server, pytest.raises(RewardError, match="got None") as caught:
        tiny_job.run(tmp_path, functions=None, remote_rm_url=server.url)
    assert server.url in str(caught.value)
    assert "prompt row" in str(caught.value)
    assert len(server.asked) == 1
