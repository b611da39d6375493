"""Clients that hold a reward server: by time, size, depth and number; over raw sockets."""

import contextlib
import gzip
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reward_servers import StubScorer, app_server

from torchrft.rewards import server_gate
from torchrft.rewards.server_app import ScoreRequest, create_app
from torchrft.rewards.server_gate import BODIES, BRANCHES, CONNECTIONS, GRACE_SECONDS, LIMITS, VALUE
from torchrft.tools.payload import branches

MIB = 1 << 20
BODY = {"prompts": ["a"], "responses": ["bc"]}


@pytest.fixture
def impatient(monkeypatch):
    for name in ("HEADER_SECONDS", "BODY_SECONDS"):
        monkeypatch.setattr(server_gate, name, 0.2)


@contextlib.contextmanager
def connected(url):
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as client:
        yield client


def post(length, *lines, path="/score"):
    """The head of a POST whose body has that many bytes."""
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*head, f"Content-Length: {length}", *lines, "", ""]).encode()


def answer(client):
    """Status and parsed body of one answer with a length; (0, None) for a closed connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in data and (part := client.recv(65536)):
            data += part
    if not data:
        return 0, None
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += client.recv(65536)
    return int(head.split()[1]), json.loads(body)


def ask(url, body=BODY):
    with connected(url) as client:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        client.sendall(post(len(content), "Connection: close") + content)
        return answer(client)


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /score HTTP/1.1\r\nHost: x\r\nX-Half", post(5)[:-1]],
    ids=["nothing", "half a header", "no end"],
)
def test_headers_that_do_not_end_are_not_waited_for(impatient, sent):
    with app_server(create_app(StubScorer())) as url, connected(url) as client:
        client.sendall(sent)
        assert answer(client) == (0, None)


def test_nor_those_of_a_second_request(impatient):
    with app_server(create_app(StubScorer())) as url, connected(url) as client:
        content = json.dumps(BODY).encode()
        client.sendall(post(len(content)) + content)
        assert answer(client)[0] == 200
        client.sendall(post(5)[:20])
        assert answer(client) == (0, None)


@pytest.mark.parametrize("path", ["/score", "/nothing", "/health"])
def test_a_body_that_does_not_end_is_answered(impatient, path):
    with app_server(create_app(StubScorer())) as url, connected(url) as client:
        client.sendall(post(100, path=path) + b"0123456789")
        text = "the body did not come within 0.2 seconds"
        assert answer(client) == (408, {"error": text})
        assert answer(client) == (0, None)


@pytest.mark.parametrize("path", ["/score", "/health", "/nothing"])
@pytest.mark.parametrize("length", ["Content-Length: 3221225472", "Transfer-Encoding: chunked"])
def test_without_the_token_nothing_is_taken_in(path, length):
    """The answer comes before the body; what is sent all the same ends after a few MiB."""
    with app_server(create_app(StubScorer(), token="geheim")) as url, connected(url) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        assert answer(client) == (401, {"error": "this server needs its bearer token"})
        with pytest.raises(OSError):  # it closes
            client.sendall((b"10000\r\n" + bytes(1 << 16) + b"\r\n") * 1600)


def test_a_length_beyond_the_limit_is_refused_before_the_body():
    with app_server(create_app(StubScorer(), max_bytes=MIB)) as url, connected(url) as client:
        client.sendall(post(MIB + 1))
        assert answer(client)[0] == 413


def test_unfinished_bodies_fill_a_bounded_memory():
    app = create_app(StubScorer(), max_bytes=MIB)
    with app_server(app) as url, contextlib.ExitStack() as clients:
        holding = [clients.enter_context(connected(url)) for _ in range(BODIES)]
        for client in holding:
            client.sendall(post(MIB) + bytes(MIB - 9))
        statuses = []
        for _ in range(500):  # until the last of them has been taken in
            statuses.append(ask(url, json.dumps({**BODY, "labels": ["x" * 1000]}).encode())[0])
            if statuses[-1] == 503:
                break
            time.sleep(0.01)
        assert statuses[-1] == 503
        held = {"error": "the requests under way fill this server's memory"}
        assert ask(url, json.dumps({**BODY, "labels": ["x" * 1000]}).encode()) == (503, held)
        clients.close()
        for _ in range(500):
            if ask(url)[0] == 200:
                break
            time.sleep(0.01)
        big = {"prompts": ["a"], "responses": ["b" * (MIB - 100)]}
        assert [ask(url, big)[0] for _ in range(2 * BODIES)] == [200] * 2 * BODIES


def test_what_is_unpacked_counts_as_well(monkeypatch):
    monkeypatch.setattr(server_gate, "BODIES", 0.5)
    with app_server(create_app(StubScorer(), max_bytes=MIB)) as url, connected(url) as client:
        content = gzip.compress(json.dumps({**BODY, "labels": ["x" * (MIB // 2)]}).encode())
        client.sendall(post(len(content), "Content-Encoding: gzip") + content)
        assert answer(client)[0] == 503


@pytest.mark.parametrize("name", ["labels", "metadata", "messages"])
@pytest.mark.parametrize(("depth", "status"), [(50, 200), (900, 422), (100_000, 422)])
def test_depth_is_bounded(name, depth, status):
    nested = "[" * depth + "]" * depth
    value = {"labels": nested, "metadata": f'{{"a": {nested}}}', "messages": f'[{{"a": {nested}}}]'}
    body = f'{{"prompts": ["a"], "responses": ["b"], "{name}": [{value[name]}]}}'
    with app_server(create_app(StubScorer())) as url:
        got = ask(url, body.encode())
    assert got[0] == status or (depth > 1000 and got[0] == 400)
    if depth == 900:
        assert got[1] == {"error": f"{name}: nested more than 64 deep"}


def labeled(label):
    return '{"prompts": ["a"], "responses": ["b"], "labels": [' + label + "]}"


CROWDED = {
    "lists": labeled("[" + "[]," * BRANCHES + "0]"),
    "nests": labeled("[" + ("[" * 900 + "]" * 900 + ",") * 600 + "0]"),
    "objects": labeled("[" + '{"a":0},' * (BRANCHES // 2) + "0]"),
    "keys": "{" + ",".join(f'"{i:x}":0' for i in range(BRANCHES)) + "}",
    "prompts": '{"responses": ["b"], "prompts": [' + "[]," * BRANCHES + "0]}",
    "no end": "[" * BRANCHES + "[",
    "behind an escape": labeled(r'["\\\\"' + ",[]" * BRANCHES + "]"),
    "numbers": labeled("[" + "0," * (8 * MIB // VALUE) + "0]"),
    "texts": labeled("[" + '"",' * (8 * MIB // VALUE // 3) + "0]"),
}


@pytest.mark.parametrize("name", CROWDED)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_would_take_long_to_parse_is_not_parsed(name, zipped, monkeypatch):
    """Small lists and keys by the hundred thousand, which a few MiB hold."""
    content = CROWDED[name].encode()
    words = ["Content-Encoding: gzip"] if zipped else []
    content = gzip.compress(content, 1) if zipped else content
    monkeypatch.setattr("starlette.requests.Request.json", None)  # to parse would be a 400
    app = create_app(StubScorer(), max_bytes=8 * MIB)
    with app_server(app) as url, connected(url) as client:
        client.sendall(post(len(content), *words) + content)
        got = answer(client)
    limits = "JSON of more than 524288 lists and keys, or 699050 values; send fewer samples in one"
    assert got == (413, {"error": f"the body is {limits}"})


def test_large_requests_of_honest_clients_are_parsed():
    """64 samples of 8,000 tokens, chats and metadata; what is in texts counts for nothing."""
    text = '[{"a": 1, "b": [2, 3]},\\' * 400
    chat = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
    sample = {"prompts": text, "responses": text, "query": text + text, "labels": text}
    sample |= {"messages": chat, "metadata": {str(key): [key] for key in range(20)}}
    sample |= {"token_ids": list(range(8000)), "prompt_token_ids": list(range(8000))}
    content = json.dumps({name: [value] * 64 for name, value in sample.items()}).encode()
    scorer = StubScorer()
    with app_server(create_app(scorer, max_bytes=16 * MIB)) as url:
        status, told = ask(url, content)
    assert (status, len(scorer.seen)) == (200, 64), told
    assert branches(content, BRANCHES, 16 * MIB // VALUE) == 1 + 8 + 8 + 64 * (10 + 41 + 2)


JSON = st.recursive(
    st.none() | st.integers() | st.text('",[{:\\\u2261\ud800ab'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('",[{:\\a'), inner),
    max_leaves=20,
)


def counted(value):
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(counted, value.values()))
    return 1 + sum(map(counted, value)) if isinstance(value, list) else 0


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_lists_objects_and_keys_are_counted_exactly(value):
    text = json.dumps(value).encode()
    assert branches(text, 10**6, 10**6) == counted(value)
    if counted(value):
        with pytest.raises(ValueError, match="more than"):
            branches(text, counted(value) - 1, 10**6)


def test_what_has_been_parsed_counts_as_well():
    """As a list may take, but a body's worth at most: a small limit refuses nothing for good."""
    app = create_app(StubScorer(), max_bytes=MIB)
    lists = labeled("[" + "[]," * 40_000 + "0]").encode()
    with app_server(app) as url:

        def until(status):  # what others hold is taken in, or given back, a little later
            statuses = [0]
            while statuses[-1] != status and len(statuses) < 500:
                time.sleep(0.01)
                statuses.append(ask(url, lists)[0])
            return statuses[-1]

        with contextlib.ExitStack() as clients:
            for _ in range(BODIES - 1):
                client = clients.enter_context(connected(url))
                client.sendall(post(MIB) + bytes(MIB - 9))
            assert until(503) == 503
            assert ask(url)[0] == 200
        assert until(200) == 200


