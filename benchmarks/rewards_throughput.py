"""How many answers a second the rules judge.

    python benchmarks/rewards_throughput.py [--samples 4096] [--group 16] [--workers 2]

Answers are of the form that a model gives to MATH and GSM8K prompts: a few sentences, then the
answer in a box. `--group` samples have the same label; a third of them is wrong, each in its own
way. The start of the workers is part of a rule's first run.
"""

from __future__ import annotations

import argparse
import random
import time

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards import build_scorer
from torchrft.types import Completion, Prompt

STEPS = "We simplify the expression step by step: first $a + b = {a}$, then ${a} \\cdot 2 = {b}$. "
MATH = [
    "\\frac{{{a}}}{{{b}}}",
    "{a}",
    "({a}, {b})",
    "{a}\\sqrt{{{b}}}",
    "x^2 + {a}x + {b}",
    "[{a}, {b}]",
]
CODE = "```python\ndef double(x):\n    return {a} * x\n```"


def answers(rule: str, count: int, group: int) -> tuple[list[Prompt], list[Completion]]:
    """`count` prompts with a completion each."""
    prompts, completions = [], []
    for row in range(count):
        numbers = random.Random(row // group)
        a, b = numbers.randint(2, 9999), numbers.randint(2, 9999)
        form = MATH[row // group % len(MATH)] if rule == "math" else "{a}"
        label, wrong = form.format(a=a, b=b), form.format(a=a + 1 + row % group, b=b)
        given = wrong if row % 3 == 0 else label
        text = STEPS.format(a=a, b=b) * 6 + f"So the final answer is $\\boxed{{{given}}}$."
        if rule == "code":
            label, text = "assert double(3) == 6", CODE.format(a=2 + (row % 3 == 0))
        prompts.append(Prompt(row, "", (1,), label))
        completions.append(Completion(row, 0, (1,), (0.0,), text, "stop"))
    return prompts, completions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print("| rule | samples | right | seconds | samples / s | again, workers running |")
    print("|---|---|---|---|---|---|")
    for rule, count in (
        ("exact_match", options.samples),
        ("numeric", options.samples),
        ("gsm8k", options.samples),
        ("math", options.samples),
        ("code", options.samples // 16),
    ):
        prompts, completions = answers(rule, count, options.group)
        reward = Reward(functions=[RewardFunction(name=rule)], reward_workers=options.workers)
        scorer = build_scorer(reward)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            right = sum(score.value for score in scorer.score(prompts, completions))
            seconds.append(time.perf_counter() - start)
        scorer.close()
        rate = f"{count / seconds[0]:.0f}"
        print(
            f"| {rule} | {count} | {right:.0f} | {seconds[0]:.2f} | {rate} | {seconds[1]:.2f} s |"
        )


if __name__ == "__main__":
    main()
