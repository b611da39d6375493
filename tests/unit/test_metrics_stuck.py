"""A run that cannot learn says so once, with the likely cause."""

import math

import pytest
import tiny_job

from torchrft.metrics import read_metrics
from torchrft.metrics.stuck import StuckAlarm

GOOD = {
    "reward/mean": 0.5,
    "reward/std": 0.2,
    "response/truncated_ratio": 0.9,
    "response_length/max": 64.0,
    "grad_norm": 0.3,
    "update/optimizer_steps": 2,
    "update/skipped_steps": 1,
}
EQUAL = {"reward/std": 0.0, "reward/mean": 1.0, "advantages/all_zero": 1.0, "grad_norm": 0.0}
CAUSES = {
    "all rewards were equal, 1 in the last": EQUAL,
    "every response was cut off by the length limit, the longest after 64 tokens": {
        "response/truncated_ratio": 1.0,
        **EQUAL,
    },
    "every advantage was 0": {"advantages/all_zero": 1.0, "grad_norm": 0.0},
    "the gradient was 0": {"grad_norm": 0.0},
    "no optimizer step could be taken": {"update/skipped_steps": 2, "grad_norm": math.nan},
}


def heard(alarm, *records):
    return [warning for record in records if (warning := alarm.hear(GOOD | record))]


@pytest.mark.parametrize("text", CAUSES)
def test_the_likely_cause_is_told_once_after_ten_rollouts(text):
    alarm, bad = StuckAlarm(), CAUSES[text]
    assert heard(alarm, *[bad] * 9) == []
    (warning,) = heard(alarm, bad)
    assert warning.startswith(f"for 10 rollouts {text}")
    assert heard(alarm, *[bad] * 30, {}, *[bad] * 30) == []


@pytest.mark.parametrize("text", CAUSES)
def test_one_good_rollout_starts_the_count_again(text):
    bad = CAUSES[text]
    assert heard(StuckAlarm(), *[*[bad] * 9, {}] * 3) == []


def test_another_cause_is_told_as_well():
    alarm = StuckAlarm()
    first = heard(alarm, *[CAUSES["the gradient was 0"]] * 10)
    second = heard(alarm, {}, *[EQUAL] * 12)
    assert ["gradient" in first[0], "all rewards" in second[0]] == [True, True]
    assert len(first) == len(second) == 1


def test_rollouts_that_only_collect_or_freeze_the_actor_do_not_count():
    waits = {"update/optimizer_steps": 0, "update/skipped_steps": 0}
    assert heard(StuckAlarm(), *[waits | {"grad_norm": 0.0}] * 20) == []
    assert heard(StuckAlarm(), *[waits | {"grad_norm": math.nan}] * 20) == []
    assert heard(StuckAlarm(), *[{"grad_norm": None}] * 20) == []
    # Between rollouts that do, they neither count nor start the count again.
    mixed = [waits | {"grad_norm": math.nan}, {"grad_norm": 0.0}] * 10
    assert len(heard(StuckAlarm(), *mixed)) == 1


def test_a_resumed_run_goes_on_counting_and_does_not_repeat_itself():
    record = GOOD | EQUAL
    assert StuckAlarm([record] * 9).hear(record) is not None
    assert StuckAlarm([record] * 10).hear(record) is None


def constant(response):
    return 0.25


def test_a_run_with_a_constant_reward_says_so_across_a_resume(tmp_path, caplog):
    caplog.set_level("WARNING", logger="torchrft")
    function = f'[{{ name = "{__file__}:constant", isolate = false }}]'
    options = {"functions": function, "rollout_batch_size": 2, "train_batch_size": 8}
    options["lr_total_steps"] = 6
    tiny_job.run(tmp_path, max_steps=6, **options)
    assert caplog.messages == []
    tiny_job.run(tmp_path, max_steps=12, load_checkpoint=True, **options)
    (warning,) = caplog.messages
    assert warning.startswith("step 10: for 10 rollouts all rewards were equal, 0.25 in the last")
    assert [r["advantages/all_zero"] for r in read_metrics(tmp_path / "logs")] == [1.0] * 12
