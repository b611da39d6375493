"""The canary: marks that depend on every bit and its place, and faults that must be named."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.rollout import canary as canary_module
from torchrft.rollout.canary import Canary, Held, Packed, WeightSyncError, fingerprint
from torchrft.rollout.weight_sync import copy_weights, named_full_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int8]


def reference(tensor, block):
    """The same sum in Python's integers."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(-1).view(size)
    if size == torch.int16 and bits.numel() % 2 == 0:
        bits = bits.view(torch.int32)
    width = 8 * bits.element_size()

    def wrap(value, width):
        value %= 1 << width
        return value - (1 << width) if value >= 1 << (width - 1) else value

    weights = canary_module._weights(torch.device("cpu")).tolist()
    total = 0
    width = max(width, 32)  # integers of one or two bytes are promoted to the weights' four
    numbers = bits.tolist()
    for start in range(0, len(numbers), block):
        part = sum(x * w for x, w in zip(numbers[start : start + block], weights, strict=False))
        total = wrap((total * 6364136223846793005 if start else 0) + wrap(part, width), 64)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 65])
def test_fingerprint_is_the_weighted_sum_of_the_bits(dtype, size, monkeypatch):
    monkeypatch.setattr(canary_module, "_BLOCK", 16)
    monkeypatch.setattr(canary_module, "_weights_of", {})
    tensor = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 50).to(dtype)
    assert int(fingerprint(tensor)) == reference(tensor, 16)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(0, 31), st.integers(1, 999))
def test_every_bit_and_every_place_counts(place, bit, shift):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mark = int(fingerprint(tensor))
    flipped = tensor.clone()
    flipped.view(torch.int32)[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert int(fingerprint(flipped)) != mark
    assert int(fingerprint(tensor.roll(shift))) != mark
    assert int(fingerprint(tensor.clone())) == mark


def test_layout_in_memory_does_not_count():
    tensor = torch.randn(6, 8)
    assert int(fingerprint(tensor.T.contiguous().T)) == int(fingerprint(tensor))
    assert int(fingerprint(tensor.T)) != int(fingerprint(tensor))
    half = tensor.bfloat16()
    assert int(fingerprint(half.view(-1)[1:3])) == int(fingerprint(half.view(-1)[1:3].clone()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["stale", "permuted", "dropped"])
def test_a_fault_in_the_native_engines_copy_is_named(tied, kind, monkeypatch):
    sent = tiny.model("qwen2", seed=1, tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in sent.parameters():  # norms of ones are the same in any order
            parameter.add_(0.1 * torch.randn_like(parameter))
    watch = Canary.watch
    for wrong in dict(sent.named_parameters()):

        def faulty(self, pairs, wrong=wrong):
            for name, tensor in watch(self, pairs):
                if name != wrong:
                    yield name, tensor
                elif kind == "permuted":
                    yield name, tensor.flip(0)
                elif kind == "stale":
                    yield name, tensor - 1e-6

        monkeypatch.setattr(Canary, "watch", faulty)
        held = tiny.model("qwen2", seed=2, tie_word_embeddings=tied)
        for parameter in held.parameters():
            parameter.requires_grad_(False).add_(0.5)
        with pytest.raises(WeightSyncError, match=rf'does not hold "{wrong}".*\(1 of \d+ tensors'):
            copy_weights(held, named_full_tensors(sent))
    monkeypatch.setattr(Canary, "watch", watch)
    copy_weights(held, named_full_tensors(sent))


def test_a_part_and_a_packed_layer():
    full = torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(full)
    rows, columns, packed = full[4:7].clone(), full[:, 1:3].clone().bfloat16(), full[2:6].clone()
    places = [
        Held(lambda: rows, 0, 4, 3),
        Held(lambda: columns, 1, 1, 2),
        Packed(lambda x: x @ packed.T, 0, 2, 4, inputs=5),
    ]
    for wrong in (None, rows, columns, packed):
        if wrong is not None:
            wrong[1, 1] += 0.05
        canary = Canary(model, lambda name: places)
        assert [name for name, _ in canary.watch([("weight", full)])] == ["weight"]
        if wrong is None:
            canary.check()
            continue
        with pytest.raises(WeightSyncError, match=r'"weight".*\(1 of 3 tensors'):
            canary.check()
        wrong[1, 1] -= 0.05
        wrong.copy_(full[4:7] if wrong is rows else full[:, 1:3] if wrong is columns else full[2:6])


def test_nothing_to_read_back_is_no_fault():
    model = torch.nn.Linear(2, 2)
    canary = Canary(model, lambda name: [])
    assert len(list(canary.watch(named_full_tensors(model)))) == 2
    canary.check()
