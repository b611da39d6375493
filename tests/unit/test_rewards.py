"""Reward functions: what they are given, what they may return, how they add up."""

import gc
from fractions import Fraction

import numpy as np
import pytest

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards import build_scorer, register
from torchrft.rewards.registry import REWARDS
from torchrft.rewards.scorer import RewardError
from torchrft.types import Completion, Prompt, Score


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(REWARDS, "_components", dict(REWARDS._components))


def prompt(row=0, label="4", **metadata):
    return Prompt(row, f"prompt {row}", (3,), label, metadata)


def completion(text="4", prompt_index=0, sample_index=0):
    return Completion(prompt_index, sample_index, (7, 1), (-0.1, -0.2), text, "stop")


def scorer(*names, **weights):
    entries = [RewardFunction(name=name) for name in names]
    return build_scorer(
        Reward(
            functions=[*entries, *(RewardFunction(name=n, weight=w) for n, w in weights.items())]
        )
    )


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("4", "4", 1.0),
        (" 4\n", "4 ", 1.0),
        ("4", 4, 1.0),
        ("4.0", 4, 0.0),
        ("44", "4", 0.0),
        ("", "4", 0.0),
        ("", "", 1.0),
        ("0", 0, 1.0),
    ],
)
def test_exact_match(response, label, expected):
    scores = scorer("exact_match").score([prompt(label=label)], [completion(response)])
    assert scores == [Score(expected, {"exact_match": expected})]


def test_exact_match_without_label_names_the_row():
    with pytest.raises(RuntimeError, match=r"'exact_match', prompt row 12: .*the row has no label"):
        scorer("exact_match").score([prompt(row=12, label=None)], [completion()])


def test_weighted_sum_and_unweighted_parts_in_the_order_of_completions():
    register("length")(lambda response: len(response))
    register("off")(lambda response: 100)
    prompts = [prompt(0, "4"), prompt(1, "56")]
    completions = [completion("56", 1, 0), completion("4", 0, 0), completion("5", 1, 1)]
    scores = scorer(exact_match=2.0, length=-0.5, off=0.0).score(prompts, completions)
    assert [score.value for score in scores] == [1.0, 1.5, -0.5]
    assert scores[0].parts == {"exact_match": 1.0, "length": 2.0, "off": 100.0}
    assert scores[2].parts == {"exact_match": 0.0, "length": 1.0, "off": 100.0}


def test_a_function_gets_exactly_what_it_names():
    seen = []

    @register("all")
    def everything(prompt, response, *, label, token_ids, metadata, finish_reason):
        seen.append((prompt, response, label, token_ids, metadata, finish_reason))
        return 0

    @register("none")
    def nothing():
        return 1

    (score,) = scorer("all", "none").score([prompt(3, ["a"], level=2)], [completion("x")])
    assert score == Score(1.0, {"all": 0.0, "none": 1.0})
    assert seen == [("prompt 3", "x", ["a"], (7, 1), {"level": 2}, "stop")]


def test_callable_objects_work():
    class Contains:
        def __init__(self, word):
            self.word = word

        def __call__(self, response):
            return self.word in response

    register("contains")(Contains("a"))
    assert scorer("contains").score([prompt()], [completion("cat")])[0].value == 1.0


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.int64(1), np.True_, Fraction(1)])
def test_numbers_of_any_kind_are_rewards(value):
    register("f")(lambda: value)
    (score,) = scorer("f").score([prompt()], [completion()])
    assert score.value == 1.0
    assert type(score.parts["f"]) is float


NO_REWARDS = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), None, "1", [1.0], 1j]


@pytest.mark.parametrize("value", [*NO_REWARDS, pytest.param(10**400, id="huge")])
def test_anything_else_names_source_row_and_value(value):
    register("f")(lambda: value)
    message = "reward function 'f', prompt row 7: a reward must be a finite number, got "
    with pytest.raises(RewardError, match=message) as caught:
        scorer("f").score([prompt(), prompt(7)], [completion(prompt_index=1)])
    assert repr(value)[:80] in str(caught.value)


def test_an_exception_in_a_function_is_chained():
    @register("broken")
    def broken(metadata):
        return metadata["level"]

    with pytest.raises(
        RewardError,
        match=r"'broken', prompt row 5: KeyError: 'level' \(.*test_rewards\.py, line \d+\)",
    ) as caught:
        scorer("broken").score([prompt(5)], [completion()])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (lambda respones: 0, "respones"),
        (lambda response, tolerance=0.1: 0, "tolerance=0.1"),
        (lambda *args: 0, r"\*args"),
        (lambda **kwargs: 0, r"\*\*kwargs"),
        (lambda response, /: 0, "response"),
    ],
)
def test_other_parameters_are_refused_when_built(function, parameter):
    register("f")(function)
    with pytest.raises(ValueError, match=f"'f' has the parameter '{parameter}'.*from prompt, resp"):
        scorer("f")


def test_functions_without_readable_parameters_are_refused():
    register("max")(max)
    with pytest.raises(ValueError, match="'max': its parameters cannot be read"):
        scorer("max")

    @register("later")
    async def later(response):
        return 0

    with pytest.raises(ValueError, match="'later' is async"):
        scorer("later")
    gc.collect()


def test_names_are_checked_when_built():
    with pytest.raises(ValueError, match=r'unknown reward function "exact_mach".*"exact_match"'):
        scorer("exact_mach")
    with pytest.raises(ValueError, match="'exact_match' is listed twice"):
        scorer("exact_match", "exact_match")
    with pytest.raises(ValueError, match=r"no reward: set \[reward\] functions"):
        scorer()
    with pytest.raises(ValueError, match='"exact_match" is registered already'):
        register("exact_match")(lambda: 0)


FILE = """
calls = []
NOT_A_FUNCTION = 3
def count(response):
    calls.append(response)
    return len(calls)
def calls_so_far():
    return len(calls)
"""


def test_functions_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    both = scorer("my_rewards.py:count", "my_rewards.py:calls_so_far")
    (score,) = both.score([prompt()], [completion("a")])
    assert score == Score(2.0, {"my_rewards.py:count": 1.0, "my_rewards.py:calls_so_far": 1.0})
    # An edited file is read again; the path may be absolute.
    (tmp_path / "my_rewards.py").write_text("def count(): return 5")
    assert scorer(f"{tmp_path}/my_rewards.py:count").score([prompt()], [completion()])[0].value == 5


def test_faults_of_files_are_found_when_built(tmp_path):
    path = tmp_path / "r.py"
    with pytest.raises(ValueError, match=r"there is no file .*r\.py"):
        scorer(f"{path}:f")
    path.write_text(FILE)
    with pytest.raises(ValueError, match=r"no function 'f'; its functions are count, calls_so_far"):
        scorer(f"{path}:f")
    with pytest.raises(ValueError, match="no function 'NOT_A_FUNCTION'"):
        scorer(f"{path}:NOT_A_FUNCTION")
    with pytest.raises(ValueError, match=r"say which function, as in .*r\.py:my_function"):
        scorer(str(path))
    for text, error in (("import nowhere_at_all", "ModuleNotFoundError"), ("def", "SyntaxError")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"r\.py failed to load: {error}: "):
            scorer(f"{path}:f")
