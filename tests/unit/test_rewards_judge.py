"""Judges: template, votes, parsers, engines and servers."""

import contextlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import tiny_classifiers
import tiny_job
import torch
from helpers import run_ranks
from reward_servers import Reply, Scripted, wait_until
from tiny_job import records, rollout, tiny_config
from tokenizers import processors

from torchrft.build.judges import build_judge
from torchrft.build.rollout import judge_engine
from torchrft.config.reward_config import Judge as Entry
from torchrft.models.loader import load_tokenizer
from torchrft.rewards.judge import EngineAnswers, Judge, JudgeTemplate
from torchrft.rewards.judge_server import ServerAnswers
from torchrft.rewards.source import RewardError, RewardRequest
from torchrft.rewards.verdicts import aggregate, parser_of
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer
from torchrft.types import Completion, Prompt

ROW = Prompt(3, "2+2=", (1,), label="4", metadata={"kind": "sum", "none": None})


def request(response, prompt=ROW):
    return RewardRequest(prompt, Completion(0, 0, (1,), (0.0,), response, "stop"))


def entry(**options):
    return Entry.model_validate({"template": "{{ prompt }}{{ response }}"} | options)


# ------------------------------------------------------------------------ template


def test_a_template_shows_the_sample(tmp_path):
    path = tmp_path / "judge.jinja"
    path.write_text("{{ prompt }} {{ response }}! {{ label }}, {{ metadata.kind }}\n{{ messages }}")
    template = JudgeTemplate(str(path), "j")
    assert template.render(ROW, "5") == "2+2= 5! 4, sum\n()"
    assert template.render(ROW, "") == "2+2= ! 4, sum\n()"  # an answer may be empty
    assert JudgeTemplate("{{ response }}", "j").render(ROW, "{{ label }}") == "{{ label }}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("lost.jinja", r"judge 'j': template = \"lost.jinja\" is no text file"),
        ("{{ prompt }}", "does not show the response"),
        ("{{ response }}{{ answer }}", "shows 'answer'; it can show prompt, response, label"),
        ("{{ response", "its template does not parse: unexpected end of template"),
        ("{{ response }}{% include 'a' %}", "does not parse: it cannot include other templates"),
    ],
)
def test_bad_templates(source, text):
    with pytest.raises(ValueError, match=text):
        JudgeTemplate(source, "j")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ label }}", "judge 'j', prompt row 9: label is empty, but its template shows it"),
        ("{{ metadata.kind }}", "prompt row 9: .* has no attribute 'kind'"),
        ("{{ metadata.none }}", "prompt row 9: a value is empty"),
        ("{{ prompt }}", "prompt row 9: prompt is empty"),
    ],
)
def test_a_row_without_what_the_template_shows(source, text):
    template = JudgeTemplate(source + "{{ response }}", "j")
    bare = Prompt(9, "", (1,), metadata={"none": None})
    full = Prompt(8, "x", (1,), label=0, metadata={"kind": "x", "none": 0})
    template.check([full])
    with pytest.raises(ValueError, match=text):
        template.check([full, bare])
    JudgeTemplate("{% if label %}{{ label }}{% endif %}{{ response }}", "j").check([bare])


# ------------------------------------------------------------------------ parsers, votes


@pytest.mark.parametrize(
    ("name", "answer", "value"),
    [
        ("last_number", "I give 7 of 10: 7.5.", 7.5),
        ("last_number", "from 1-5, a -2", -2.0),
        ("last_number", "none", None),
        ("last_number", "Score: .5", 0.5),
        ("last_number", "1,200", 1200.0),
        ("last_number", "−3e-1", -0.3),
        ("verdict", "Verdict: 0.75", 0.75),
        ("verdict", "verdict = **-1**", -1.0),
        ("last_number", "9" * 400, None),
        ("verdict", "Verdict: no. Hm, wait.\n**Verdict**: Yes", 1.0),
        ("verdict", "verdict = incorrect", 0.0),
        ("verdict", "Verdict: 0.5", 0.5),
        ("verdict", "Verdict: maybe", None),
        ("verdict", "it is correct", None),
        (r"\[\[(.*?)\]\]", "[[no]] then [[ Correct ]]", 1.0),
        (r"\[\[(.*?)\]\]", "[[3e0]]", 3.0),
        (r"\[\[(.*?)\]\]", "[[nan]]", None),
        (r"(?i)score: (\d+)", "SCORE: 8/10", 8.0),
    ],
)
def test_parsers(name, answer, value):
    assert parser_of(name)(answer) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("last_nmber", 'unknown parser of a judge "last_nmber"; did you mean "last_number"'),
        (r"score: (\d+", "is no regular expression"),
        (r"(a)(b)", r"has 2 groups; put one, \(...\)"),
        ("lost.py:f", "there is no file lost.py"),
    ],
)
def test_bad_parsers(name, text):
    with pytest.raises(ValueError, match=text):
        parser_of(name)


