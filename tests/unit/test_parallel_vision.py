"""Vision-language models spread over ranks: the steps of one process, images here and there."""

from functools import partial

import pytest
import tiny_vlm
import torch
from helpers import run_ranks
from test_models_vision import gradients
from tiny_policy import full_weights, make_learner, with_advantages

from torchrft import parallel
from torchrft.config.job_config import Parallel
from torchrft.models.policy import PolicyModel
from torchrft.parallel import ParallelDims, parallelize

PACKED = {"packing_samples": True, "max_tokens_per_microbatch": 60, "max_len": 60}
PADDED = {"packing_samples": False, "micro_train_batch_size": 2}
CHECKPOINTING = {"gradient_checkpointing": True}
# Of four ranks, the second has no image at all.
LAYOUTS = {
    "dp4": {},
    "padded dp4": PADDED,
    "dp2 sp2": {"sp_size": 2},
    "padded sp4": {"sp_size": 4} | PADDED | CHECKPOINTING,
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3} | CHECKPOINTING,
    "fsdp": {"fsdp": True, "fsdp_cpu_offload": True},
}
FROZEN = {"freeze_vision": True}
OPTIONS = {"init_kl_coef": 0.1, "train_batch_size": 16, "fused_linear_logprob": True}


def two_steps(rank, world_size, family, options):
    """Losses and gradient norms of two rollouts of 16 samples, and the weights at the end; of the
    first, which has no KL term, log-probs by sample and the gradients before clipping."""
    options = OPTIONS | PACKED | options
    learner, found = make_learner(1, world_size=world_size, vlm=family, **options), []
    ranks, first = learner.ranks, ({}, {})
    for seed, coef in enumerate((0.0, 0.1)):
        learner.kl_coef = coef
        batch = with_advantages(samples_of(family, seed))
        mine = [row for row in range(16) if int(batch.group[row]) % ranks.size == ranks.rank]
        batch, start = batch.select(mine), full_weights(learner)
        logprobs = learner.logprobs(learner.policy.model, batch)
        metrics = learner.update(learner.compute_logprobs(batch))
        found.append({name: metrics[name] for name in ("policy/loss", "grad_norm", "policy/kl")})
        after = full_weights(learner)
        if seed == 0:
            scale = max(1.0, metrics["grad_norm"])  # what it was divided by
            gradients = {name: (start[name] - weight) * scale for name, weight in after.items()}
            first = dict(zip(mine, logprobs, strict=True)), gradients
    return found, after, first


def samples_of(family, seed=0):
    return tiny_vlm.samples(tiny_vlm.vision(family), seed, (4, 4, 4, 4))


def transformers_step(family):
    """The same by transformers' own padded forward of all samples."""
    model, samples = tiny_vlm.model(family), samples_of(family)
    logprobs = tiny_vlm.reference(model, tiny_vlm.vision(family), samples)
    batch = with_advantages(samples)
    weighed = [
        (row[: len(own)] * own).sum() for row, own in zip(batch.advantages, logprobs, strict=True)
    ]
    (-torch.stack(weighed).sum() / batch.mask.sum()).backward()
    return [own.detach() for own in logprobs], gradients(dict(model.named_parameters()))


def all_layouts(rank, names):
    return {
        family: {name: two_steps(rank, 4, family, LAYOUTS[name]) for name in layouts}
        for family, layouts in names.items()
    }


# Between them: positions in three dimensions, windows, DeepStack and none of that.
@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        {"qwen3_vl": list(LAYOUTS)},
        {family: ["padded dp4", "dp2 sp2"] for family in ("qwen2_vl", "qwen2_5_vl", "llava")},
    ],
)
def test_every_layout_takes_the_same_steps(names):
    """Those of one rank; and the first has transformers' own log-probs and gradients."""
    ranks = run_ranks(all_layouts, 4, names, timeout=400)
    for family in names:
        alone, plain = two_steps(0, 1, family, {}), transformers_step(family)
        start = full_weights(make_learner(vlm=family))
        tower = [key for key in start if "visual" in key or "vision_tower" in key]
        assert any((alone[1][key] - start[key]).abs().max() > 1e-3 for key in tower)
        for layout, found in (item for rank in ranks for item in rank[family].items()):
            assert_same_steps(layout, found, alone)
            assert_same_as_transformers(layout, found[2], plain)
        for layout in names[family]:
            assert {row for rank in ranks for row in rank[family][layout][2][0]} == set(range(16))


def assert_same_steps(layout, found, alone):
    for step, (mine, theirs) in enumerate(zip(found[0], alone[0], strict=True)):
        for name, value in mine.items():
            what = (layout, step, name)
            assert value == pytest.approx(theirs[name], rel=2e-5, abs=2e-5), what
    assert found[1].keys() == alone[1].keys()
    for name, weight in found[1].items():
        torch.testing.assert_close(
            weight, alone[1][name], rtol=2e-5, atol=2e-5, msg=f"{layout}: {name}"
        )


def assert_same_as_transformers(layout, found, plain):
    for row, logprobs in found[0].items():
        own = logprobs[: len(plain[0][row])]
        torch.testing.assert_close(own, plain[0][row], rtol=1e-5, atol=1e-5, msg=layout)
    assert max(float(gradient.abs().max()) for gradient in plain[1].values()) > 0.05
    for name, gradient in plain[1].items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        own = found[1][f"model.{name}"]
        torch.testing.assert_close(own, gradient, rtol=0, atol=atol, msg=f"{layout}: {name}")


def test_freeze_vision_trains_the_language_model_only():
    """And what it trains takes the same step."""
    start, free = full_weights(make_learner(vlm="qwen2_5_vl")), two_steps(0, 1, "qwen2_5_vl", {})
    frozen = two_steps(0, 1, "qwen2_5_vl", {"freeze_vision": True, "max_norm": 1e9})
    for name, weight in frozen[1].items():
        assert torch.equal(weight, start[name]) == ("visual" in name), name
    assert any(not torch.equal(w, start[n]) for n, w in free[1].items() if "visual" in n)
    assert frozen[0][0]["policy/loss"] == pytest.approx(free[0][0]["policy/loss"], abs=1e-6)


def frozen_steps(rank):
    return two_steps(rank, 2, "qwen3_vl", FROZEN | {"zero_stage": 3})


def test_frozen_towers_on_two_ranks():
    alone = two_steps(0, 1, "qwen3_vl", FROZEN)
    for found in run_ranks(frozen_steps, 2):
        for name, weight in found[1].items():
            torch.testing.assert_close(weight, alone[1][name], rtol=2e-5, atol=2e-5, msg=name)


def compiled_steps(rank):
    parallel.apply_compile = partial(parallel.apply_compile, backend="aot_eager")
    return two_steps(rank, 1, "qwen2_vl", {"compile": True})


@pytest.mark.slow
def test_compiled_layers_take_the_same_steps():
    """Those of the language model: a tower loops over its images."""
    (found,) = run_ranks(compiled_steps, 1)
    alone = two_steps(0, 1, "qwen2_vl", {})
    for name, weight in found[1].items():
        torch.testing.assert_close(weight, alone[1][name], rtol=2e-5, atol=2e-5, msg=name)


def refused(rank):
    policy = PolicyModel(tiny_vlm.ours("qwen2_vl"))
    with pytest.raises(ValueError, match="tp_size = 2: Qwen2VLTextModel sees images"):
        parallelize(policy, ParallelDims(tp=2), Parallel(tp_size=2))


def test_tensor_parallelism_is_refused():
    run_ranks(refused, 2)
