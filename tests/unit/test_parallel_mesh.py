import pytest
import torch
from helpers import run_ranks

from torchrft.config.job_config import Parallel
from torchrft.parallel import ParallelDims


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_all_ranks_shard_by_default(world_size):
    dims = ParallelDims.of(Parallel(), world_size)
    assert (dims.dp_shard, dims.dp, dims.world_size) == (world_size,) * 3
    assert ParallelDims.of(Parallel(dp_shard=world_size), world_size) == dims


@pytest.mark.parametrize(
    ("options", "world_size", "equation"),
    [
        ({"dp_shard": 3}, 4, "1 x 3 x 1 x 1 = 3 must be world_size = 4"),
        ({"dp_shard": 4}, 2, "1 x 4 x 1 x 1 = 4 must be world_size = 2"),
        ({"dp_replicate": 2, "dp_shard": 2, "sp_size": 2}, 4, "2 x 2 x 2 x 1 = 8 must be"),
        ({"tp_size": 2}, 3, "1 x 1 x 1 x 2 = 2 must be world_size = 3"),
        ({"sp_size": 4}, 2, "1 x 0 x 4 x 1 = 0 must be world_size = 2"),
    ],
)
def test_layouts_that_are_refused(options, world_size, equation):
    with pytest.raises(ValueError, match=equation):
        ParallelDims.of(Parallel(**options), world_size)


@pytest.mark.parametrize("sizes", [{"dp_shard": -1}, {"dp_shard": 0}, {"tp": -1, "sp": -2}])
def test_sizes_below_1_are_refused(sizes):
    with pytest.raises(ValueError, match=r"has sizes below 1; ParallelDims\.of\("):
        ParallelDims(**sizes)


def test_what_is_left_is_sharded():
    dims = ParallelDims.of(Parallel(tp_size=2, sp_size=3, dp_replicate=2), 24)
    assert (dims.dp_shard, dims.dp, dims.model_ranks, dims.world_size) == (2, 4, 6, 24)


def places(rank):
    dims = ParallelDims(dp_shard=2, tp=2)
    ranks = dims.data_ranks("cpu")
    total = ranks.sum({"rank": float(rank)}, "test")["rank"]
    tensor = ranks.sum_tensor(torch.tensor([float(rank)]))
    return ranks.rank, ranks.size, ranks.gather(rank), total, float(tensor)


def test_ranks_with_the_same_samples_have_the_same_place():
    """Ranks 0 and 1 share samples, 2 and 3 do; sums are over one rank of each pair."""
    assert run_ranks(places, 4) == [
        (0, 2, [0, 2], 2.0, 2.0),
        (0, 2, [1, 3], 4.0, 4.0),
        (1, 2, [0, 2], 2.0, 2.0),
        (1, 2, [1, 3], 4.0, 4.0),
    ]
