"""Warn of a run that cannot learn, with the likely cause."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

ROLLOUTS = 10


# What a metric is in every rollout from which nothing can be learned, and the likely cause. In this
# order, for each brings about those below it.
CAUSES = (
    ("update/skipped_ratio", 1.0, "no optimizer step could be taken: loss or gradient was not "
     "finite, or no response token counted; lower the learning rate, or try bf16 = false"),
    ("response/truncated_ratio", 1.0, "every response was cut off by the length limit, the longest "
     "after {response_length/max:.0f} tokens; raise max_new_tokens or max_len, and check that the "
     "model can end: apply_chat_template for an instruct model, stop or stop_token_ids"),
    ("reward/std", 0.0, "all rewards were equal, {reward/mean:g} in the last; the task is solved, "
     "out of reach, or the reward is constant: compare response and label in logs/rollouts"),
    ("advantages/all_zero", 1.0, "every advantage was 0, since each prompt's rewards were equal; "
     "use prompts neither too easy nor too hard, more n_samples_per_prompt, or dynamic_sampling"),
    ("grad_norm", 0.0, "the gradient was 0 although advantages were not; check the policy loss "
     "with its options, and that the model has parameters to train"),
)  # fmt: skip


class StuckAlarm:
    """Counts rollouts in a row by cause; `records` are those of an interrupted run that goes on.

    >>> alarm = StuckAlarm([{"reward/std": 0.0, "reward/mean": 0.0}] * 9)
    >>> alarm.hear({"reward/std": 0.0, "reward/mean": 0.0})[:53]
    'for 10 rollouts all rewards were equal, 0 in the last'
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._streaks: Counter[str] = Counter()
        self._told: set[str] = set()
        for record in records:
            self.hear(record)

    def hear(self, metrics: Mapping[str, Any]) -> str | None:
        """The warning that a rollout's `metrics` give reason for: once for each cause."""
        steps, skipped = (metrics.get(f"update/{name}_steps") for name in ("optimizer", "skipped"))
        known = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if not math.isnan(known.get("grad_norm", math.nan)):  # its key stands only where it is 1
            known.setdefault("advantages/all_zero", 0.0)
        if steps:
            known["update/skipped_ratio"] = (skipped or 0) / steps
        elif steps == 0:  # it only collected, or the actor is frozen
            known.pop("grad_norm", None)
        likely = None
        for metric, stuck, text in reversed(CAUSES):
            if not math.isnan(value := known.get(metric, math.nan)):
                self._streaks[metric] = self._streaks[metric] + 1 if value == stuck else 0
            likely = (metric, text) if self._streaks[metric] >= ROLLOUTS else likely
        if likely is None or likely[0] in self._told:
            return None
        self._told.add(likely[0])
        return f"for {ROLLOUTS} rollouts {likely[1].format_map(known)}"
