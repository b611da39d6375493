"""Soft caps and sinks against the definition in float64, over padded and packed rows."""

import pytest
import torch

from torchrft.models.attention import Packed, padded
from torchrft.models.scores import Kernel, ScoreChange, attend_with_sinks

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.4
SEGMENTS = [(-1, 3), (0, 2), (1, 4), (0, 1), (-1, 5)]
CHANGES = {"sinks": (True, None), "cap": (False, 0.7), "both": (True, 0.7)}


def reference(query, key, value, mask, sinks, cap):
    """[N, H, D] of [N, H, D], one query and head at a time."""
    rows = []
    for n in range(len(query)):
        seen = mask[n].nonzero()[:, 0]
        for head in range(HEADS):
            kv = head * KV_HEADS // HEADS
            scores = SCALE * (key[seen, kv] @ query[n, head])
            if cap is not None:
                scores = cap * (scores / cap).tanh()
            weights = scores.exp()
            rest = 0 if sinks is None else sinks[head].exp()
            rows.append((weights @ value[seen, kv]) / (weights.sum() + rest))
    return torch.stack(rows).view(len(query), HEADS, DIM)


def causal(length, window):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


def tree_mask(segments, window):
    """Which positions of the row each one sees."""
    paths, row = [], 0
    size = sum(length for _, length in segments)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for parent, length in segments:
        before = [] if parent < 0 else paths[parent]
        paths.append([*before, *range(row, row + length)])
        row += length
        for place in range(len(before), len(paths[-1])):
            first = 0 if window is None else max(0, place - window + 1)
            mask[paths[-1][place], paths[-1][first : place + 1]] = True
    return mask


def inputs(rows, length, has_sinks):
    torch.manual_seed(0)
    sizes = [(rows, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
    sinks = torch.randn(HEADS, dtype=torch.float64) if has_sinks else None
    return [None if x is None else x.requires_grad_() for x in (*tensors, sinks)]


def gradients(out, tensors):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    return torch.autograd.grad((out * weights).sum(), [x for x in tensors if x is not None])


def compare(got, wanted, tensors):
    torch.testing.assert_close(got, wanted)
    for a, b in zip(gradients(got, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("kind", CHANGES)
def test_padded_rows(kind, window):
    has_sinks, cap = CHANGES[kind]
    query, key, value, sinks = tensors = inputs(2, 6, has_sinks)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    got = padded(0, *heads_first, SCALE, window, ScoreChange(sinks, cap))
    mask = causal(6, window)
    rows = [reference(query[i], key[i], value[i], mask, sinks, cap) for i in range(2)]
    compare(got, torch.stack(rows), tensors)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_tree_of_segments(kind, window):
    has_sinks, cap = CHANGES[kind]
    layout, mask = Packed.tree(SEGMENTS), tree_mask(SEGMENTS, window)
    query, key, value, sinks = tensors = inputs(1, len(mask), has_sinks)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    got = layout(0, *heads_first, SCALE, window, ScoreChange(sinks, cap))
    wanted = reference(query[0], key[0], value[0], mask, sinks, cap)
    compare(got, wanted[None], tensors)


def kernel(mask):
    """Flash attention's two passes, without its blocks."""

    def repeated(x):
        return x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1)  # [H, N, D]

    def scores(query, key):
        product = SCALE * query.transpose(0, 1) @ repeated(key).transpose(1, 2)
        return product.masked_fill(~mask, -torch.inf)

    def forward(query, key, value):
        s = scores(query, key)
        return (s.softmax(-1) @ repeated(value)).transpose(0, 1), s.logsumexp(-1)

    def backward(grad, query, key, value, out, lse):
        weights = (scores(query, key) - lse[..., None]).exp()
        grad, out = grad.transpose(0, 1), out.transpose(0, 1)
        delta = (grad * out).sum(-1, keepdim=True)
        inner = SCALE * weights * (grad @ repeated(value).transpose(1, 2) - delta)
        of_key, of_value = (
            inner.transpose(1, 2) @ query.transpose(0, 1),
            weights.transpose(1, 2) @ grad,
        )
        sums = (x.unflatten(0, (KV_HEADS, -1)).sum(1).transpose(0, 1) for x in (of_key, of_value))
        return (inner @ repeated(key)).transpose(0, 1), *sums

    return Kernel(forward, backward)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_by_a_kernel_that_knows_nothing_of_them(window):
    mask = tree_mask(SEGMENTS, window)
    query, key, value, sinks = inputs(1, len(mask), True)
    tensors = [x[0].detach().requires_grad_() for x in (query, key, value)] + [sinks]
    got = attend_with_sinks(kernel(mask), *tensors)
    compare(got, reference(*tensors[:3], mask, sinks, None), tensors)
