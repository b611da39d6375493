"""Loops of public form on the DeepSpeed shim, against figures that real DeepSpeed gave."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import deepspeed_loops as loops  # noqa: E402

RECORDED = loops.unpack(json.loads(loops.RECORDED.read_text())["loops"])
STAGES = (0, 1, 2, 3)
PROGRAMS = [name for name, loop in loops.LOOPS.items() if "programs" in loop.__module__]
SIMPLE = [name for name in loops.LOOPS if name not in PROGRAMS]
# What torchrft refuses although DeepSpeed goes on,
REFUSED = {("zero_grad_per_micro_batch", stage) for stage in (0, 1, 3)}
REFUSED |= {(name, stage) for name in ("one_cycle", "range_test") for stage in STAGES}
REFUSED |= {("pass_of_the_module_alone", 0), ("output_object_alone", 0)}  # ranks part ways there
# and what DeepSpeed ends in an error for, or aborts (where only some ranks use a branch).
ALLOWED = {("unused_on_one_rank", stage) for stage in (1, 2, 3)}
ALLOWED |= {("two_engines_gan", 2), ("two_engines_gan", 3), ("two_losses_of_one_pass", 3)}
ALLOWED |= {("loaded_into_the_module", 3), ("norms_and_gradients", 0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "names", "least"), [(1, SIMPLE, 75), (2, SIMPLE, 75), (2, PROGRAMS, 160)]
)
def test_losses_and_weights_are_deepspeeds(ranks, names, least):
    cases = [(name, stage) for name in names for stage in STAGES]
    results = loops.run("torchrft", ranks, cases)
    compared = 0
    for name, stage in cases:
        mine, theirs = results[name, stage], RECORDED[f"{name} {ranks} {stage}"]
        if isinstance(mine, str):
            assert isinstance(theirs, str) or (name, stage) in REFUSED, (name, stage, mine)
            assert mine.startswith(("ValueError: ", "DeepSpeedConfigError: ")), (name, mine)
            continue
        if isinstance(theirs, str):
            assert (name, stage) in ALLOWED, (name, stage, theirs)
            continue
        differences = [loops.largest_difference(*pair) for pair in zip(mine, theirs, strict=True)]
        if (name, stage) in loops.ON_PURPOSE:
            assert max(differences) > 1e-3, (name, stage, "is like DeepSpeed's after all")
        else:
            assert max(differences) <= 1e-5, (name, stage, differences)
            compared += 1
    assert compared >= least


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs real DeepSpeed")
@pytest.mark.parametrize("names", [SIMPLE, PROGRAMS])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.timeout(1800)
def test_the_record_is_of_the_real_deepspeed(ranks, names, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    cases = [(name, stage) for name in names for stage in STAGES]
    results = loops.run("deepspeed", ranks, cases)
    for name, stage in cases:
        real, recorded = results[name, stage], RECORDED[f"{name} {ranks} {stage}"]
        assert isinstance(real, str) == isinstance(recorded, str), (name, stage, real)
        if not isinstance(real, str):
            pairs = zip(real, recorded, strict=True)
            assert max(loops.largest_difference(*pair) for pair in pairs) <= 1e-5, (name, stage)


@pytest.mark.slow
def test_a_branch_on_one_rank_counts_as_zero_on_the_other():
    """DeepSpeed's stage 0 does so; its other stages abort."""
    [(losses, weights)] = loops.run("torchrft", 2, [("unused_on_one_rank", 1)]).values()
    expected = RECORDED["unused_on_one_rank 2 0"]
    assert losses == pytest.approx(expected[0], abs=1e-5)
    assert weights == pytest.approx(expected[1], abs=1e-5)
