"""Vision-language models against transformers' own forward."""

import pytest
import tiny_vlm
import torch

from torchrft.learn.batch import make_batch
from torchrft.learn.packing import build
from torchrft.models.policy import PolicyModel

FAMILIES = tiny_vlm.FAMILIES


def gradients(model):
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.items()}
    for name in list(found):
        if name.endswith("embed_tokens.weight"):  # the two ids share what the reference splits
            found[name] = found[name].clone()
            found[name][tiny_vlm.IMAGE] += found[name][tiny_vlm.SAMPLED]
            found[name][tiny_vlm.SAMPLED] = 0
    return found


def encoded_images(model):
    """How many pictures each run of the tower gets, as it goes on."""
    counts = []
    tower = getattr(model.model, "visual", None) or model.model.vision_tower

    def count(module, args, kwargs):
        grid = kwargs.get("grid_thw")
        counts.append(len(args[0]) if grid is None else len(grid))

    tower.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_transformers(family, packed):
    vision, whole = tiny_vlm.vision(family), tiny_vlm.model(family)
    samples = tiny_vlm.samples(vision)
    policy = PolicyModel(tiny_vlm.ours(family))
    expected = tiny_vlm.reference(whole, vision, samples)
    weights = [
        torch.randn(len(part), generator=torch.Generator().manual_seed(7)) for part in expected
    ]
    sum((w * part).sum() for w, part in zip(weights, expected, strict=True)).backward()
    seen = encoded_images(policy.model)
    batch = make_batch(samples)
    found, passes = torch.zeros(batch.mask.shape), []
    # Mixed, with images only, without any, and with equal tokens under different images.
    for rows in ([0, 1, 2, 3], [7, 6, 5], [4]):
        micro = build(batch, rows, packed, vision)
        logprobs, _ = policy(micro)
        table = micro.scatter(logprobs)
        weight = torch.nn.utils.rnn.pad_sequence([weights[row] for row in rows], batch_first=True)
        (table[:, : weight.shape[1]] * weight).sum().backward()
        found[rows] = table.detach()
        passes.append(micro)
    for row, part in enumerate(expected):
        torch.testing.assert_close(found[row, : len(part)], part.detach(), atol=1e-5, rtol=1e-5)
    ours = gradients(dict(policy.model.named_parameters()))
    theirs = gradients(dict(whole.named_parameters()))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            ours[name], gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Once in a pass for all samples of a prompt: 1 + 3, and a small gray one where there is none.
    assert seen == [1, 3, 1]
    assert any(float(g.abs().max()) > 1e-3 for n, g in theirs.items() if "vis" in n)