def test_votes():
    assert aggregate([1, 0, 1], "majority") == 1
    assert aggregate([1, 0, 0.4, 0.4, 1], "majority") == 0.7  # of those that are as frequent
    assert aggregate([1, 0, 1], "mean") == pytest.approx(2 / 3)


class Says:
    """Answers by a function of text and seed; remembers what was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, texts, seeds):
        self.asked += zip(texts, seeds, strict=True)
        return [[self.answer(t, s) for s in own] for t, own in zip(texts, seeds, strict=True)]

    def close(self):
        self.asked = None


def judge(says, seed=0, **options):
    made = entry(**options)
    return Judge(made, JudgeTemplate(made.template, "j"), says, seed)


def test_the_majority_decides_and_what_has_no_verdict_does_not_vote():
    answers = {"a": ["1", "0", "1"], "b": ["?", "0", "?"], "c": ["?", "hm", "?"]}
    says = Says(lambda text, _: next(turns[text]))
    turns = {f"2+2={key}": iter(values) for key, values in answers.items()}
    a, b, c = judge(says, votes=3).score([request(key) for key in "abc"])
    assert (a.score, a.metrics["unparsable"], a.error) == (1.0, 0.0, None)
    assert (b.score, b.metrics["unparsable"], b.error) == (0.0, pytest.approx(2 / 3), None)
    assert c.metrics["unparsable"] == 1.0
    assert c.error == "no verdict in the answer '?'"


def test_seeds_are_the_samples_own():
    """The same sample is asked once, and alike in any batch; votes, samples and jobs differ."""
    options = {"votes": 2, "aggregate": "mean"}
    says, alone, other = (Says(lambda text, seed: str(seed % 1000)) for _ in range(3))
    found = judge(says, **options).score([request(x) for x in "abca"])
    assert [text for text, _ in says.asked] == ["2+2=a", "2+2=b", "2+2=c"]
    assert found[0].score == found[3].score
    assert judge(alone, **options).score([request("c")])[0] == found[2]
    judge(other, seed=1, **options).score([request("c")])
    everything = [seed for _, seeds in says.asked + other.asked for seed in seeds]
    assert len(set(everything)) == 8
    assert judge(says).score([]) == []


def test_a_regular_expression_that_explodes_has_a_deadline(monkeypatch):
    """Its answer has no verdict, which names the parser; the next one is judged as ever."""
    monkeypatch.setattr("torchrft.rewards.verdicts.PARSE_SECONDS", 0.5)
    own = judge(Says(lambda text, _: text.removeprefix("2+2=")), parser="((?:a|a)*)b$")
    with contextlib.closing(own):
        stuck, fine = own.score([request("a" * 60), request("ab")])
    assert stuck.error is not None
    assert "found no end: it took more than 0.5 s" in stuck.error
    assert stuck.metrics["unparsable"] == 1.0
    assert fine.error == "no verdict in the answer 'ab'"


def test_a_parser_of_the_users(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def stars(answer):\n"
        "    if answer == 'boom': raise KeyError('x')\n"
        "    if answer == 'nan': return float('nan')\n"
        "    return answer.count('*') or None\n"
    )
    own = judge(Says(lambda text, _: text.removeprefix("2+2=")), parser=f"{path}:stars")
    stars, none = own.score([request("***"), request("-")])
    assert (stars.score, none.error) == (3.0, "no verdict in the answer '-'")
    with pytest.raises(RewardError, match=r"'judge', prompt row 3: parser = .* raised KeyError"):
        own.score([request("boom")])
    with pytest.raises(RewardError, match="must give a finite number or None, got nan"):
        own.score([request("nan")])
    with pytest.raises(RewardError, match="row 4: label is empty"):
        judge(Says(str), template="{{ label }}{{ response }}").score(
            [request("x", Prompt(4, "", (1,)))]
        )


# ------------------------------------------------------------------------ engines


def judge_folder(folder, **options):
    tiny.model("qwen2", seed=7, **options).save_pretrained(folder)
    tiny_classifiers.tokenizer(folder)
    return str(folder)


def build(made, **options):
    config = tiny_config(**options)
    engine = partial(judge_engine, config=config, dtype=torch.float32, device=torch.device("cpu"))
    return build_judge(made, config, engine)


def test_the_native_engine_answers_as_transformers_does(tmp_path):
    folder = judge_folder(tmp_path)
    made = build(entry(pretrain=folder, max_new_tokens=6))
    tokenizer, model = load_tokenizer(folder), tiny.model("qwen2", "eager", seed=7)
    texts = ["2+2=5", "1"]
    expected = []
    for text in texts:
        ids = tokenizer(f"<|user|>{text}\n<|assistant|>", return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=1)
        expected.append([tokenizer.decode(out[0, ids.shape[1] :]).removesuffix("<eos>")])
    assert made.answers(texts, [[1], [2]]) == expected
    assert expected[0] != expected[1]
    # Votes differ by their seeds alone.
    sampled = build(entry(pretrain=folder, max_new_tokens=6, votes=3, temperature=1.0))
    one, two = (
        sampled.answers(texts, [[1, 2, 3], [4, 5, 1]]),
        sampled.answers(texts[:1], [[1, 2, 3]]),
    )
    assert one[0] == two[0]
    assert len(set(one[0])) == 3


def test_a_chat_template_that_raises_is_a_sentence(tmp_path):
    folder = judge_folder(tmp_path)
    made = build(entry(pretrain=folder, max_new_tokens=6))
    made.answers.tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    fails = "source 'judge': the judge's prompt: the chat template refuses it: TypeError: can"
    with pytest.raises(RewardError, match=fails):
        made.score([request("1")])


def test_a_judges_text_gets_no_second_bos(tmp_path):
    folder = judge_folder(tmp_path)
    made = build(entry(pretrain=folder, max_new_tokens=6))
    tokenizer = made.answers.tokenizer
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <eos>", special_tokens=[("<|user|>", 4), ("<eos>", 1)]
    )
    for text in ("<|user|>12", "12"):
        assert made.answers._prompt(0, text).token_ids == (4, 9, 10)


def test_a_template_that_is_too_long_has_no_verdict(tmp_path):
    folder = judge_folder(tmp_path)
    made = build(entry(pretrain=folder, max_new_tokens=4, max_len=14))
    assert isinstance(made.answers, EngineAnswers)
    fits, too_long = made.score([request("5"), request("55555")])  # 4 tokens of the chat's own
    assert fits.metrics["too_long"] == 0.0
    assert too_long.metrics == {"unparsable": 0.0, "too_long": 1.0}
    assert "longer than the judge reads" in too_long.error


def test_judges_that_cannot_be_built(tmp_path):
    folder = judge_folder(tmp_path)
    for options, text in (
        ({}, "judge 'judge': engine = \"native\" needs pretrain"),
        ({"engine": "remote"}, 'engine = "remote" needs server_url and model'),
        ({"votes": 3}, "votes = 3 at temperature = 0 would all be equal"),
        ({"max_new_tokens": 512}, "max_new_tokens = 512 leaves no room for a prompt within 512"),
        ({"parser": "nothing"}, 'unknown parser of a judge "nothing"'),
        ({"template": "lost"}, r"judge 'judge': template = \"lost\" is no text file"),
        ({"pretrain": str(tmp_path / "lost")}, 'lost" is no folder here: correct'),
    ):
        given = options if "engine" in options or not options else {"pretrain": folder} | options
        with pytest.raises(ValueError, match=text):
            build(entry(**given))


# ------------------------------------------------------------------------ servers


class Server:
    """An OpenAI-compatible server of the model "m"; `faults` are (status, body) that come first."""

    def __init__(self):
        self.faults, self.asked, self.listed = [], [], b'{"data": [{"id": "m"}]}'
        self.authorized = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.authorized.append(self.headers["Authorization"])
                self.reply(200 if self.path == "/v1/models" else 404, outer.listed)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                outer.asked.append(body)
                if outer.faults:
                    self.reply(*outer.faults.pop(0))
                    return
                said = f"{body['messages'][0]['content']} {body['seed'] % 7}"
                choices = [{"message": {"content": said}}]
                self.reply(200, json.dumps({"choices": choices}).encode())

            def reply(self, status, content):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    with contextlib.closing(Server()) as made:
        yield made


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("torchrft.tools.http.FIRST_WAIT", 0.001)


def remote(*urls, **options):
    return entry(engine="remote", server_url=list(urls), model="m", **options)


def test_a_server_is_asked_once_for_each_vote(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    made = remote(f"{server.url}/v1", token_env="JUDGE_TOKEN", temperature=0.5, max_new_tokens=9)
    answers = ServerAnswers(made)
    assert server.authorized == ["Bearer secret"]
    assert answers(["a", "b"], [[1, 2], [3, 9]]) == [["a 1", "a 2"], ["b 3", "b 2"]]
    [first] = [body for body in server.asked if body["seed"] == 9]
    messages = [{"role": "user", "content": "b"}]
    assert first == {
        "model": "m", "messages": messages, "temperature": 0.5, "max_tokens": 9, "seed": 9
    }  # fmt: skip
    assert answers([], []) == []


def test_a_judge_that_fails_does_not_wait_for_other_answers():
    def answer(body):
        said = body["messages"][0]["content"]
        return Reply({"error": "no"}, 403) if said == "b" else Reply(hang=60)

    health = Reply({"data": [{"id": "m"}]})
    with Scripted(answer, health=health) as slow:
        answers = ServerAnswers(remote(slow.url))
        with pytest.raises(RewardError, match="refuses the text: HTTP 403: no"):
            answers(["a", "b", "c"], [[1], [1], [1]])
        wait_until(lambda: answers.group.servers[0].outstanding == 0)
        assert not slow.released.is_set()


def test_passing_faults_are_tried_again(server):
    answers = ServerAnswers(remote(server.url))
    server.faults = [(500, b"{}"), (429, b"{}"), (503, b"busy")]
    assert answers(["a"], [[1]]) == [["a 1"]]
    assert len(server.asked) == 4


def test_the_next_server_takes_over(server):
    gone = Server()
    answers = ServerAnswers(remote(gone.url, server.url))
    gone.close()
    found = answers([str(i) for i in range(6)], [[i] for i in range(6)])
    assert found == [[f"{i} {i}"] for i in range(6)]


def test_faults_that_stay(server, monkeypatch):
    answers = ServerAnswers(remote(server.url, timeout=50.0))
    server.faults = [(400, b'{"error": {"message": "no such parameter: seed"}}')]
    with pytest.raises(RewardError, match="refuses the text: HTTP 400: no such parameter: seed"):
        answers(["a"], [[1]])
    for content in (
        b"<html>",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 3}}]}',
    ):
        server.faults = [(200, content)]
        with pytest.raises(RewardError, match="the answer is no chat completion"):
            answers(["a"], [[1]])
    server.faults = [(200, b'{"choices": [{"message": {"content": null}}]}')]
    assert answers(["a"], [[1]]) == [[""]]  # reasoning took all tokens: no verdict
    # A wait that the time does not allow is not begun.
    monkeypatch.setattr("torchrft.tools.http.FIRST_WAIT", 100.0)
    answers.group.longest_rest = 100.0
    server.faults = [(500, b"down")]
    with pytest.raises(
        RewardError, match=r"no answer within timeout = 50 seconds \(http.*: HTTP 500: down\)"
    ):
        answers(["a"], [[1]])
    server.close()
    with pytest.raises(RewardError, match=r"'judge': the text found no answer within .*http:"):
        answers(["a"], [[1]])


@pytest.mark.parametrize(
    "words",
    ["This model's maximum context length is 8 tokens", "longer than the model's context length"],
)
def test_what_a_server_finds_too_long(server, words):
    answers = ServerAnswers(remote(server.url, concurrency=1))
    server.faults = [(400, json.dumps({"error": {"message": words}}).encode())]
    assert answers(["a", "b"], [[1, 2], [3, 4]]) == [None, ["b 3", "b 4"]]


def test_servers_that_are_refused_at_the_start(server):
    with pytest.raises(ValueError, match='does not serve model = "other"; it serves m'):
        ServerAnswers(remote(server.url).model_copy(update={"model": "other"}))
    server.listed = b"[]"
    with pytest.raises(ValueError, match="answers /v1/models in another form"):
        ServerAnswers(remote(server.url))
    with pytest.raises(ValueError, match=r"token_env = \"UNSET_TOKEN\": the variable is not set"):
        ServerAnswers(remote(server.url, token_env="UNSET_TOKEN"))
    server.close()
    with pytest.raises(ValueError, match=rf"{server.url} does not say what it serves: .*refused"):
        ServerAnswers(remote(server.url))
    with pytest.raises(ValueError, match="server_url holds"):
        ServerAnswers(remote("ftp://x"))


# ------------------------------------------------------------------------ the job


def judges(folder, **options):
    given = {
        "pretrain": str(folder),
        "template": "{{ prompt }}{{ response }}?",
        "votes": 3,
        "temperature": 1.0,
        "max_new_tokens": 4,
        "aggregate": "mean",
        **options,
    }
    # JSON's strings and numbers are TOML's, too.
    return "[{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in given.items()) + "}]"


def train(rank, folder, world_size, options):
    torch.set_num_threads(1)
    world = World(rank, world_size, rank, torch.device("cpu"))
    job = Trainer(tiny_config(world_size, save_path=folder, **options), world)
    assert job.train() is None


@pytest.mark.slow
def test_the_job_trains_with_a_judge(tmp_path):
    """In the native engine, on one rank, on two and resumed: the same rewards to the last digit."""
    folder = judge_folder(tmp_path / "judge")
    options = {
        "judges": judges(folder),
        "functions": None,
        "error_reward": -1.0,
        "actor_learning_rate": 1e-4,
        "lr_warmup_ratio": 0.0,
    }
    with tiny_job.trainer(tmp_path / "one", **options) as job:
        before = tiny_job.weights(job)
        assert job.train() is None
        after = tiny_job.weights(job)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    run_ranks(train, 2, str(tmp_path / "two"), 2, options)
    for step in (1, 2):
        one, two = (rollout(tmp_path / name, step) for name in ("one", "two"))
        for name in ("response", "reward", "reward_parts"):
            assert [row[name] for row in one] == [row[name] for row in two]
    tiny_job.run(tmp_path / "half", **options, max_steps=1)
    tiny_job.run(tmp_path / "half", **options, load_checkpoint=True)
    assert rollout(tmp_path / "half", 2) == rollout(tmp_path / "one", 2)
    line = records(tmp_path / "one")[0]
    rows = rollout(tmp_path / "one", 1)
    values = [row["reward"] for row in rows]
    assert line["reward_parts/judge"] == pytest.approx(sum(values) / 16)
    assert 0 < line["reward/judge/unparsable"] < 1
    assert line.get("reward/judge/errors", 0) == values.count(-1.0)
    assert len(set(values)) > 3
    # A sample's reward is what the judge says of it alone.
    made = build(job.config.reward.judges[0])
    again = made.score([request(rows[5]["response"], Prompt(0, rows[5]["prompt"], (1,)))])[0]
    assert rows[5]["reward"] == (-1.0 if again.error else again.score)


def test_a_row_that_the_judge_cannot_read_ends_the_job_at_the_start(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "12=", "label": "2"}\n{"prompt": "34="}\n')
    folder = judge_folder(tmp_path / "judge")
    options = {
        "judges": judges(folder, template="{{ response }}{{ label }}"),
        "functions": None,
        "prompt_data": str(data),
    }
    with (
        pytest.raises(ValueError, match="judge 'judge', prompt row 1: label is empty"),
        tiny_job.trainer(tmp_path / "run", **options),
    ):
        pass
    assert not Path(tmp_path, "run").exists()
