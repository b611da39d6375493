"""Loops of public form on the DeepSpeed shim, against figures that real DeepSpeed gave."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import deepspeed_loops as loops  # noqa: E402

RECORDED = json.loads(loops.RECORDED.read_text())["loops"]
STAGES = (0, 1, 2, 3)
# DeepSpeed itself, and what of it torchrft refuses although DeepSpeed goes on.
REFUSED = {("zero_grad_per_micro_batch", stage) for stage in (0, 1, 3)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_weights_are_deepspeeds(ranks):
    cases = [(name, stage) for name in loops.LOOPS for stage in STAGES]
    results = loops.run("torchrft", ranks, cases)
    compared = 0
    for name, stage in cases:
        mine, theirs = results[name, stage], RECORDED[f"{name} {ranks} {stage}"]
        if isinstance(mine, str):
            assert isinstance(theirs, str) or (name, stage) in REFUSED, (name, stage, mine)
            assert mine.startswith(("ValueError: ", "DeepSpeedConfigError: ")), mine
            continue
        if isinstance(theirs, str):  # DeepSpeed aborts where only some ranks use a branch
            assert name == "unused_on_one_rank", (name, stage, theirs)
            continue
        differences = [loops.largest_difference(*pair) for pair in zip(mine, theirs, strict=True)]
        if (name, stage) in loops.ON_PURPOSE:
            assert max(differences) > 1e-3, (name, stage, "is like DeepSpeed's after all")
        else:
            assert max(differences) <= 1e-5, (name, stage, differences)
            compared += 1
    assert compared >= 75


def test_a_branch_on_one_rank_counts_as_zero_on_the_other():
    """DeepSpeed's stage 0 does so; its other stages abort."""
    [(losses, weights)] = loops.run("torchrft", 2, [("unused_on_one_rank", 1)]).values()
    expected = RECORDED["unused_on_one_rank 2 0"]
    assert losses == pytest.approx(expected[0], abs=1e-5)
    assert weights == pytest.approx(expected[1], abs=1e-5)
