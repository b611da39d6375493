import pytest

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
        ({"dp_shard": 3}, 4, "dp_shard 3 x other dimensions 1 must be world_size 4"),
        ({"dp_shard": 4}, 2, "dp_shard 4 x other dimensions 1 must be world_size 2"),
        ({"tp_size": 2}, 4, "dp_shard 2 x other dimensions 2 must be world_size 4, and only"),
        ({"sp_size": 2}, 2, "dp_shard 1 x other dimensions 2 must be world_size 2, and only"),
        ({"dp_replicate": 2, "dp_shard": 2}, 4, "dp_shard 2 x other dimensions 2 must be"),
        ({"tp_size": 2}, 3, "dp_shard 1 x other dimensions 2 must be world_size 3"),
    ],
)
def test_layouts_that_are_refused(options, world_size, equation):
    with pytest.raises(ValueError, match=equation):
        ParallelDims.of(Parallel(**options), world_size)
