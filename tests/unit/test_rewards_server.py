"""The reward server: its forms, limits and errors; the app over real sockets on 127.0.0.1."""

import contextlib
import gzip
import http.client
import json
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import schemathesis
import tiny
import tiny_classifiers
import tiny_job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reward_servers import Program, Source, StubScorer, app_server
from schemathesis import checks

from torchrft.config.reward_config import Reward
from torchrft.models.loader import load_tokenizer
from torchrft.rewards import server_app
from torchrft.rewards.remote import RemoteRewards
from torchrft.rewards.server import main
from torchrft.rewards.server_app import create_app
from torchrft.rewards.server_gate import LIMITS
from torchrft.rewards.source import RewardError, RewardRequest, SampleError
from torchrft.tools import distributed
from torchrft.types import Completion, Prompt

MIB = 1 << 20


def ask(url, path="/score", body=None, raw=None, **headers):
    """Status, headers and parsed (or plain) body of a POST, or of a GET without a body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    content = raw if raw is not None else None if body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    names = {"Content-Type": "application/json", **names}
    with contextlib.closing(connection):
        connection.request("GET" if content is None else "POST", path, content, names)
        response = connection.getresponse()
        answer = response.read()
    with contextlib.suppress(ValueError):
        return response.status, response.headers, json.loads(answer)
    return response.status, response.headers, answer.decode(errors="replace")


@pytest.fixture(scope="module")
def lengths():
    """An open server that rewards the length of a response, and its scorer."""
    scorer = StubScorer()
    with app_server(create_app(scorer, max_bytes=MIB)) as url:
        yield url, scorer


BODY = {"query": ["ab", "cdef"], "prompts": ["a", "c"], "responses": ["b", "def"]}
ANSWER = {"rewards": [1.0, 3.0], "extra_logs": {"length": [1.0, 3.0]}}


# ------------------------------------------------------------ forms


@pytest.mark.parametrize("path", ["/score", "/", "/get_reward"])
@pytest.mark.parametrize(
    "body",
    [
        BODY,
        {"query": BODY["query"], "prompts": BODY["prompts"]},
        {"prompts": BODY["prompts"], "responses": BODY["responses"]},
        {**BODY, "labels": ["x", None], "images": [None, []], "metadata": [None, {"a": 1}]},
        {"queries": BODY["query"], "prompts": BODY["prompts"], "references": [1, {"b": 2}]},
        {"queries": BODY["query"], "prompts": BODY["prompts"]},
    ],
    ids=["all", "query", "responses", "more", "predecessor", "predecessor_bare"],
)
def test_both_forms_are_taken_at_every_path(lengths, path, body):
    assert ask(lengths[0], path, body)[::2] == (200, ANSWER)


def test_sources_get_what_was_sent(lengths):
    url, scorer = lengths
    scorer.seen.clear()
    body = {**BODY, "labels": [{"a": 1}, None], "metadata": [{"k": "v"}, None]}
    more = {"token_ids": [[5], [6, 7]], "finish_reasons": ["length", "stop"], "rows": [40, 41]}
    more |= {"prompt_token_ids": [[1], [2]], "messages": [[{"role": "user"}], []]}
    assert ask(url, body={**body, **more})[0] == 200
    assert ask(url, body={"queries": ["ab"], "prompts": ["a"], "references": ["L"]})[0] == 200
    (p0, c0), (p1, c1), (p2, c2) = scorer.seen
    assert p0 == Prompt(40, "a", (1,), {"a": 1}, {"k": "v"}, ({"role": "user"},))
    assert p1 == Prompt(41, "c", (2,), None, {})
    assert p2 == Prompt(0, "a", (), "L", {})
    assert (c0.text, c0.token_ids, c0.finish_reason) == ("b", (5,), "length")
    assert (c1.text, c1.token_ids, c1.finish_reason) == ("def", (6, 7), "stop")
    assert (c2.text, c2.token_ids) == ("b", ())


BAD = {
    "no_json": (b"{", 422, "JSON decode error"),
    "deep": (b'{"prompts": ' + b"[" * 80_000, 400, "error parsing the body"),
    "utf16": ('{"prompts": ["a"], "responses": ["b"]}'.encode("utf-16"), 400, "no JSON in UTF-8"),
    "not_utf8": (b'{"prompts": ["\xff"]}', 400, "error parsing the body"),
    "digits": (b'{"prompts": [' + b"1" * 5000, 400, "error parsing the body"),
    "a_list": ([1], 422, "body"),
    "nothing": ({}, 422, "prompts: Field required"),
    "no_response": ({"prompts": ["a"]}, 422, "responses are missing"),
    "length": (
        {"prompts": ["a"], "responses": []},
        422,
        "the lists must be equally long, but there are {'prompts': 1, 'responses': 0}",
    ),
    "labels": ({**BODY, "labels": [1]}, 422, "'labels': 1"),
    "number": ({**BODY, "responses": ["b", 3]}, 422, "responses.1: Input should be a valid string"),
    "typo": ({**BODY, "lables": [1, 2]}, 422, "'lables' is none of prompts, responses, "),
    "query": ({"query": ["xb"], "prompts": ["a"]}, 422, "query 0 does not begin with its prompt"),
    "images": ({**BODY, "images": [["x"], []]}, 422, "images.0: x… is not valid base64"),
    "surrogate": (
        b'{"prompts": [], "responses": [], "\\ud800": 1}',
        422,
        "'\\ud800' is none of prompts",
    ),
    "references": ({"queries": ["ab"], "prompts": ["a"], "references": []}, 422, "equally long"),
    "no_prompts": ({"queries": ["ab"]}, 422, "prompts: Field required"),
    "mixed": ({**BODY, "queries": ["ab", "cdef"]}, 422, "Extra inputs are not permitted"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_requests_are_told_what_is_wrong(lengths, case):
    body, status, words = BAD[case]
    given = {"raw": body} if isinstance(body, bytes) else {"body": body}
    got, _, answer = ask(lengths[0], **given)
    assert got == status, answer
    assert list(answer) == ["error"]
    assert words in answer["error"]


def test_other_paths_methods_and_types(lengths):
    url, _ = lengths
    assert ask(url, "/scores", BODY)[::2] == (404, {"error": "Not Found"})
    assert ask(url, "/score/", BODY)[0] == 404
    assert ask(url, "/score")[::2] == (405, {"error": "Method Not Allowed"})
    assert ask(url, body=BODY, Content_Type="text/plain")[0] == 422


# ------------------------------------------------------------ limits


def test_large_requests_are_refused(lengths):
    """As sent, with and without a length, and decompressed; the client gets to the answer."""
    url, scorer = lengths
    scorer.seen.clear()
    large = json.dumps({"prompts": ["a"], "responses": ["b" * (2 * MIB)]}).encode()
    words = f"a request may have {MIB} bytes; send fewer samples in one"
    assert ask(url, raw=large)[::2] == (413, {"error": words})
    assert ask(url, raw=iter([large]))[0] == 413
    zipped = gzip.compress(large)
    assert len(zipped) < 10_000
    status, _, answer = ask(url, raw=zipped, Content_Encoding="gzip")
    assert (status, answer["error"]) == (
        413,
        f"the body is more than {MIB} bytes when decompressed; send fewer samples in one",
    )
    assert scorer.seen == []
    fits = json.dumps({"prompts": ["a"], "responses": ["b" * (MIB - 100)]}).encode()
    assert ask(url, raw=fits)[2]["rewards"] == [MIB - 100]


def test_gzip_both_ways(lengths):
    url, _ = lengths
    body = {"prompts": ["a"] * 500, "responses": ["b"] * 500}
    zipped = gzip.compress(json.dumps(body).encode())
    assert ask(url, raw=zipped, Content_Encoding="gzip")[2]["rewards"] == [1.0] * 500
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    with contextlib.closing(connection):
        names = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        connection.request("POST", "/score", json.dumps(body), names)
        response = connection.getresponse()
        assert response.headers["Content-Encoding"] == "gzip"
        assert json.loads(gzip.decompress(response.read()))["rewards"] == [1.0] * 500
    for bad in (b"no gzip", zipped[:-5], zipped + b"x"):
        status, _, answer = ask(url, raw=bad, Content_Encoding="gzip")
        assert status == 400
        assert answer["error"].startswith("the body is no valid gzip: ")
    assert ask(url, raw=zipped, Content_Encoding="br")[::2] == (
        415,
        {"error": "Content-Encoding must be gzip, not br"},
    )


def test_the_token_is_needed_everywhere_but_for_health():
    with app_server(create_app(StubScorer(), token="geheim", max_bytes=MIB)) as url:
        for wrong in ({}, {"Authorization": "Bearer geheim2"}, {"Authorization": "geheim"}):
            for path in ("/score", "/", "/get_reward", "/nothing"):
                status, headers, answer = ask(url, path, BODY, **wrong)
                assert (status, answer) == (401, {"error": "this server needs its bearer token"})
                assert headers["WWW-Authenticate"] == "Bearer"
            assert ask(url, "/metrics", **wrong)[0] == 401
            assert ask(url, raw=b"x" * 3 * MIB, **wrong)[0] == 401
            assert ask(url, "/health", **wrong)[2]["authorized"] is False
        right = {"Authorization": "Bearer geheim"}
        assert ask(url, body=BODY, **right)[::2] == (200, ANSWER)
        assert ask(url, "/metrics", **right)[0] == 200
        assert ask(url, "/health", **right)[2] == {
            "status": "ok",
            "sources": ["length"],
            "takes": ["rows"],
            "authorized": True,
        }


# ------------------------------------------------------------ scoring


def test_failures_of_a_source_are_500_with_its_sentence():
    def rule(prompt, completion):
        if prompt.label == "none":
            raise RewardError("reward function 'x', prompt row 7: no label")
        if prompt.label == "bad":
            raise SampleError("reward function 'x', prompt row 7: a bad label")
        raise KeyError("oops")

    with app_server(create_app(StubScorer(rule))) as url:
        body = {"prompts": ["a"], "responses": ["b"]}
        assert ask(url, body={**body, "labels": ["none"]})[::2] == (
            500,
            {"error": "reward function 'x', prompt row 7: no label"},
        )
        # Asking again would not mend the data, and a client does not.
        status, _, answer = ask(url, body={**body, "labels": ["bad"]})
        assert (status, answer["error"]) == (422, "reward function 'x', prompt row 7: a bad label")
        assert ask(url, body=body)[::2] == (500, {"error": "KeyError: 'oops'"})
        assert ask(url, "/health", Content_Encoding="gzip")[0] == 200
        assert ask(url, "/health")[0] == 200


def test_a_function_that_wants_tokens_does_not_get_none():
    scorer = StubScorer(None, Source("spread", ("token_ids", "finish_reason")))
    scorer.sources["model"] = SimpleNamespace(name="model")  # which does not say what it reads
    with app_server(create_app(scorer)) as url:
        own = ["messages", "prompt_token_ids", "token_ids", "finish_reasons"]
        assert ask(url, "/health")[2]["takes"] == ["rows", *own]
        status, _, answer = ask(url, body=BODY)
        said = "the rewards served here need token_ids, finish_reasons"
        assert (status, answer["error"]) == (422, said)
        more = {"token_ids": [[1], [2]], "finish_reasons": ["stop", "stop"]}
        assert ask(url, body={**BODY, "token_ids": [[1], [2]]})[0] == 422
        assert ask(url, body={**BODY, **more})[::2] == (200, ANSWER)
        # torchrft's client sends them unasked.
        prompt, completion = Prompt(3, "a", (1,)), Completion(0, 0, (2,), (-1.0,), "b", "stop")
        client = RemoteRewards(Reward(remote_rm_url=[url]))
        [result] = client.score([RewardRequest(prompt, completion)])
        assert (result.score, result.metrics) == (1.0, {"length": 1.0})
        assert scorer.seen[-1][0].row == 3
        assert scorer.seen[-1][1].token_ids == (2,)


def test_only_what_is_wanted_is_sent():
    scorer = StubScorer(None, Source("spread", ("token_ids", "response")))
    with app_server(create_app(scorer, zipped=False)) as url:
        _, headers, answer = ask(url, "/health")
    assert answer["takes"] == ["rows", "token_ids"]
    assert "Accept-Encoding" not in headers
    with app_server(create_app(scorer)) as url:
        assert ask(url, "/health")[1]["Accept-Encoding"] == "gzip"


def test_sources_are_asked_by_one_thread_at_a_time():
    threads, inside, most = set(), [0], [0]

    def rule(prompt, completion):
        threads.add(threading.get_ident())
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.005)
        inside[0] -= 1
        return float(completion.text)

    with app_server(create_app(StubScorer(rule))) as url:
        client = RemoteRewards(
            Reward(remote_rm_url=[url], remote_rm_batch_size=2, remote_rm_concurrency=8)
        )
        prompts = [Prompt(row, "p", ()) for row in range(30)]
        done = [Completion(row, 0, (), (), str(row), "stop") for row in range(30)]
        results = client.score(list(map(RewardRequest, prompts, done)))
    assert [result.score for result in results] == [float(row) for row in range(30)]
    assert (len(threads), most[0]) == (1, 1)


def test_too_many_waiting_requests_are_sent_away_for_a_while(monkeypatch):
    monkeypatch.setattr(server_app, "_WAITING", 2)
    started, release = threading.Event(), threading.Event()

    def rule(prompt, completion):
        started.set()
        assert release.wait(30)
        return 1.0

    body, got = {"prompts": ["a"], "responses": ["b"]}, []
    with app_server(create_app(StubScorer(rule))) as url:
        asking = [
            threading.Thread(target=lambda: got.append(ask(url, body=body)[0])) for _ in range(2)
        ]
        for thread in asking:
            thread.start()
        assert started.wait(30)
        while "torchrft_reward_waiting 2.0" not in ask(url, "/metrics")[2]:
            time.sleep(0.01)
        status, headers, answer = ask(url, body=body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "too many requests are waiting"}
        release.set()
        for thread in asking:
            thread.join()
    assert got == [200, 200]


def test_what_nobody_waits_for_any_more_is_not_scored():
    """A client that has given up a request asks again; the first is not scored as well."""
    started, release = threading.Event(), threading.Event()
    scorer = StubScorer(lambda *_: float(started.set() or release.wait(30)))
    with app_server(create_app(scorer)) as url:
        first = threading.Thread(target=lambda: ask(url, body=BODY))
        first.start()
        assert started.wait(30)
        gone = http.client.HTTPConnection(urlsplit(url).netloc)
        gone.request("POST", "/score", json.dumps(BODY), {"Content-Type": "application/json"})
        while "torchrft_reward_waiting 2.0" not in ask(url, "/metrics")[2]:
            time.sleep(0.01)
        gone.close()
        for _ in range(2):  # the server has seen to what came before
            ask(url, "/metrics")
        release.set()
        first.join()
        while "torchrft_reward_waiting 0.0" not in ask(url, "/metrics")[2]:
            time.sleep(0.01)
    assert len(scorer.seen) == 2


def test_the_app_closes_its_sources_at_its_end():
    scorer = StubScorer()
    with app_server(create_app(scorer)) as url:
        assert ask(url, body=BODY)[0] == 200
        assert not scorer.closed
    assert scorer.closed


def test_metrics_count_requests_and_samples():
    with app_server(create_app(StubScorer())) as url:
        ask(url, body=BODY)
        ask(url, body=BODY)
        ask(url, raw=b"{")
        status, headers, text = ask(url, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    lines = text.splitlines()
    for line in (
        'torchrft_reward_requests_total{status="200"} 2.0',
        'torchrft_reward_requests_total{status="422"} 1.0',
        "torchrft_reward_samples_total 4.0",
        "torchrft_reward_seconds_count 2.0",
        "torchrft_reward_waiting 0.0",
    ):
        assert line in lines


# ------------------------------------------------------------ fuzzing


@pytest.mark.slow
def test_the_openapi_document_holds():
    """schemathesis: requests within and beyond the document; what comes back is documented."""
    app = create_app(StubScorer(), max_bytes=MIB)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    wanted = [
        checks.CHECKS.get_one(name)
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
            "negative_data_rejection",
        )
    ]
    seen = set()

    for operation in (result.ok() for result in schema.get_all_operations()):
        # The same every time: by chance, no list is fit for an answer of 200.
        @settings(
            max_examples=100,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        @given(operation.as_strategy(), st.booleans())
        def attempt(case, evens):
            if evens and isinstance(case.body, dict):  # lists of one length hardly come by chance
                lists = [value for value in case.body.values() if isinstance(value, list)]
                for value in lists:
                    del value[min(map(len, lists)) :]
                case.body.pop("images", None)
            response = case.call_and_validate(checks=wanted)
            seen.add((case.path, response.status_code))

        attempt()
    assert {("/score", 200), ("/score", 422), ("/health", 200), ("/metrics", 200)} <= seen


def test_any_bytes_leave_the_server_up(lengths):
    """As a body, as gzip, and in place of HTTP: an answer or a closed connection, no reward."""
    url, scorer = lengths
    scorer.seen.clear()
    address = urlsplit(url).hostname, urlsplit(url).port

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=500), st.sampled_from(["raw", "body", "gzip"]))
    def attempt(content, way):
        if way == "raw":
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while answer := connection.recv(65536):
                        assert answer.startswith(b"HTTP/1.1 4")
                        break
        else:
            extra = {"Content_Encoding": "gzip"} if way == "gzip" else {}
            assert ask(url, raw=content, **extra)[0] in (400, 422)

    attempt()
    assert ask(url, body=BODY)[::2] == (200, ANSWER)
    assert len(scorer.seen) == 2


# ------------------------------------------------------------ the program


@pytest.mark.parametrize(
    ("toml", "words", "said"),
    [
        (None, [], "no such file"),
        ("[reward]\n", [], "no reward: set [reward] functions"),
        ("[reward]\nfunctons = []\n", [], "functons"),
        ("[reward]\nfunctions = ['exact_mtch']\n", [], 'unknown reward function "exact_mtch"'),
        ("[reward]\nfunctions = ['exact_match']\n", ["--reward.x", "1"], "--reward.x"),
        (
            "[reward]\nfunctions = ['exact_match']\n",
            ["--token_env", "NO_SUCH"],
            'NO_SUCH": the variable is not set',
        ),
        (
            "[reward]\nfunctions = [{ name = 'exact_match', normalize = true }]\n",
            [],
            "normalize of exact_match needs the rewards of all ranks: leave it out here",
        ),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(tmp_path, capsys, toml, words, said):
    path = tmp_path / "x.toml"
    if toml is not None:
        path.write_text(toml)
    assert main(["--config", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "65536"], ["--max_request_mb", "0"]])
def test_ports_and_limits_have_a_range(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main(["--config", "x.toml", *words])
    assert "--port must be 1 to 65535, and --max_request_mb at least 1" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["--config", "x.toml"]) == 2
    said = "error: the reward server needs uvicorn: pip install 'torchrft[server]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
@pytest.mark.parametrize("partial", [True, False])
def test_a_training_config_may_be_served(tmp_path, partial, monkeypatch):
    """As it is, or only its [reward] section; flags change it; the address is the loopback."""
    text = "[reward]\nfunctions = ['exact_match']\n"
    if not partial:
        rest = "[training]\ntrain_batch_size = 8\n[rollout]\nrollout_batch_size = 2\n"
        text += f"[model]\npretrain = '{tiny_job.MODEL}'\n{rest}"
    (tmp_path / "x.toml").write_text(text)
    served = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.update(options, app=app))
    with teardown():
        assert main(["--config", str(tmp_path / "x.toml"), "--port", "5001"]) == 0
        assert (served["host"], served["port"]) == ("127.0.0.1", 5001)
        assert served.items() >= LIMITS.items()
        words = ["--host", "::1", "--functions", "exact_match,gsm8k"]
        assert main(["--config", str(tmp_path / "x.toml"), *words]) == 0
        assert served["host"] == "::1"
        with app_server(served["app"]) as url:
            body = {"prompts": ["1+1="] * 2, "responses": ["2", "#### 2"], "labels": ["2", "2"]}
            answer = ask(url, body=body)[2]
            assert ask(url, "/health")[2]["sources"] == ["exact_match", "gsm8k"]
    assert answer["extra_logs"]["exact_match"] == [1.0, 0.0]
    assert len(answer["extra_logs"]["gsm8k"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("has_policy", [True, False])
def test_a_reward_model_and_a_judge_are_served(tmp_path, has_policy, monkeypatch):
    """With the scores that they have in the trainer; by token ids, or without them by text."""
    folder = tiny_classifiers.save(tmp_path / "scalar")
    tiny.model("qwen2", seed=7).save_pretrained(tmp_path / "judging")
    tiny_classifiers.tokenizer(tmp_path / "judging")
    reward = (
        f"[reward]\nreward_pretrain = '{folder}'\n"
        f"judges = [{{ pretrain = '{tmp_path}/judging', template = '{{{{ response }}}}?' }}]\n"
        "error_reward = -3.0\n[data]\nmax_len = 64\n[training]\nbf16 = false\n"
        "[rollout]\nengine_type = 'native'\n"
    )
    policy = f"[model]\npretrain = '{tiny_job.MODEL}'\n" if has_policy else ""
    (tmp_path / "x.toml").write_text(reward + policy)
    served = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.update(app=app))
    tokenizer = load_tokenizer(tiny_job.MODEL)
    texts = [("1 3 2=", "3"), ("9 8=", "1 7"), ("5 5 5=", "")]
    ids = [[tokenizer(text).input_ids for text in pair] for pair in texts]
    with teardown():
        assert main(["--config", str(tmp_path / "x.toml")]) == 0
        with app_server(served["app"]) as url:
            client = RemoteRewards(Reward(remote_rm_url=[url], remote_rm_batch_size=2))
            asked = [
                RewardRequest(
                    Prompt(row, texts[row][0], tuple(prompt)),
                    Completion(row, 0, (*response, 1), (0.0,), texts[row][1], "stop"),
                )
                for row, (prompt, response) in enumerate(ids)
            ]
            results = client.score(asked)
            plain = {"prompts": [a for a, _ in texts], "responses": [b for _, b in texts]}
            answer = ask(url, body=plain)[2]
            given = [[0, 1], [10**6], [2]]
            ids_of_none = {"prompt_token_ids": [[1]] * 3, "token_ids": given}
            status, _, refusal = ask(url, body={**plain, **ids_of_none})
            assert status == (422 if has_policy else 200)
            if has_policy:
                assert "prompt row 1: its token ids go from 1 to 1000000, and" in refusal["error"]
    logs = [result.metrics for result in results]
    end = (1,) if has_policy else ()  # the sampled end token is in the ids only
    by_ids = tiny_classifiers.reference(folder, [[*p, *r, *end] for p, r in ids])
    assert [log["scalar"] for log in logs] == pytest.approx(by_ids, abs=1e-5)
    assert answer["extra_logs"]["scalar"] == pytest.approx(
        tiny_classifiers.reference(folder, [[*p, *r] for p, r in ids]), abs=1e-5
    )
    for result, log in zip(results, logs, strict=True):
        assert result.score == pytest.approx(log["scalar"] + log["judge"])
    assert answer["extra_logs"]["judge"] == [log["judge"] for log in logs]


@contextlib.contextmanager
def teardown():
    try:
        yield
    finally:
        distributed.teardown()


@pytest.mark.slow
def test_the_program_ends_its_sources_and_asks_for_its_token(tmp_path):
    """A rule in a worker process; SIGTERM ends the server and the worker."""
    (tmp_path / "rule.py").write_text(
        "import os, pathlib\n"
        "def rule(response):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    return 0.5\n"
    )
    (tmp_path / "x.toml").write_text(f"[reward]\nfunctions = ['{tmp_path}/rule.py:rule']\n")
    words = ["--config", str(tmp_path / "x.toml"), "--token_env", "T"]
    program = Program(tmp_path / "log", *words, T="geheim")
    try:
        program.wait()
        assert ask(program.url, body=BODY)[0] == 401
        answer = ask(program.url, body=BODY, Authorization="Bearer geheim")
        assert answer[2]["rewards"] == [0.5, 0.5]
        worker = int((tmp_path / "pid").read_text())
        assert worker != program.process.pid
        program.process.terminate()
        program.process.wait(60)
        for _ in range(500):
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{worker}/stat").read_text().split(") ")[1][0] != "Z":
                    time.sleep(0.02)
                    continue
            break
        else:
            raise AssertionError("the worker goes on")
    finally:
        program.kill()
