"""Warn of a run that cannot learn, with the likely cause."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ROLLOUTS = 10


class Cause(NamedTuple):
    """`metric` == `value` in every rollout means that nothing can be learned; `text` says why."""

    metric: str
    value: float
    text: str


# In this order, for each brings about those below it.
CAUSES = (
    Cause(
        *("update/skipped_ratio", 1.0),
        "no optimizer step could be taken (update/skipped_steps): loss or gradient was not finite, "
        "or no response token counted; lower the learning rate, use bf16 = false, or leave "
        "overlong_filtering out",
    ),
    Cause(
        *("response/truncated_ratio", 1.0),
        "every response was cut off by the length limit, the longest after "
        "{response_length/max:.0f} tokens; raise max_new_tokens or max_len, and check that the "
        "model can end: apply_chat_template for an instruct model, stop or stop_token_ids",
    ),
    Cause(
        *("reward/std", 0.0),
        "all rewards were equal, {reward/mean:g} in the last; the task is solved, out of reach, or "
        "the reward cannot tell responses apart: compare response and label in logs/rollouts",
    ),
    Cause(
        *("advantages/abs_max", 0.0),
        "every advantage was 0, since the rewards of each prompt's samples were equal; use prompts "
        "that are neither too easy nor too hard, more n_samples_per_prompt, or dynamic_sampling",
    ),
    Cause(
        *("grad_norm", 0.0),
        "the gradient was 0 although advantages were not; check the policy loss and its options, "
        "and that the model has parameters to train",
    ),
)


class StuckAlarm:
    """Counts rollouts in a row by cause; `records` are those of an interrupted run that goes on.

    >>> alarm = StuckAlarm([{"reward/std": 0.0, "reward/mean": 0.0}] * 9)
    >>> alarm.hear({"reward/std": 0.0, "reward/mean": 0.0})[:53]
    'for 10 rollouts all rewards were equal, 0 in the last'
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._streaks: Counter[Cause] = Counter()
        self._told: set[Cause] = set()
        for record in records:
            self.hear(record)

    def hear(self, metrics: Mapping[str, Any]) -> str | None:
        """The warning that a rollout's `metrics` give reason for: once for each cause."""
        steps, skipped = (metrics.get(f"update/{name}_steps") for name in ("optimizer", "skipped"))
        known = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if steps:
            known["update/skipped_ratio"] = (skipped or 0) / steps
        elif steps == 0:  # it only collected, or the actor is frozen
            known.pop("grad_norm", None)
        for cause in CAUSES:
            value = known.get(cause.metric, math.nan)
            if not math.isnan(value):
                self._streaks[cause] = self._streaks[cause] + 1 if value == cause.value else 0
        likely = next((cause for cause in CAUSES if self._streaks[cause] >= ROLLOUTS), None)
        if likely is None or likely in self._told:
            return None
        self._told.add(likely)
        return f"for {ROLLOUTS} rollouts {likely.text.format_map(known)}"
