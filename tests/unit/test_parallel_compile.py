"""torch.compile of decoder layers, with its default backend."""

import pytest
import torch
from tiny_policy import make_learner, make_samples, with_advantages
from torch._dynamo.utils import counters

OPTIONS = {"packing_samples": True, "max_tokens_per_microbatch": 64, "max_len": 40}


def test_twenty_ragged_steps_compile_once():
    """Lengths differ from micro-batch to micro-batch; after the first step nothing is compiled."""
    torch._dynamo.reset()
    counters.clear()
    eager = make_learner(**OPTIONS)
    compiled = make_learner(**OPTIONS, compile=True)
    graphs, lengths = [], set()
    for step in range(20):
        batch = with_advantages(make_samples(seed=step, longest=5 + step))
        lengths.add(int(batch.mask.sum()))
        mine, theirs = (
            learner.update(learner.compute_logprobs(batch)) for learner in (compiled, eager)
        )
        for name in ("policy/loss", "grad_norm", "policy/entropy"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-5), (step, name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(lengths) > 15
    assert graphs[0] > 0
    assert graphs[1] == graphs[-1]
