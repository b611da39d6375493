"""Reward functions: what they are given, what they may return, how they add up."""

import math
import tomllib
from fractions import Fraction

import numpy as np
import pytest
import tiny_job

from torchrft.config.manager import check_only
from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.metrics.rollout_stats import rollout_metrics
from torchrft.rewards import RewardError, RewardResult, build_scorer, register
from torchrft.rewards.registry import REWARDS
from torchrft.rewards.scorer import Scorer, Weighted
from torchrft.rewards.source import SampleError
from torchrft.rewards.verify import reward_faults
from torchrft.types import Completion, Prompt, Sample, Score


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(REWARDS, "_components", dict(REWARDS._components))


def prompt(row=0, label="4", **metadata):
    return Prompt(row, f"prompt {row}", (3,), label, metadata)


def completion(text="4", prompt_index=0, sample_index=0):
    return Completion(prompt_index, sample_index, (7, 1), (-0.1, -0.2), text, "stop")


def scorer(*names, isolate=True, **weights):
    entries = [RewardFunction(name=name, isolate=isolate) for name in names]
    entries += [RewardFunction(name=name, weight=weight) for name, weight in weights.items()]
    return build_scorer(Reward(functions=entries, allow_unsafe_code=True))


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
    register("longer")(lambda response: len(response))
    register("off")(lambda response: 100)
    prompts = [prompt(0, "4"), prompt(1, "56")]
    completions = [completion("56", 1, 0), completion("4", 0, 0), completion("5", 1, 1)]
    scores = scorer(exact_match=2.0, longer=-0.5, off=0.0).score(prompts, completions)
    assert [score.value for score in scores] == [1.0, 1.5, -0.5]
    assert scores[0].parts == {"exact_match": 1.0, "longer": 2.0, "off": 100.0}
    assert scores[2].parts == {"exact_match": 0.0, "longer": 1.0, "off": 100.0}


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


def test_names_are_checked_when_built():
    with pytest.raises(ValueError, match=r'unknown reward function "exact_mach".*"exact_match"'):
        scorer("exact_mach")
    with pytest.raises(ValueError, match='two sources named "exact_match"'):
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
    both = scorer("my_rewards.py:count", "my_rewards.py:calls_so_far", isolate=False)
    (score,) = both.score([prompt()], [completion("a")])
    assert score == Score(2.0, {"my_rewards.py:count": 1.0, "my_rewards.py:calls_so_far": 1.0})
    # An edited file is read again; the path may be absolute.
    (tmp_path / "my_rewards.py").write_text("def count(): return 5")
    other = scorer(f"{tmp_path}/my_rewards.py:count")
    assert other.score([prompt()], [completion()])[0].value == 5
    other.close()


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


# ------------------------------------------------------------------------------- options, batches


def test_options_are_keyword_only_parameters():
    @register("power")
    def power(response, *, base: int = 2, exponent: float, names: list[str] = ()):
        return base**exponent + len(names)

    def value(**options):
        entry = RewardFunction(name="power", options=options, alias="own name")
        (score,) = build_scorer(Reward(functions=[entry])).score([prompt()], [completion()])
        assert list(score.parts) == ["own name"]
        return score.value

    assert value(exponent=3) == 8.0
    assert value(exponent=0.5, base=4, names=["a", "b"]) == 4.0
    for options, text in (
        ({}, "'power' needs its option 'exponent'"),
        ({"exponent": "3"}, "option exponent = '3': input should be a valid number"),
        ({"exponent": 3, "base": 2.5}, "option base = 2.5: input should be a valid integer"),
        ({"exponent": 3, "names": ["a", 3]}, "Reward"),
        ({"exponent": 3, "bases": 2}, "no option 'bases'; valid: base, exponent, names"),
    ):
        with pytest.raises(ValueError, match=text):
            value(**options)


def test_a_batch_function_gets_lists():
    seen = []

    @register("batch")
    def batch(responses, labels, prompts, finish_reasons, token_ids, metadata, images):
        seen.append([responses, labels, prompts, finish_reasons, token_ids, metadata, images])
        return np.arange(len(responses))

    prompts = [prompt(0, "4", level=1), prompt(1, None)]
    completions = [completion("a", 1), completion("b", 0), completion("c", 1)]
    scores = scorer("batch").score(prompts, completions)
    assert [score.value for score in scores] == [0.0, 1.0, 2.0]
    ((responses, labels, texts, reasons, token_ids, metadata, images),) = seen
    assert responses == ["a", "b", "c"]
    assert labels == [None, "4", None]
    assert texts == ["prompt 1", "prompt 0", "prompt 1"]
    assert (reasons, token_ids) == (["stop"] * 3, [(7, 1)] * 3)
    assert (metadata, images) == ([{}, {"level": 1}, {}], [()] * 3)


