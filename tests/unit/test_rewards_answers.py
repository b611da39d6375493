"""The answer part of a response, labels, and verdicts on answers written in every way."""

import math
import sys
import time
import tomllib
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from math_pairs import PAIRS

from torchrft.config.manager import ConfigError, load
from torchrft.rewards import rules
from torchrft.rewards.labels import label_text
from torchrft.rewards.program import program_of
from torchrft.rewards.registry import LabelError
from torchrft.rewards.verdicts import parser_of
from torchrft.rewards.verify import reward_faults

# ruff: noqa: E501  # an answer is one line

CHOSEN = [
    ("c", "C", 1.0),
    ("(c)", "C", 1.0),
    ("option c", "C", 1.0),
    ("Answer: c", "C", 1.0),
    ("[[C]]", "C", 1.0),
    ("So C is the answer.", "C", 1.0),
    ("The answer is 'C'.", "C", 1.0),
    ("The correct choice is therefore C.", "C", 1.0),
    ("I think it's C.", "C", 1.0),
    ("The answer is not C", "C", 0.0),
    ("The answer is a", "A", 0.0),  # cut off
    ("The answer is (a)", "A", 1.0),
    ("I'm sure it's a dog.", "A", 0.0),
    ("C", "C", 1.0),
    ("C.", "C", 1.0),
    ("<think>Let me see.</think><answer>C</answer>", "C", 1.0),
    (r"\boxed{\textbf{C}}", "C", 1.0),
    (r"\boxed{\text{C}}", "C", 1.0),
    (r"\boxed{\text{(C)}}", "C", 1.0),
    (r"\boxed{(C)}", "C", 1.0),
    (r"\boxed{C. Paris}", "C", 1.0),
    (r"\boxed{\mathrm{C}}", "C", 1.0),
    (r"\boxed{\mathbf{(C)}\ 5}", "C", 1.0),
    ("C. Paris", "C", 1.0),
    ("C) Paris", "C", 1.0),
    ("(C) Paris", "C", 1.0),
    ("**C**", "C", 1.0),
    ("**C. Paris**", "C", 1.0),
    ("(C)", "C", 1.0),
    ("C)", "C", 1.0),
    ("Answer: C", "C", 1.0),
    ("answer: C", "C", 1.0),
    ("The answer is C.\n\nOption A is incorrect because it is smaller.", "C", 1.0),
    ("The correct answer is **C**.", "C", 1.0),
    ("The correct answer is **C. Paris**", "C", 1.0),
    ("The answer is: (C) Paris", "C", 1.0),
    ("The correct option is C", "C", 1.0),
    ("I choose C.", "C", 1.0),
    ("I would pick option C", "C", 1.0),
    ("Option C is correct.", "C", 1.0),
    ("C is the correct answer.", "C", 1.0),
    ("Therefore, the answer is option C.", "C", 1.0),
    (r"The best answer is $\textbf{(C)}$", "C", 1.0),
    ("The answer is $C$.", "C", 1.0),
    (r"The answer is \(C\).", "C", 1.0),
    ("Final Answer: **C**", "C", 1.0),
    ("**Answer:** C", "C", 1.0),
    ("**Answer: C**", "C", 1.0),
    ("### Answer\nC", "C", 1.0),
    ("Answer\n\n**C**", "C", 1.0),
    ("答案是C", "C", 1.0),
    ("答案：C。", "C", 1.0),
    ("<answer>(C)</answer>", "C", 1.0),
    ("<answer>C. Paris</answer>", "C", 1.0),
    ("<answer>The answer is C</answer>", "C", 1.0),
    ("thinking (A)</think>C", "C", 1.0),
    ("Not (A), so (C).", "C", 1.0),
    ("The answer is C because A is wrong.", "C", 1.0),
    ("The answer is C, since A dog barks.", "C", 1.0),
    ("The answer is A.", "A", 1.0),
    ("A. Dog", "A", 1.0),
    ("The answer is A because it is.", "A", 1.0),
    ("A", "A", 1.0),
    ("(A)", "A", 1.0),
    ("Answer: A", "A", 1.0),
    ("The answer is (A) dog", "A", 1.0),
    (r"\boxed{A}", "A", 1.0),
    ("The answer is **A**", "A", 1.0),
    ("Let me eliminate.\nA. London is wrong\n\nSo the answer is C.", "C", 1.0),
    ("Answer: C\n\nExplanation: A and B are wrong.", "C", 1.0),
    ("The answer is C\n", "C", 1.0),
    ("`C`", "C", 1.0),
    ('"C"', "C", 1.0),
    ("C: Paris", "C", 1.0),
    ("Answer - C", "C", 1.0),
    ("The answer is **(C) Paris**, not (A).", "C", 1.0),
    ("Answer: [C]", "C", 1.0),
    ("ANSWER: C", "C", 1.0),
    (r"\fbox{C}", "C", 1.0),
    (r"\boxed C", "C", 1.0),
    ("My answer is C", "C", 1.0),
    ("Correct answer: C", "C", 1.0),
    ("<answer>\nC\n</answer>", "C", 1.0),
    ("<answer> C", "C", 1.0),
    ("\\boxed{42}\nSo the answer is C", "C", 1.0),
    ("The answer is option (C).", "C", 1.0),
    (r"\[\boxed{C}\]", "C", 1.0),
    ("A dog runs.", "A", 0.0),
    ("The answer is A dog.", "A", 0.0),
    ("A Car is not", "A", 0.0),
    ("<think>(C) looks good, but no.</think>\n<answer>A</answer>", "C", 0.0),
    ("<think>The answer is C", "C", 0.0),
    ("The answer is not C.", "C", 0.0),
    ("The answer is A or C.", "C", 0.0),
    (r"\boxed{A, C}", "C", 0.0),
    (r"\boxed{A or C}", "C", 0.0),
    ("(A) London\n(B) Rome\n(C) Paris", "C", 0.0),
    ("A. x\nB. y\nC. z\nD. w", "D", 0.0),
    ("A. x\nB. y\nC. z\nD. w", "A", 0.0),
    ("Vitamin C is good", "C", 0.0),
    ("I think so", "A", 0.0),
    ("", "C", 0.0),
    ("The answer is D", "C", 0.0),
    ("Cats", "C", 0.0),
    ("The answer is Cats", "C", 0.0),
    ("<think>C</think>", "C", 0.0),
    ("<answer></answer>C", "C", 0.0),
    (r"\boxed{}", "C", 0.0),
    ("The answer is C.\nB. is wrong", "B", 0.0),
    ("The answer is C.\n\nOption A is incorrect", "A", 0.0),
    ("Answer: C\nA: London", "A", 0.0),
    ("the answer isn't C", "C", 0.0),
    ("Option C is not correct. The answer is B.", "C", 0.0),
    (r"<think>\boxed{C}</think>B", "C", 0.0),
    ("<answer>A</answer> <answer>B</answer>", "C", 0.0),
    ("Answer: C/B", "B", 0.0),
    ("The answer is C, A is wrong", "A", 0.0),
    ("Answer: A, B, C, D", "C", 0.0),
    ("Answer: A, B, C, D", "A", 0.0),
    ("Answer: A and B", "A", 0.0),
]


