"""The rules that come with torchrft: what they say of which answers."""

import sys

import pytest
from answers import ANSWERS, HOSTILE

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards import RewardError, build_scorer
from torchrft.types import Completion, Prompt


def judge(rule, samples, timeout=60.0, **options):
    """Scores of (label, response) pairs."""
    functions = [RewardFunction(name=rule, options=options)]
    workers = {"reward_timeout": timeout, "reward_workers": 2}
    scorer = build_scorer(Reward(functions=functions, allow_unsafe_code=True, **workers))
    prompts = [Prompt(row, "", (1,), label) for row, (label, _) in enumerate(samples)]
    completions = [
        Completion(row, 0, (1,) * len(response[:50]), (0.0,), response, "stop")
        for row, (_, response) in enumerate(samples)
    ]
    try:
        return scorer.score(prompts, completions)
    finally:
        scorer.close()


def value(rule, label, response, **options):
    (score,) = judge(rule, [(label, response)], **options)
    return score.value


def test_the_table_is_as_large_as_it_should_be():
    assert len(ANSWERS) >= 120
    assert len({(rule, str(label), response) for rule, label, response, _ in ANSWERS}) == len(
        ANSWERS
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["numeric", "gsm8k", "math"])
def test_the_table_of_answers(rule):
    rows = [answer for answer in ANSWERS if answer[0] == rule and answer[3] is not None]
    scores = judge(rule, [(label, response) for _, label, response, _ in rows])
    wrong = [
        (label, response[:60], score)
        for (_, label, response, verdict), score in zip(rows, scores, strict=True)
        if score.value != verdict or score.metrics
    ]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gsm8k", "math"])
def test_hostile_answers_end(rule):
    """Each within its deadline, if need be by the end of its worker; the answers behind count."""
    rows = [(label, response) for name, label, response, _ in HOSTILE if name == rule]
    scores = judge(rule, [*rows, ("7", "\\boxed{7}")], timeout=1.0)
    assert [score.value for score in scores[:-1]] == [0.0] * len(rows)
    assert any(score.metrics == {f"{rule}/errors": 1.0} for score in scores)  # 10^10^10 is one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "label", "text"),
    [
        ("numeric", None, "the row has no label"),
        ("numeric", "seven", "the label 'seven' is no number"),
        ("math", None, "the row has no label"),
        ("math", "", "the label '' holds no answer"),
        ("multiple_choice", "F", "the label 'F' is none of the choices ABCDE"),
        ("multiple_choice", 5, "the label 5 is none of the choices"),
        ("code", [], r"the label \[\] is no test"),
    ],
)
def test_a_label_that_nothing_can_be_judged_by_stops_the_run(rule, label, text):
    usable = {"code": "assert f() == 1", "multiple_choice": "A"}.get(rule, "1")
    with pytest.raises(RewardError, match=f"'{rule}', prompt row 1: {text}"):
        judge(rule, [(usable, "1"), (label, "1")])


def test_numeric_tolerance_is_relative():
    assert value("numeric", 200, "201", tolerance=0.005) == 1.0
    assert value("numeric", 200, "202", tolerance=0.005) == 0.0


def test_regex():
    assert value("regex", None, "so it is \\boxed{4}", pattern=r"boxed\{\d\}") == 1.0
    assert value("regex", None, "boxed{4} it is", pattern=r"boxed\{\d\}", full=True) == 0.0
    (score,) = judge("regex", [(None, "a" * 60 + "b")], timeout=0.5, pattern="(a+)+$")
    assert score.metrics == {"regex/errors": 1.0}  # exponential backtracking ends with its worker
    with pytest.raises(ValueError, match=r"'regex': option pattern = '\(': missing \)"):
        judge("regex", [], pattern="(")


FORMATS = [
    ("<think>a</think><answer>4</answer>", 1.0),
    (" <think>a</think>\n\n<answer>4</answer>\n", 1.0),
    ("<think></think><answer></answer>", 1.0),
    ("<answer>4</answer><think>a</think>", 0.0),
    ("<think>a</think>so <answer>4</answer>", 0.0),
    ("<think>a</think><answer>4</answer> done", 0.0),
    ("<think>a<answer>4</answer></think>", 0.0),
    ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
    ("<think>a</think>", 0.0),
    ("</think><think><answer>4</answer>", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("response", "expected"), FORMATS)
def test_format(response, expected):
    assert value("format", None, response) == expected


def test_format_looks_at_the_response_only():
    """Not at tags of the prompt, however it ends."""
    scorer = build_scorer(Reward(functions=[RewardFunction(name="format")]))
    prompt = Prompt(0, "Write <think>a</think><answer>4</answer>. <think>", (1,))
    said = Completion(0, 0, (1,), (0.0,), "a</think><answer>4</answer>", "stop")
    assert scorer.score([prompt], [said])[0].value == 0.0
    assert value("format", None, said.text, opened=True) == 1.0
    assert value("format", None, "<a>1</a>", tags=["a"]) == 1.0
    with pytest.raises(ValueError, match="'format': option tags = "):
        judge("format", [], tags=["a", "a"])


def test_length():
    values = [value("length", None, "a" * n, target=10, limit=20) for n in (0, 10, 15, 20, 30)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="options target = 5, limit = 5"):
        judge("length", [], target=5, limit=5)


CHOICES = [
    ("The answer is C.", "C", 1.0),
    ("The answer is (C)", "C", 1.0),
    ("Answer: **C**", "c", 1.0),
    ("\\boxed{C}", "(C)", 1.0),
    ("\\boxed{\\text{C}}", 2, 1.0),
    ("It is not (A), but (C)", "C", 1.0),
    ("C", "C", 1.0),
    ("Long story.\n**C**", "C", 1.0),
    ("Answer: B. Wait, the answer is C", "C", 1.0),
    ("The answer is (A), said he; \\boxed{C}", "C", 1.0),
    ("The answer is B", "C", 0.0),
    ("A Car is not a choice", "A", 0.0),
    ("I'd say Cats", "C", 0.0),
    ("The answer is C", 0, 0.0),
    ("answer" * 100_000, "C", 0.0),
    ("", "C", 0.0),
]


@pytest.mark.parametrize(("response", "label", "expected"), CHOICES)
def test_multiple_choice(response, label, expected):
    assert value("multiple_choice", label, response) == expected


def test_multiple_choice_letters():
    assert value("multiple_choice", "F", "(F)", choices="FGHJ") == 1.0
    assert value("multiple_choice", 1, "(A) is out, so (G)", choices="FGHJ") == 1.0


# ------------------------------------------------------------------------------- code

TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
RIGHT = "Like so:\n```python\ndef add(a, b):\n    return a + b\n```"


def code(body):
    return f"```python\n{body}\n```"


def test_the_code_rule():
    scores = judge("code", [(TESTS, RIGHT), ("\n".join(TESTS), RIGHT), (TESTS, "no code at all")])
    assert [score.value for score in scores] == [1.0, 1.0, 0.0]
    half = code("def add(a, b):\n    return 3")
    assert value("code", TESTS, half) == 0.0
    assert value("code", TESTS, half, partial=True) == 0.5
    assert value("code", TESTS, RIGHT.replace("+", "-") + RIGHT) == 1.0  # the last block


def test_what_math_needs_is_asked_for_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"'math': it needs math-verify: pip install .*\[math\]"):
        judge("math", [])