def test_singular_and_plural_names_do_not_mix():
    register("f")(lambda responses, label: [0])
    with pytest.raises(ValueError, match=r"one sample \(label\) and for many"):
        scorer("f")


def test_async_functions_in_this_process():
    @register("later")
    async def later(response):
        return len(response)

    (score,) = scorer("later").score([prompt()], [completion("abc")])
    assert score.value == 3.0


def test_a_typed_result():
    register("f")(lambda: RewardResult(1, parts={"a": 2}, metrics={"b": np.float32(0.5)}))
    (score,) = scorer(f=3.0).score([prompt()], [completion()])
    assert score == Score(3.0, {"f": 1.0, "f/a": 2.0}, {"f/b": 0.5})
    assert type(score.metrics["f/b"]) is float
    register("g")(lambda: RewardResult(1, parts={"a": math.inf}))
    with pytest.raises(
        RewardError, match="'g', prompt row 0: a reward must be a finite number, got inf"
    ):
        scorer("g").score([prompt()], [completion()])


def test_isolation_is_for_functions_of_a_file():
    with pytest.raises(ValueError, match="isolate = false is for functions of a file"):
        scorer("exact_match", isolate=False)


# ------------------------------------------------------------------------------- mixing


class Fixed:
    """A source with given results."""

    def __init__(self, name, *results, collective=False):
        self.name, self.results, self.collective = name, results, collective
        self.asked = []

    def score(self, requests):
        self.asked.append([request.prompt.row for request in requests])
        return [RewardResult(r) if isinstance(r, float) else r for r in self.results]

    def close(self):
        self.asked.append("closed")


def mixed(sources, prompts=None, **reward):
    """The scores of one completion for each prompt."""
    prompts = prompts or [prompt(0), prompt(1)]
    completions = [completion(prompt_index=index) for index in range(len(prompts))]
    return Scorer([Weighted(*source) for source in sources], Reward(**reward)).score(
        prompts, completions
    )


def test_an_error_becomes_error_reward_and_is_counted(caplog):
    source = Fixed("judge", RewardResult(9.0, {"a": 1.0}, error="unreadable"), 2.0)
    first, second = mixed([(source, 2.0)], error_reward=-0.5)
    assert first == Score(-1.0, {"judge": -0.5, "judge/a": 1.0}, {"judge/errors": 1.0})
    assert second == Score(4.0, {"judge": 2.0})
    assert "reward 'judge': no verdict on 1 of 2 samples" in caplog.text
    samples = [Sample(prompt(), completion(), score, 0) for score in (first, second, first)]
    metrics = rollout_metrics(samples)
    assert metrics["reward/judge/errors"] == 2
    assert metrics["reward_parts/judge"] == pytest.approx(1 / 3)
    assert metrics["reward_parts/judge/a"] == 1.0


@pytest.mark.parametrize(("share", "calls"), [(0.5, 33), (0.0, 1), (1.0, None)])
def test_a_source_without_verdicts_ends_the_run(share, calls):
    """Counted over its last 64 samples, so that it does not matter how few a call has."""
    source = Fixed("judge", RewardResult(0.0, error="unreadable"))
    scorer = Scorer([Weighted(source)], Reward(max_reward_failures=share))
    for _ in range(79 if calls is None else calls - 1):
        scorer.score([prompt()], [completion()])
    if calls is not None:
        with pytest.raises(RewardError) as caught:
            scorer.score([prompt()], [completion()])
        assert str(caught.value) == (
            f"reward 'judge': no verdict on {calls} of the last {calls} samples, the last prompt "
            f"row 0: unreadable; mend it, or raise max_reward_failures = {share:g}"
        )


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([1.0], "reward 'own' gave 1 rewards for 2 samples, the first of prompt row 0"),
        ([1.0, math.nan], "reward 'own', prompt row 1: a reward must be a finite number, got nan"),
        (
            [RewardResult(None), 1.0],
            "'own', prompt row 0: a reward must be a finite number, got None",
        ),
        ([1.0, RewardResult(1.0, metrics={"a": math.inf})], "prompt row 1: .* got inf"),
    ],
)
def test_bad_results_of_any_source_name_source_and_row(results, text, collective):
    with pytest.raises(RewardError, match=text):
        mixed([(Fixed("own", *results, collective=collective),)])