@pytest.mark.parametrize(("count", "place"), [(1000, 0), (1000, 999)])
def test_the_first_unknown_key_ends_the_looking(count, place):
    names = [f"x{number}" for number in range(count)]
    body = {name: ["a"] for name in [*names[:place], *BODY, *names[place:]]}
    with pytest.raises(ValidationError) as raised:
        ScoreRequest.model_validate(body)
    [error] = raised.value.errors()
    assert error["msg"].startswith("Value error, 'x0' is none of prompts, responses, query, labels")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", [1] * 500_000),
        ("labels", None),
        ("token_ids", [["x"] * 500_000]),
        ("token_ids", [1] * 500_000),
        ("images", [1] * 500_000),
        ("metadata", [1] * 500_000),
        ("messages", [[1] * 500_000]),
        ("finish_reasons", ["x"] * 500_000),
    ],
)
def test_the_first_wrong_entry_ends_the_looking(name, value):
    """An error for each of half a million would keep all others waiting."""
    body = (
        {**BODY, name: value} if value else {"prompts": ["a"] * 70_000, "responses": ["b"] * 70_000}
    )
    with pytest.raises(ValidationError) as raised:
        ScoreRequest.model_validate(body)
    assert len(raised.value.errors()) <= 2  # one for each kind that an entry may be of
    if not value:
        assert "at most 65536 items after validation, not 70000" in str(raised.value)


def test_an_answer_does_not_echo_megabytes():
    with app_server(create_app(StubScorer())) as url:
        status, told = ask(url, {**BODY, "x" * 5_000_000: 1})
    assert status == 422
    assert len(told["error"]) < 2000


def test_the_end_does_not_wait_for_a_client_that_hangs(caplog):
    """With the app's own end, which closes the sources; without a traceback."""
    scorer = StubScorer()
    app = create_app(scorer)
    with contextlib.ExitStack() as clients, app_server(app, timeout_graceful_shutdown=1) as url:
        for sent in (post(100) + b"012", post(5)[:20], b""):
            clients.enter_context(connected(url)).sendall(sent)
        assert ask(url)[0] == 200
    assert scorer.closed
    assert "Traceback" not in caplog.text
    assert LIMITS["timeout_graceful_shutdown"] == GRACE_SECONDS == 10
    assert LIMITS["limit_concurrency"] == CONNECTIONS
