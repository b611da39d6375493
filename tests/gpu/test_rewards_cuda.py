"""Reward models on a GPU: packed attention in bfloat16, and weights that leave it."""

import pytest
import tiny_classifiers
import torch

from torchrft.config.job_config import Parallel
from torchrft.models.reward_model import load_reward_model
from torchrft.rewards.models import Batches
from torchrft.tools.distributed import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GROUPS = [[[5, 6, 7, 8], [5, 6, 9], [5, 6]], [[9, 10, 11, 12, 13]]]
SIZES = {"head_dim": 32, "hidden_size": 128}


def load(folder, dtype):
    return load_reward_model(folder, Parallel(), World(0, 1, 0, torch.device("cuda", 0)), dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_scores(dtype, tolerance, tmp_path):
    folder = tiny_classifiers.save(tmp_path, **SIZES)
    expected = tiny_classifiers.reference(folder, [s for group in GROUPS for s in group])
    found = Batches(load(folder, dtype), 4, offload=False)(GROUPS)
    assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)


def test_offloaded_weights_leave_the_gpu(tmp_path):
    folder = tiny_classifiers.save(tmp_path, **SIZES | {"intermediate_size": 4096})
    before = torch.cuda.memory_allocated()
    model = load(folder, torch.float32)
    kept = Batches(model, 4, offload=False)(GROUPS)
    resident = torch.cuda.memory_allocated() - before
    away = Batches(model, 4, offload=True)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    assert resident >= size
    for _ in range(2):
        assert torch.cuda.memory_allocated() - before < resident - 0.9 * size
        assert away(GROUPS) == kept