def test_recipes_choose_the_sources_of_a_row():
    prompts = [prompt(0, kind="maths"), prompt(1, kind="code"), prompt(2, kind="maths")]
    one, two, both = Fixed("one", 1.0, 3.0), Fixed("two", 5.0), Fixed("both", 0.5, 0.25, 0.125)
    recipes = {"maths": ["one", "both"], "code": ["both", "two"]}
    sources = [(one, 1.0), (two, 10.0), (both, 2.0)]
    scores = mixed(sources, prompts, source_key="kind", recipes=recipes)
    assert [score.value for score in scores] == [2.0, 50.5, 3.25]
    assert [list(score.parts) for score in scores] == [
        ["one", "both"],
        ["two", "both"],
        ["one", "both"],
    ]
    assert (one.asked, two.asked, both.asked) == ([[0, 2]], [[1]], [[0, 1, 2]])
    samples = [Sample(p, completion(), score, 0) for p, score in zip(prompts, scores, strict=True)]
    assert rollout_metrics(samples)["reward_parts/one"] == 2.0
    assert rollout_metrics(samples)["reward_parts/two"] == 5.0


def test_sources_without_a_request_are_called_if_they_are_collective():
    prompts = [prompt(0, kind="a")]
    alone, together = Fixed("alone"), Fixed("together", collective=True)
    recipes = {"a": ["rest"], "b": ["alone", "together"]}
    sources = [(alone,), (together,), (Fixed("rest", 1.0),)]
    mixed(sources, prompts, source_key="kind", recipes=recipes)
    assert (alone.asked, together.asked) == ([], [[]])


@pytest.mark.parametrize("kind", ["poems", None, 3, {}])
def test_a_data_source_without_a_recipe_names_the_row(kind):
    with pytest.raises(
        RewardError, match=f"prompt row 7: kind = {kind!r} has no recipe; .* has maths"
    ):
        mixed(
            [(Fixed("one", 1.0),)],
            [prompt(7, kind=kind)],
            source_key="kind",
            recipes={"maths": ["one"]},
        )


def test_the_gate_is_all_or_nothing():
    sources = [
        (Fixed("format", 1.0, 0.0, 1.0, -1.0), 0.5),
        (Fixed("right", 1.0, 1.0, 0.0, 1.0), 1.0),
    ]
    prompts = [prompt(row) for row in range(4)]
    scores = mixed(sources, prompts, gate=["format"])
    assert [score.value for score in scores] == [1.5, 0.0, 0.5, 0.0]
    assert scores[1].parts == {"format": 0.0, "right": 1.0}
    scores = mixed(sources, prompts, gate=["format", "right"], gate_reward=-2.0)
    assert [score.value for score in scores] == [1.5, -2.0, -2.0, -2.0]


def test_names_are_there_and_unique():
    with pytest.raises(ValueError, match='two sources named "a"'):
        mixed([(Fixed("a", 1.0),), (Fixed("a", 1.0),)])
    for reward in ({"gate": ["b"]}, {"source_key": "k", "recipes": {"x": ["a", "b"]}}):
        with pytest.raises(
            ValueError, match='names "b", which is no reward of this job; there are a'
        ):
            mixed([(Fixed("a", 1.0),)], **reward)


def test_normalized_sources_enter_the_sum_by_their_z_scores():
    one, two = Fixed("one", 1.0, 3.0), Fixed("two", 10.0, 20.0)
    scorer = Scorer([Weighted(one, 2.0, normalize=True), Weighted(two, 1.0)])
    prompts, completions = [prompt(0), prompt(1)], [completion(prompt_index=i) for i in range(2)]
    first = scorer.normalized(scorer.score(prompts, completions))
    deviation = math.sqrt(2)  # of 1 and 3, unbiased
    assert [score.value for score in first] == pytest.approx(
        [10 - 2 / deviation, 20 + 2 / deviation], abs=1e-5
    )
    assert [score.parts["one"] for score in first] == [1.0, 3.0]
    saved = scorer.state_dict()
    one.results = (5.0, 7.0)
    second = [score.value for score in scorer.normalized(scorer.score(prompts, completions))]
    deviation = math.sqrt(20 / 3)  # of 1, 3, 5 and 7, whose mean is 4
    assert second == pytest.approx([10 + 2 / deviation, 20 + 6 / deviation], abs=1e-5)
    other = Scorer([Weighted(one, 2.0, normalize=True), Weighted(two, 1.0)])
    other.load_state_dict(saved)
    again = other.normalized(other.score(prompts, completions))
    assert [score.value for score in again] == second


