"""The variable-length CUDA kernel against the path that CPUs take."""

import pytest
import torch

from torchrft.models.attention import Packed
from torchrft.models.scores import ScoreChange

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = {
    "plain packing": Packed.of([(70, []), (1, []), (33, [])]),
    "shared prefixes": Packed.of([(40, [30, 1, 0, 65]), (3, [128, 5]), (20, [])]),
    "groups of one": Packed.of([(129, [64]), (1, [7])]),
    "a tree": Packed.tree([(-1, 40), (0, 3), (1, 70), (1, 1), (3, 9), (0, 65), (-1, 5), (6, 2)]),
}


def run(layout, tensors, window, weights):
    """With a fourth tensor, sinks."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    change = [ScoreChange(sinks) for sinks in tensors[3:]]
    out = layout(0, *tensors[:3], 0.2, window, *change)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("window", [None, 16, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_kernel_equals_the_dense_path(layout, window, kv_heads, dtype, has_sinks):
    """Values and gradients, up to the rounding of 16-bit numbers."""
    torch.manual_seed(0)
    length = layout.positions.numel()
    exact = [torch.randn(1, heads, length, 64).to(dtype) for heads in (8, kv_heads, kv_heads)]
    exact += [torch.randn(8).to(dtype)] * has_sinks
    weights = torch.randn(1, length, 8, 64).to(dtype)
    wanted = run(layout, [x.double() for x in exact], window, weights.double())
    device = torch.device("cuda")
    got = run(layout.to(device), [x.to(device) for x in exact], window, weights.to(device))
    precision = torch.finfo(dtype).eps
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        difference = a.double().cpu() - b
        assert difference.norm() < 2 * precision * b.norm()
        assert difference.abs().max() < 8 * precision * b.abs().max()


def test_float32_takes_the_dense_path():
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, 17, 32) for heads in (4, 2, 2)]
    weights = torch.randn(1, 17, 4, 32)
    layout = Packed.of([(4, [3, 5]), (5, [])])
    wanted = run(layout, [x.double() for x in exact], 3, weights.double())
    got = run(layout.to(torch.device("cuda")), [x.cuda() for x in exact], 3, weights.cuda())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5)
