r"""Answers with the verdict that a rule must give: (rule, label, response, verdict).

A verdict of None means that the answer is hostile: any end within the deadline will do, as long as
it is no 1.
"""

from __future__ import annotations

Answer = tuple[str, object, str, float | None]


def _same(rule: str, label: object, *responses: str) -> list[Answer]:
    return [(rule, label, response, 1.0) for response in responses]


def _other(rule: str, label: object, *responses: str) -> list[Answer]:
    return [(rule, label, response, 0.0) for response in responses]


NUMERIC = [
    *_same("numeric", 1234, "1234", "1,234", "1234.0", "It is 1234.", "1.234e3", "12 and 1234"),
    *_same("numeric", "-0.5", "-0.5", "-.5", "-1/2", "−0.5", "-5e-1", "x = -1 / 2"),
    *_same("numeric", "72", "48 + 24 = 72", "72 clips", "**72**", "\\boxed{72}", "$72"),
    *_same("numeric", "#### 1,000", "1000", "1,000.00", "+1000"),
    *_other("numeric", 1234, "1235", "123", "12345", "-1234", "1234.5", "1234 or 5", "", "none"),
    *_other("numeric", "-0.5", "0.5", "-0.05", "-5", "1/0", "1/-2"),
    *_other("numeric", 7, "seven", "７", "7e1", "6.999999999999", "7 7 8", "0x7"),
    *_other("numeric", 3, "9" * 1_000_000, "1e999999999", "1" * 500 + "/3", "1/" + "0" * 300),
    *_other("numeric", 3, "," * 1_000_000, "-" * 1_000_000, "3." * 500_000 + "x4"),
]
GSM8K = [
    *_same("gsm8k", "48/2 = 24\n#### 72", "#### 72", "#### 72.0", "so\n####72", "The answer is 72"),
    *_same("gsm8k", "#### 72", "\\boxed{72}", "It costs $72.", "**72**", "She has 72 clips."),
    *_same("gsm8k", "#### 1,080", "#### 1080", "#### 1,080", "#### $1,080", "10 + 1070 = 1080"),
    *_same("gsm8k", "#### 0.5", "#### 0.5", "#### 1/2", "#### .5", "The final answer is 0.50"),
    *_same("gsm8k", "#### -3", "#### -3", "#### -3.0", "that leaves -3"),
    *_same(
        "gsm8k", "#### 72", "<think>70 + 2</think><answer>72</answer>", "<answer> $72 </answer>"
    ),
    *_other(
        "gsm8k", "#### 72", "<think>70 + 2 = 72</think><answer>73</answer>", "72<answer></answer>"
    ),
    *_other("gsm8k", "#### 72", "#### 73", "#### 7", "#### 720", "#### -72", "72 of them\n#### 5"),
    *_other("gsm8k", "#### 72", "", "####", "seventy-two", "#### 7 2", "The answer is 72.5"),
    *_other("gsm8k", "#### 1,080", "#### 1,800", "#### 1.080", "#### 108"),
]
MATH = [
    # Fractions and decimals.
    *_same("math", "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", "$\\frac12$", "$\\dfrac{2}{4}$", "1/2"),
    *_same(
        "math", "\\frac{1}{2}", "The answer is 0.5", "\\boxed{0.50}", "$\\tfrac{1}{2}$", "$2^{-1}$"
    ),
    *_same("math", "-\\frac{3}{4}", "$-\\frac{3}{4}$", "$\\frac{-3}{4}$", "-0.75", "$-3/4$"),
    *_other(
        "math", "\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", "$\\frac{2}{1}$", "-1/2", "0.05", "12"
    ),
    *_other("math", "-\\frac{3}{4}", "$\\frac{3}{4}$", "$-\\frac{4}{3}$", "0.75"),
    # Roots, powers, constants.
    *_same("math", "\\sqrt{2}", "$\\sqrt{2}$", "$\\sqrt2$", "$2^{1/2}$", "$\\frac{2}{\\sqrt{2}}$"),
    *_same("math", "2\\sqrt{3}", "$2\\sqrt{3}$", "$\\sqrt{12}$", "\\boxed{2 \\sqrt 3}"),
    *_same("math", "\\pi", "$\\pi$", "\\boxed{\\pi}", "The area is $\\pi$."),
    *_same("math", "16", "$2^4$", "16", "\\boxed{16}", "$4 \\cdot 4$", "$16.0$"),
    *_other("math", "\\sqrt{2}", "$\\sqrt{3}$", "$2$", "1.41", "$-\\sqrt{2}$"),
    *_other("math", "\\pi", "3.14", "$2\\pi$", "$\\frac{22}{7}$", "$e$"),
    # Polynomials and equations.
    *_same("math", "x^2+2x+1", "$x^2 + 2x + 1$", "$(x+1)^2$", "\\boxed{1+2x+x^2}"),
    *_same("math", "x=3", "$x = 3$", "\\boxed{3}", "$x=3$"),
    *_other("math", "x^2+2x+1", "$x^2+2x-1$", "$(x-1)^2$", "$y^2+2y+1$"),
    *_other("math", "x=3", "$x=4$", "\\boxed{-3}", "$x=3.5$"),
    # Units, percent, money.
    *_same("math", "5", "\\boxed{5\\text{ cm}}", "$5 \\mathrm{~cm}$", "\\boxed{5\\%}", "$\\$5$"),
    *_same("math", "90", "$90^\\circ$", "\\boxed{90^{\\circ}}", "90 degrees"),
    *_other("math", "5", "\\boxed{50\\text{ cm}}", "$6 \\mathrm{~cm}$"),
    # Sets, tuples and intervals.
    *_same("math", "\\{1,2,3\\}", "$\\{1,2,3\\}$", "$\\{3,1,2\\}$", "\\boxed{\\{2, 3, 1\\}}"),
    *_same("math", "(1,2)", "$(1,2)$", "\\boxed{(1, 2)}", "$\\left(1,2\\right)$"),
    *_same("math", "[0,1]", "$[0,1]$", "$\\left[0,1\\right]$", "$[0, 1]$"),
    *_same("math", "(-\\infty,2)", "$(-\\infty, 2)$", "$\\left(-\\infty,2\\right)$"),
    *_same("math", "[0,1)\\cup(2,3]", "$[0,1)\\cup(2,3]$", "$(2,3]\\cup[0,1)$"),
    *_other("math", "\\{1,2,3\\}", "$\\{1,2\\}$", "$\\{1,2,4\\}$", "$\\{\\}$", "1"),
    *_other("math", "(1,2)", "$(2,1)$", "$(1,3)$", "$1$"),
    *_other("math", "[0,1]", "$(0,2)$", "$[0,2]$", "$[1,0]$"),
    *_other("math", "(-\\infty,2)", "$(-\\infty,3)$", "$(2,\\infty)$"),
    # Nothing to see.
    *_other("math", "7", "", " \n ", "I do not know.", "\\boxed{}", "$$", "\\boxed{\\text{none}}"),
    *_other("math", "7", "$\\frac{1}{0}$", "\\boxed{\\frac{}{}}", "\\boxed{7", "$\\infty$", "nan"),
]
_NESTED = "\\frac{1}{" * 600 + "7" + "}" * 600
HOSTILE: list[Answer] = [
    (rule, label, response, None)
    for rule, label in (("math", "7"), ("gsm8k", "#### 7"))
    for response in (
        "10^10^10", "$10^{10^{10}}$", "\\boxed{9^{9^{9^{9}}}}", "$100000!$", "$((((9!)!)!)!)!$",
        f"${_NESTED}$", "\\boxed{" + "(" * 3000 + "8" + ")" * 3000 + "}",
        "\\boxed{" * 5000, "$" * 1_000_001, "9" * 1_000_000, "1+" * 500_000 + "1",
        "$\\sqrt{" * 700 + "2" + "}$" * 700, "answer " * 150_000, "{" * 1_000_000,
        "$\\int_0^1 x^{x^{x^x}} dx$", "$\\prod_{n=1}^{100000} (1 + \\frac{1}{n!})$",
        "\0\ud7ff" * 999,
    )
]  # fmt: skip
ANSWERS = [*NUMERIC, *GSM8K, *MATH, *HOSTILE]
