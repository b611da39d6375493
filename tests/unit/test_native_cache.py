"""The slots of keys and values: growth, copies, moves, masks."""

import pytest
import torch

from torchrft.models.attention import padded
from torchrft.rollout.native.kv_cache import Decode, Prefill, SlotCache

HEADS, DIM = 2, 3


def prefill(rows, length, layers=2, offset=0):
    """A prefill whose key at (layer, row, head, token) tells where it is from."""
    made = Prefill()
    size = rows * HEADS * length * DIM
    for layer in range(layers):
        key = torch.arange(size, dtype=torch.float32).view(rows, HEADS, length, DIM)
        made.keys.append(key + 1000 * (layer + offset))
        made.values.append(-key - 1000 * (layer + offset))
    return made


def poison(monkeypatch):
    """Fresh memory holds NaN, so that a cell read before it is written shows."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *size, **kw: empty(self, *size, **kw).fill_(torch.nan),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growth_keeps_what_is_there_and_stops_at_the_limit(monkeypatch, dtype):
    poison(monkeypatch)
    prompts = prefill(2, 5)
    for tensors in (prompts.keys, prompts.values):
        tensors[:] = [tensor.to(dtype) for tensor in tensors]
    cache = SlotCache(3, limit=600)
    assert cache.capacity == 0
    cache.admit(torch.tensor([0, 1]), prompts, torch.tensor([1, 0]))
    assert cache.capacity == 256  # the smallest step
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    cache.reserve(256)
    assert cache.capacity == 256
    for length, capacity in ((257, 384), (385, 576), (577, 600)):
        cache.reserve(length)
        assert cache.capacity == capacity
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        assert new.shape == (3, HEADS, 600, DIM)
        assert torch.equal(new[:2, :, :5], old[:2, :, :5])
        # Only where float32 runs on a CPU may memory hold what was there before.
        fresh = torch.full_like(new[2], 0.0 if dtype == torch.bfloat16 else torch.nan)
        assert torch.equal(new[2].nan_to_num(7.0), fresh.nan_to_num(7.0))


def test_no_more_than_the_limit_from_the_start():
    cache = SlotCache(1, limit=10)
    cache.admit(torch.tensor([0]), prefill(1, 5), torch.tensor([0]))
    assert cache.capacity == 10


def test_admit_and_move(monkeypatch):
    poison(monkeypatch)
    prompts = prefill(3, 4)
    cache = SlotCache(4, limit=8)
    cache.admit(torch.tensor([0, 1, 2]), prompts, torch.tensor([1, 2, 0]))
    for layer in range(2):
        assert torch.equal(cache.keys[layer][1, :, :4], prompts.keys[layer][2])
        assert torch.equal(cache.values[layer][2, :, :4], prompts.values[layer][0])
    cache.move(torch.tensor([2, 1]), torch.tensor([0, 2]), 4)  # 2 is read before it is written
    for layer in range(2):
        assert torch.equal(cache.keys[layer][0, :, :4], prompts.keys[layer][0])
        assert torch.equal(cache.values[layer][2, :, :4], prompts.values[layer][2])


@pytest.mark.parametrize("window", [None, 2])
def test_prefill_keeps_each_prompts_keys(window):
    """Outputs are those of every prompt alone; keys and values lie in a row of their own."""
    draw, lengths = torch.Generator().manual_seed(0), [3, 1, 4]
    query, key, value = (
        torch.randn(1, heads, 8, DIM, generator=draw).double() for heads in (4, HEADS, HEADS)
    )
    layout = Prefill(lengths)
    out = layout(0, query, key, value, 0.4, window)
    for row, (start, end) in enumerate([(0, 3), (3, 4), (4, 8)]):
        alone = [x[:, :, start:end] for x in (query, key, value)]
        expected = padded(0, *alone, 0.4, window)
        torch.testing.assert_close(out[:, start:end], expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(layout.keys[0][row, :, : end - start], key[0, :, start:end])
        assert torch.equal(layout.values[0][row, :, : end - start], value[0, :, start:end])


def test_prefill_needs_a_layer_once():
    tensor = torch.zeros(1, HEADS, 2, DIM)
    layout = Prefill([2])
    layout(0, tensor, tensor, tensor, 1.0, None)
    with pytest.raises(ValueError, match="attention layer 0 a second time"):
        layout(0, tensor, tensor, tensor, 1.0, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_decode_against_a_loop(window, dtype):
    """Each slot's query sees its own tokens, the newest included, within the window."""
    torch.manual_seed(0)
    cache = SlotCache(3, limit=20)
    like = Prefill()
    like.keys = like.values = [torch.zeros(1, HEADS, 1, DIM, dtype=dtype)]
    cache.admit(torch.tensor([0]), like, torch.tensor([0]))
    cache.keys[0].normal_()
    cache.values[0].normal_()
    lengths = torch.tensor([5, 0])
    if dtype != torch.bfloat16:  # what is behind the end of a sequence is never read
        cache.keys[0][1, :, 1:] = cache.values[0][1, :, 1:] = torch.nan
    query = torch.randn(2, 4, 1, DIM, dtype=dtype)
    key, value = (torch.randn(2, HEADS, 1, DIM, dtype=dtype) for _ in range(2))
    keys, values = cache.keys[0].clone(), cache.values[0].clone()
    layout = Decode(cache, 2)
    layout.begin(lengths)
    out = layout(0, query, key, value, 0.4, window)
    assert out.shape == (2, 1, 4, DIM)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length], values[row, :, length] = key[row, :, 0], value[row, :, 0]
        first = 0 if window is None else max(0, length + 1 - window)
        seen = slice(first, length + 1)
        for head in range(4):
            mine = keys[row, head // 2, seen].double(), query[row, head, 0].double()
            weights = (0.4 * mine[0] @ mine[1]).softmax(0)
            expected = weights @ values[row, head // 2, seen].double()
            wide = {"rtol": 0.01, "atol": 0.01} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(out[row, 0, head], expected.to(dtype), **wide)
    for after, expected in ((cache.keys[0], keys), (cache.values[0], values)):
        torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)
