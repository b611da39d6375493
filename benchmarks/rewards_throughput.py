"""How many answers a second the rules judge.

    python benchmarks/rewards_throughput.py [--samples 4096] [--group 16] [--workers 2]

Answers are of the form that a model gives to MATH and GSM8K prompts: a few sentences, then the
answer in a box. `--group` samples have the same label; a third of them is wrong, each in its own
way. The start of the workers is part of a rule's first run.
"""

from __future__ import annotations

import argparse
import random
import resource
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


def cpu_seconds() -> float:
    """Of this process and of workers that have ended; on a busy machine the time that counts."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure(rule: str, count: int, group: int, workers: int) -> list[object]:
    """A row of the table."""
    prompts, completions = answers(rule, count, group)
    reward = Reward(functions=[RewardFunction(name=rule)], reward_workers=workers)
    before, scorer, seconds = cpu_seconds(), build_scorer(reward), []
    for _ in range(2):
        start = time.perf_counter()
        right = sum(score.value for score in scorer.score(prompts, completions))
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            scorer.close()  # so that the workers' CPU time is known, and the second run starts anew
            cpu = cpu_seconds() - before
    scorer.close()
    return [rule, count, int(right), f"{min(seconds):.2f}", int(count / min(seconds)), f"{cpu:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rules", nargs="*", default=["numeric", "gsm8k", "math", "code"])
    options = parser.parse_args()
    print("| rule | samples | right | seconds, better of 2 | samples / s | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for rule in options.rules:
        count = options.samples // (16 if rule == "code" else 1)
        row = measure(rule, count, options.group, options.workers)
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