def test_closing_closes_all_sources():
    one, two = Fixed("one"), Fixed("two")
    Scorer([Weighted(one), Weighted(two)]).close()
    assert one.asked == two.asked == ["closed"]


def test_a_part_called_like_another_source_does_not_enter_the_sum():
    register("p")(lambda: RewardResult(1.0, parts={"b": 9.0}))
    entries = [
        RewardFunction(name="exact_match", alias="p/b"),
        RewardFunction(name="p"),
    ]
    (score,) = build_scorer(Reward(functions=entries)).score([prompt()], [completion("wrong")])
    assert score.value == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(1.0), "rewards are expected in a list"),
        (RewardResult(1.0, parts=[("a", 1.0)]), "parts must be a dictionary"),
        (RewardResult(1.0, metrics=None), "metrics must be a dictionary"),
    ],
    ids=str,
)
def test_odd_results_are_bugs_with_a_sentence(value, message):
    is_batch = isinstance(value, np.ndarray)
    register("f")((lambda responses: value) if is_batch else (lambda: value))
    with pytest.raises(RewardError, match=message):
        scorer("f").score([prompt()], [completion()])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("code", {"seconds": seconds}) for seconds in (0.0, -1.0, 1e308)),
        *(("numeric", {"tolerance": tolerance}) for tolerance in (-1.0, 1.01)),
        *(("length", {"target": 1, "limit": limit}) for limit in (1, 10**9 + 1, 10**400)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_would_reward_nothing_are_refused(name, options):
    with pytest.raises(ValueError, match=f"option.* {list(options)[-1]} = .*: (use|0 <= target)"):
        build_scorer(Reward(functions=[RewardFunction(name=name, options=options)]))


def test_choices_may_be_small_letters():
    entry = RewardFunction(name="multiple_choice", options={"choices": "abcd"})
    (score,) = build_scorer(Reward(functions=[entry])).score(
        [prompt(label="c")], [completion("(C)")]
    )
    assert score.value == 1.0


def test_a_file_that_exits_at_its_import_is_named(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("import sys\ndef f(response): return 1.0\nsys.exit(0)")
    with pytest.raises(ValueError, match="failed to load: SystemExit: 0"):
        scorer(f"{path}:f")


# ------------------------------------------------------------------------- before and around


def test_a_function_that_changes_what_it_gets_changes_nothing_for_others():
    @register("takes")
    def takes(label, metadata):
        metadata["seen"] = True
        return label.pop() + 10 * len(metadata)

    @register("takes_all")
    def takes_all(labels):
        return [label.pop() for label in labels]

    row = prompt(label=[1, 2, 3], level=5)
    scores = scorer("takes", "takes_all").score([row], [completion("a"), completion("b")])
    assert [score.parts for score in scores] == [{"takes": 23.0, "takes_all": 3.0}] * 2
    assert (row.label, row.metadata) == ([1, 2, 3], {"level": 5})


@pytest.mark.parametrize("value", [3.5e38, -1e300])
def test_rewards_beyond_float32_name_source_and_row(value):
    register("large")(lambda: value)
    register("half")(lambda: value / 2)
    with pytest.raises(RewardError, match=r"'large', prompt row 4: .* float32 ends at 3\.4e38"):
        scorer("large").score([prompt(4)], [completion()])
    if value == 3.5e38:  # each part fits, the sum does not
        with pytest.raises(RewardError, match="the weighted sum of rewards, prompt row 4: a rewar"):
            scorer(half=2.0).score([prompt(4)], [completion()])


@pytest.mark.parametrize(
    ("rule", "options", "good", "bad", "text"),
    [
        ("exact_match", {}, 0, None, "the row has no label"),
        ("numeric", {"tolerance": 0.1}, "1/2", "half", "the label 'half' is no number"),
        ("multiple_choice", {"choices": "AB"}, "b", "C", "the label 'C' is none of the choices AB"),
        ("math", {}, "1", None, "the row has no label"),
        ("math", {}, "$x$", "$ $", r"the label '\$ \$' holds no answer"),
        ("gsm8k", {}, "#### 1", "sum: ####", "the label 'sum: ####' holds no answer"),
        ("code", {"seconds": 1.0}, ["assert f() == 1"], [], r"the label \[\] is no test"),
        ("code", {}, "assert f() == 1", " ", "the label ' ' is no test"),
    ],
)
def test_labels_are_looked_at_before_the_run(rule, options, good, bad, text):
    entry = {"name": rule, "options": options}
    recipes = {"source_key": "kind", "recipes": {"a": [rule], "b": ["length"]}}
    other = {"name": "length", "options": {"target": 1, "limit": 2}}
    made = build_scorer(
        Reward(
            functions=[RewardFunction(**entry), RewardFunction(**other)],
            allow_unsafe_code=True,
            **recipes,
        )
    )
    made.check([prompt(1, good, kind="a"), prompt(2, bad, kind="b")])  # where it does not count
    with pytest.raises(
        ValueError, match=f"eval_data: reward function '{rule}', prompt row 3: {text}"
    ):
        made.check([prompt(1, good, kind="a"), prompt(3, bad, kind="a")], "eval_data")
    with pytest.raises(ValueError, match="prompt row 5: kind = 'c' has no recipe"):
        made.check([prompt(5, good, kind="c")])


@pytest.mark.parametrize("isolated", [False, True])
def test_a_fault_of_the_data_is_told_from_a_bug(isolated):
    rule, label = ("code", 3) if isolated else ("exact_match", None)
    made = scorer(rule)
    with pytest.raises(SampleError, match=f"'{rule}', prompt row 0: .*label"):
        made.score([prompt(label=label)], [completion()])
    made.close()
    register("bug")(lambda response: 1 / 0)
    with pytest.raises(RewardError) as caught:
        scorer("bug").score([prompt()], [completion()])
    assert not isinstance(caught.value, SampleError)


def checked(flags):
    words = tiny_job.argv(functions=None)[:-2] + flags
    return check_only(words, lambda config: reward_faults(config.reward))


def test_what_only_loading_shows_is_told_by_a_dry_run(tmp_path, capsys):
    (tmp_path / "own.py").write_text("def f(response, *, base: int): return 0")
    functions = f'["exact_mach", {{ name = "{tmp_path}/own.py:f", options = {{ bas = 1 }} }}]'
    judges = (
        '[{ pretrain = "p", template = "{{ respones }}" }, '
        '{ name = "k", pretrain = "p", template = "{{ response }}", parser = "(" }]'
    )
    models = '[{ pretrain = "m", chat_template = "none.jinja" }]'
    flags = ["--functions", functions, "--judges", judges, "--models", models, "--dry_run"]
    assert (
        check_only(
            tiny_job.argv(functions=None)[:-2] + flags, lambda config: reward_faults(config.reward)
        )
        == 2
    )
    first, second, third, fourth, fifth = capsys.readouterr().err.splitlines()
    assert first.startswith('error: [reward] unknown reward function "exact_mach"')
    assert "has no option 'bas'; valid: base" in second
    assert "judge 'judge': its template shows 'respones'" in third
    assert "parser = '(' is no regular expression" in fourth
    assert 'models "m": chat_template = "none.jinja" is no text file that can be read' in fifth


def test_a_file_that_prints_does_not_spoil_the_toml_of_a_dry_run(tmp_path, capsys):
    (tmp_path / "own.py").write_text("print('hello')\ndef f(response): return 0")
    flags = ["--functions", f"{tmp_path}/own.py:f", "--dry_run"]
    assert (
        check_only(
            tiny_job.argv(functions=None)[:-2] + flags, lambda config: reward_faults(config.reward)
        )
        == 10
    )
    said = capsys.readouterr()
    assert said.err == "hello\n"
    assert tomllib.loads(said.out)["reward"]["functions"][0]["name"] == f"{tmp_path}/own.py:f"


ANNOTATED = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Response
class Own: pass
def f(response: Response, *, base: int = 2, own: Own = None, other: Other = None):
    return base
"""


def test_only_the_types_of_given_options_need_to_be_there(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(ANNOTATED)
    entry = RewardFunction(name=f"{path}:f", options={"base": 3}, isolate=False)
    assert build_scorer(Reward(functions=[entry])).score([prompt()], [completion()])[0].value == 3
    for option, told in (("own", "Own"), ("other", "'Other'")):
        entry = RewardFunction(name=f"{path}:f", options={option: 3})
        with pytest.raises(
            ValueError, match=f"option {option} has the type .*{told}.*, which noth"
        ):
            build_scorer(Reward(functions=[entry]))