@pytest.mark.parametrize(("response", "label", "expected"), CHOSEN)
def test_multiple_choice_reads_an_answer_as_it_is_meant(response, label, expected):
    assert rules.multiple_choice(response, label) == expected


@pytest.mark.parametrize(
    "label",
    [
        "(C)",
        "c",
        "C.",
        "C)",
        r"\text{C}",
        "$C$",
        r"\boxed{C}",
        "C. Paris",
        r"\textbf{(C)}",
        "**C**",
        2,
        np.int64(2),
        ["C"],
        {"ground_truth": "C"},
        '["C"]',
    ],
)
def test_multiple_choice_labels(label):
    assert rules.multiple_choice("The answer is C", label) == 1.0


MATH_ANSWERS = [
    (r"\frac{\pi}{2}", r"\boxed{\frac\pi2}", 1.0),
    (r"\sqrt{\pi}", r"\boxed{\sqrt\pi}", 1.0),
    (r"\frac{1}{\pi}", r"\boxed{\frac{1}\pi}", 1.0),
    (r"(-\infty,-2]\cup[2,\infty)", r"\boxed{x \le -2 \text{ or } x \ge 2}", 1.0),
    (r"(-\infty,-2]\cup[2,\infty)", r"\boxed{x < -2 \text{ or } x \ge 2}", 0.0),
    (r"x<-2\text{ or }x>2", r"\boxed{(-\infty,-2)\cup(2,\infty)}", 1.0),
    ("2017", r"\boxed{2023-01-05}", 0.0),
    ("12/25/2023", r"\boxed{12/23/2025}", 0.0),
    ("3e8", r"\boxed{3*10^8}", 1.0),
    (r"3 \times 10^8", r"\boxed{3*10**8}", 1.0),
    ("x^2+1", r"\boxed{x**2+1}", 1.0),
    ("77", r"\boxed{**77**}", 1.0),
    (r"\mathbb{R}", r"\boxed{\mathbb R}", 1.0),
    ("30", r"\boxed{30°C}", 1.0),
    (r"30^\circ C", r"\boxed{30^\circ F}", 0.0),
    (r"5\text{ USD}", r"\boxed{5\text{ EUR}}", 0.0),
    ("€5", r"\boxed{5\text{ EUR}}", 1.0),
    ("['34']", r"\boxed{34}", 1.0),
    ("5 thousand", r"\boxed{5000}", 1.0),
    ("5", r"\boxed{5 thousand}", 0.0),
    ("5", r"\boxed{5\text{ thousand}}", 0.0),
    ("5000", r"\boxed{5\text{ thousand}}", 1.0),
    ("5", r"\boxed{5 or more}", 0.0),
    ("12", "12 red clips", 1.0),
    ("7", "The answer is 7.", 1.0),
    ("7", "The final answer is **7**.", 1.0),
    ("7", "so x = 7", 1.0),
    ("7", "<answer>7</answer>", 1.0),
    ("7", "<answer>x = 7</answer>", 1.0),
    ("x^2+1", "<answer>1+x^2</answer>", 1.0),
    (r"\frac12", r"<answer>\frac{1}{2}</answer>", 1.0),
    (r"\frac12", r"<answer>$\frac{1}{2}$</answer>", 1.0),
    ("7", r"<think>\boxed{7}", 0.0),
    ("7", r"<think>\boxed{7}</think>", 0.0),
    ("7", r"\boxed{7}</think>8", 0.0),
    ("7", r"<think>a</think>\boxed{7}", 1.0),
    ("7", r"a</think>\boxed{7}", 1.0),
    ("7", r"<thinking>\boxed{7}</thinking>\boxed{8}", 0.0),
    ("7", r"[THINK]\boxed{7}[/THINK]\boxed{8}", 0.0),
    ("7", r"◁think▷\boxed{7}◁/think▷8", 0.0),
    ("7", r"<reasoning>\boxed{7}</reasoning><answer>8</answer>", 0.0),
    ("7", r"<THINK>\boxed{7}</THINK>8", 0.0),
    ("7", r"<think>x</think><answer>\boxed{7}</answer>", 1.0),
    ("7", r"<think>x</think>\boxed{8}<answer>7</answer>", 1.0),
    ("7", r"<answer>8</answer>\boxed{7}", 0.0),
    ("7", "<answer>7", 1.0),
    ("7", "<answer>8</answer> <answer>7</answer>", 1.0),
    ("7", r"\fbox{7}", 1.0),
    ("7", r"\boxed {7}", 1.0),
    ("7", r"\boxed 7", 1.0),
    ("7", r"$\boxed7$", 1.0),
    ("7", r"\boxed{8} or \boxed{7}", 1.0),
    ("7", r"\boxed{7", 0.0),
    ("7", r"\boxed{}", 0.0),
    ("7", r"\boxed{7}{}", 1.0),
    ("7", r"**\boxed{7}**", 1.0),
    ("7", r"\boxed{\boxed{7}}", 1.0),
    ("7", r"\boxed{\text{7}}", 1.0),
    ("7", r"\boxed{\$7}", 1.0),
    ("7", r"\boxed{7.}", 1.0),
    (r"\$18.90", "It costs $18.90.", 1.0),
    (r"\$18.90", r"The answer is \$18.90.", 1.0),
    (r"6.63\times10^{-34}", "The answer is 6.63e-34.", 1.0),
    (r"6.63\times10^{-34}", r"The answer is $6.63 \times 10^{-34}$.", 1.0),
    (r"6.63\times10^{-34}", r"So $h = 6.63 \times 10^{-34}$ here.", 1.0),
    ("1,2", "The answer is $x=1$ or $x=2$.", 1.0),
    ("1,2", "The solutions are $1$ and $2$.", 1.0),
    ("3/4", "It is 3/4", 1.0),
    ("7", "There are 7 apples", 1.0),
    ("7", "There are 8 apples", 0.0),
    ("25 m/s", "The speed is 25 m/s.", 1.0),
    (r"\text{Monday}", "The answer is Monday.", 1.0),
    ("(1,2)", "The point is $(1,2)$.", 1.0),
    ("[0,1)", "The answer is [0,1).", 1.0),
    ({"ground_truth": "34", "style": "rule"}, r"\boxed{34}", 1.0),
    (["34"], r"\boxed{34}", 1.0),
    ('["34"]', r"\boxed{34}", 1.0),
    (5e-05, r"\boxed{5\times10^{-5}}", 1.0),
    (5e-05, r"\boxed{0.00005}", 1.0),
    (1e16, r"\boxed{10^{16}}", 1.0),
    ("1e3", r"\boxed{1000}", 1.0),
    ("1E5", r"\boxed{100000}", 1.0),
    ("5e-05", r"\boxed{0.00005}", 1.0),
    (9007199254740993, r"\boxed{9007199254740993}", 1.0),
    (9007199254740993, r"\boxed{9007199254740992}", 0.0),
    (-0.0, r"\boxed{0}", 1.0),
    (18.9, r"\boxed{18.90}", 1.0),
    (1e-07, r"\boxed{0.0000001}", 1.0),
    (5, r"\boxed{5}", 1.0),
    (r"The answer is \boxed{5}", r"\boxed{5}", 1.0),
    (r"$\boxed{5}$", r"\boxed{5}", 1.0),
]


