"""The canary: marks that depend on every bit and its place, and faults that must be named."""

import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.rollout import canary as canary_module
from torchrft.rollout.canary import Canary, Held, Marks, Packed, WeightSyncError, fingerprint
from torchrft.rollout.weight_sync import copy_weights, named_full_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int8]


def signed(value, width):
    value %= 1 << width
    return value - (1 << width) if value >= 1 << (width - 1) else value


def odd(place):
    """A number for a place, in Python's integers."""
    mixed = signed((place + 1) * 6364136223846793005, 64)
    mixed = signed((mixed ^ (mixed >> 29)) * -7046029254386353131, 64)
    return mixed ^ (mixed >> 32) | 1


def reference(tensor):
    """The same sums in Python's integers."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    raw += bytes(-len(raw) % 4)
    numbers = [int.from_bytes(raw[i : i + 4], sys.byteorder) for i in range(0, len(raw), 4)]
    total = 0
    for row in range(0, len(numbers), 1024):
        products = (x * odd(i) for i, x in enumerate(numbers[row : row + 1024]))
        total += signed(sum(products), 32) * odd(row // 1024)
    return signed(total, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1024, 4096, 1 << 24])
def test_marks_are_the_weighted_sums_of_the_bits(dtype, group, monkeypatch):
    """Whether tensors are marked in blocks, or together with others."""
    monkeypatch.setattr(canary_module, "_GROUP", group)
    draw = torch.Generator().manual_seed(0)
    sizes = [1, 7, 5000, 0, 64, 65, 4096, 3]
    tensors = [(torch.randn(size, generator=draw) * 50).to(dtype) for size in sizes]
    expected = [reference(tensor) for tensor in tensors]
    assert Marks.of(tensors).result().tolist() == expected
    assert [int(fingerprint(tensor)) for tensor in tensors] == expected


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
        Packed(lambda: packed, 0, 2, 4),
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