@pytest.mark.parametrize(("label", "response", "expected"), MATH_ANSWERS)
def test_math_looks_at_the_answer_part(label, response, expected):
    assert rules.math(response, label) == expected


@pytest.mark.slow
def test_math_pairs():
    """Some 1,480 pairs of a label and an answer, in both verdicts."""
    answers = [
        (label, answer, verdict)
        for label, same, others in PAIRS
        for verdict, listed in ((1.0, same), (0.0, others))
        for answer in listed
    ]
    assert len(answers) > 1400
    wrong = [
        (label, answer, verdict)
        for label, answer, verdict in answers
        if rules.math(f"So it is $\\boxed{{{answer}}}$.", label) != verdict
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("label", "response", "expected"),
    [
        (-5, "-$5", 1.0),
        (42, r"\boxed{42\text{ cm}^2}", 1.0),
        (2, r"\boxed{42\text{ cm}^2}", 0.0),
        (42, "42 m^2", 1.0),
        (3.5, "3 1/2", 1.0),
        (-3.5, r"\boxed{-3\frac{1}{2}}", 1.0),
        (-0.75, r"-\frac{3}{4}", 1.0),
        (15.5, r"\boxed{3\frac{1}{2}}", 0.0),
        (10**6, r"10^{6}", 1.0),
        (1e16, "1e16", 1.0),
        (0.00005, "5e-5", 1.0),
        ("5e-05", "0.00005", 1.0),
        ("1E5", "100,000", 1.0),
        (r"\$18.90", "18.9", 1.0),
        (r"32,\!348", "32348", 1.0),
        (r"32{,}348", "32,348", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        ("6000", r"6 \times 10^{3}", 1.0),
        ({"ground_truth": "34", "style": "rule"}, "34", 1.0),
        (["34"], "34", 1.0),
        (np.float32(0.5), "0.5", 1.0),
        (Decimal("1E+3"), "1000", 1.0),
        (2**60 + 1, str(2**60), 0.0),
        (-0.0, "0", 1.0),
        (5, "<answer>5</answer> is 3 more than 2", 1.0),
        (5, "<think>5</think>6", 0.0),
        (5, "<think>5", 0.0),
        (5, "reasoning 7</think>5", 1.0),
        (5, "\\boxed{5}, which is 2+3", 1.0),
        (12, "1,2", 0.0),
        (100000, "1,00,000", 1.0),
    ],
)
def test_numeric_reads_labels_and_answers_as_they_are_meant(label, response, expected):
    assert rules.numeric(response, label) == expected


def test_exact_match_takes_the_response_or_its_answer_part():
    for label, response, expected in (
        ("42", "<think>6 * 7</think>42", 1.0),
        ("42", "<answer> 42 </answer>", 1.0),
        ("42", "<think>42", 0.0),
        ("<think>a</think>b", "<think>a</think>b", 1.0),
        (0.00005, "0.00005", 1.0),
        (4.0, "4.0", 1.0),
    ):
        assert rules.exact_match(response, label) == expected


@pytest.mark.parametrize(
    "label",
    [None, True, [], ["1", "2"], {"a": 1}, math.nan, math.inf, b"5", {1}, np.array([1, 2])],
)
def test_labels_that_are_no_answer_are_refused(label):
    """They were judged as Python prints them."""
    for check in (rules._gold, rules._gold_gsm8k, rules._number, rules.label_letter, label_text):
        with pytest.raises(LabelError, match=r"the label .*|the row has no label"):
            check(label)


@pytest.mark.parametrize(
    "label",
    [
        r"\text{}",
        r"\\",
        "{}",
        r"\boxed{}",
        "$$",
        r"\,",
        r"\quad",
        ".",
        "?",
        r"\frac{}{}",
        r"\sqrt{}",
        r"\frac{1}{",
        "...",
        r"\$",
        "%",
        "}{",
        r"\left(",
        "",
        " ",
        r"\mathrm{}",
        "()",
    ],
)
def test_math_labels_that_nothing_can_equal_are_refused(label):
    with pytest.raises(LabelError, match="holds no answer"):
        rules._gold(label)


F = "`" * 3
ADD = "def add(a, b):\n    return a + b\n"
PROGRAMS = {
    "example": f"{F}python\n{ADD}{F}\nUse:\n{F}python\nassert add(1, 1) == 2\n{F}",
    "later": f"{F}python\n{ADD.replace('+', '-')}{F}\nBetter:\n{F}python\n{ADD}{F}",
    "py3": f"{F}python3\n{ADD}{F}",
    "attr": f'{F}python title="x.py"\n{ADD}{F}',
    "pandoc": f"{F}{{.python}}\n{ADD}{F}",
    "pandoc2": f"{F} {{ .python .n }}\n{ADD}{F}",
    "crlf": f"{F}python\r\n" + ADD.replace("\n", "\r\n") + F,
    "bash": f"x\n{F}bash\npip\n{F}\nThen:\n{F}python\n{ADD}{F}\n",
    "bashafter": f"x\n{F}python\n{ADD}{F}\nThen:\n{F}bash\npip\n{F}\n",
    "outafter": f"x\n{F}python\n{ADD}{F}\nOutput:\n{F}\n3\n{F}\n",
    "doc": f'{F}python\ndef add(a, b):\n    """\n    {F}\n    add(1, 2)\n    {F}\n    """\n    return a + b\n{F}',
    "doc0": f'{F}python\n"""\n{F}\nadd(1, 2)\n{F}\n"""\n{ADD}{F}\nDone',
    "docpy": f'{F}python\n"""\n{F}python\nadd(1, 2)\n{F}\n"""\n{ADD}{F}\nDone',
    "docpy4": f'{F}python\ndef add(a, b):\n    """\n    {F}python\n    add(1, 2)\n    {F}\n    """\n    return a + b\n{F}',
    "doc2": f'{F}python\nclass X:\n  """\n  {F}\n  a\n  {F}\n  """\n{ADD}{F}\nDone\n\n{F}\nout\n{F}',
    "docunclosed": f'{F}python\ndef add(a, b):\n    """\n    {F}\n    add(1, 2)\n    {F}\n    """\n    return a + b\n',
    "tilde": f"~~~python\n{ADD}~~~",
    "list": f"1. Solve:\n\n   {F}python\n   def add(a, b):\n       return a + b\n   {F}\n2. Done",
    "quote": f"> {F}python\n> def add(a, b):\n>     return a + b\n> {F}\n",
    "unclosed": f"{F}python\n{ADD}",
    "none": f"{F}\n{ADD}{F}",
    "bare": ADD,
    "ind4": f"    {F}python\n    def add(a, b):\n        return a + b\n    {F}",
    "ind4p": f"Text:\n\n      {F}python\n      def add(a, b):\n          return a + b\n      {F}",
    "two": f"{F}python\ndef add(a,b): return a-b\n{F}Like so:\n{F}python\n{ADD}{F}",
    "broken": f"{F}python\ndef add(a,\n\nLet me rewrite:\n{F}python\n{ADD}{F}",
    "four": f"````python\n{ADD}s = '''\n{F}\n'''\n````",
    "html": f"<div>\n{F}python\n{ADD}{F}\n</div>",
    "Py": f"{F}Python\n{ADD}{F}",
    "PY": f"{F}PY\n{ADD}{F}",
    "py": f"{F}py\n{ADD}{F}",
    "colon": f"{F}python:main.py\n{ADD}{F}",
    "listbad": f"- Code:\n  {F}python\n{ADD}{F}\n",
    "sp": f"{F} python\n{ADD}{F}  ",
    "inlineafter": f"{F}python\n{ADD}{F}\nUse `add` and {F}x{F}.",
    "para": f"Code: {F}python\n{ADD}{F}\n",
    "para2": f"1. Code: {F}python\n{ADD}{F}\n",
    "para3": f"Code:{F}python3\n{ADD}{F}\n",
    "endsame": f"{F}python\n{ADD.rstrip()}{F}\nThat is it.",
    "tab": f"\t{F}python\n\tdef add(a, b):\n\t    return a + b\n\t{F}",
    "mixed": f"{F}js\nlet x\n{F}\n{F}\n{ADD}{F}",
    "untaggedboth": f"{F}\n$ pip install\n{F}\n{F}python\n{ADD}{F}\n{F}text\n3\n{F}",
    "nested list": f"* a\n    * b\n\n        {F}python\n        def add(a, b):\n            return a + b\n        {F}\n",
    "list direct": f"1. {F}python\n   def add(a, b):\n       return a + b\n   {F}\n",
    "emoji": f"{F}python\n# ①\n{ADD}{F}",
    "longer close": f"{F}python\n{ADD}`````",
    "nl": f"{F}python\n\n\n{ADD}\n\n{F}",
    "py312": f"{F}python3.11\n{ADD}{F}",
    "blockquote+list": f"> 1. x\n>    {F}py\n>    def add(a, b):\n>        return a + b\n>    {F}",
    "crlf doc": (
        f'{F}python\ndef add(a, b):\n    """\n    {F}\n    add(1, 2)\n    {F}\n    """\n    return a + b\n{F}'
    ).replace("\n", "\r\n"),
    "bom": "\ufeff" + f"{F}python\n{ADD}{F}",
    "string with fence": f"{F}python\n{ADD}x = '{F}'\n{F}",
    "pycon after": f"{F}python\n{ADD}{F}\n{F}pycon\n>>> add(1,2)\n3\n{F}\n{F}python-repl\n>>> 1\n{F}",
    "diff": f"{F}diff\n- a\n{F}\n{F}python\n{ADD}{F}",
}


@pytest.mark.parametrize("response", PROGRAMS.values(), ids=PROGRAMS)
def test_the_last_python_block_is_the_program(response):
    scope = {}
    exec(program_of(response), scope)
    assert scope["add"](1, 2) == 3


def test_a_program_is_found_in_bounded_time():
    """Blanks took the square of their number, and each fence another look at the whole block."""
    start = time.monotonic()
    program_of("x\n" + " " * 60_000 + "y")
    block = "x = (\n" + "a = 1 + 2 * 3\n" * 5_000
    assert program_of(f"{F}python\n{block}" + f"{F}\nb = 1\n" * 60).startswith("x = (")
    assert time.monotonic() - start < 5


def test_code_labels_that_test_nothing_are_refused():
    """A list stored as text was a program that cannot fail, and so was a function not called."""
    bad = f"{F}python\nadd = None\n{F}\n"
    assert rules.code(bad, '["assert add(1, 2) == 3"]') == 0.0
    check = "METADATA = {}\ndef check(candidate):\n    assert candidate(1) == 2\n"
    for label, match in (
        (check, "tests nothing"),
        (["assert ("], "no Python"),
        ("import re", "tests nothing"),
    ):
        with pytest.raises(LabelError, match=match):
            rules.code(bad, label)
    assert rules.code(f"{F}python\n{ADD}{F}", check.replace("1", "1, 1") + "check(add)") == 1.0


def test_code_looks_at_the_answer_part():
    good, bad = f"{F}python\n{ADD}{F}\n", f"{F}python\nadd = None\n{F}\n"
    samples = [f"<think>{bad}</think>{good}", f"<think>{good}</think>none", f"<think>{good}"]
    samples += [f"{bad}<answer>{good}</answer>", f"<answer>{good}"]
    test = "assert add(1, 2) == 3"
    assert [rules.code(sample, test) for sample in samples] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert rules.code(good, {"ground_truth": [test]}) == 1.0


def test_a_dry_run_only_notes_that_math_verify_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    flags = ["--config_file", "train_configs/debug_model.toml", "--functions"]
    needs = "[reward] functions: 'math' needs math-verify: pip install 'torchrft[math]'"
    loaded = load([*flags, "math", "--dry_run"], 1)
    assert needs in loaded.notes
    assert reward_faults(loaded.config.reward) == []
    with pytest.raises(ConfigError) as refused:
        load([*flags, "math"], 1)
    assert refused.value.faults == [needs]
    assert load([*flags, "exact_match"], 1).notes == ()


def test_the_judge_example_of_the_docs_is_bounded():
    """A judge that wrote 1234567 was a reward of a million."""
    page = (Path(__file__).parents[2] / "docs" / "rewards_models.md").read_text()
    table = page.partition("[[reward.judges]]")[2].partition("```")[0]
    parser = parser_of(tomllib.loads(table)["parser"])
    assert [parser(text) for text in ("1234567", "about 9", "-1e30", "none")] == [7, 9, 0, None]
