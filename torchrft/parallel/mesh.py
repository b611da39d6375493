"""How ranks are laid out."""

import math
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Self

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchrft.config.job_config import Parallel
from torchrft.tools.distributed import DataRanks, get_rank


@dataclass(frozen=True)
class ModelMesh:
    """The ranks that see the same samples, in meshes of one dimension: those that share a
    sequence, and with the tensor-parallel ones, all of them."""

    sp: DeviceMesh
    all: DeviceMesh


@dataclass(frozen=True)
class ParallelDims:
    """The sizes of the mesh, outermost first. Their product is the number of ranks.

    `dp_replicate` replicas are each sharded over `dp_shard` x `sp` ranks (FSDP2, HSDP); `sp` ranks
    share a sequence and `tp` ranks a layer, so that `sp` x `tp` ranks see the same samples.

    Raises ValueError for sizes below 1: only `ParallelDims.of` knows what -1 stands for.

    >>> ParallelDims(dp_shard=2, tp=2).world_size
    4
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if min(astuple(self)) < 1:
            raise ValueError(f"{self} has sizes below 1; ParallelDims.of(config, n) fills in -1")

    @classmethod
    def of(cls, config: Parallel, world_size: int) -> Self:
        """The layout of `world_size` ranks; dp_shard = -1 takes what the others leave.

        Raises ValueError, with the equation, for a layout that does not fill the ranks.
        """
        others = config.dp_replicate * config.sp_size * config.tp_size
        dp_shard = world_size // others if config.dp_shard == -1 else config.dp_shard
        sizes = (config.dp_replicate, dp_shard, config.sp_size, config.tp_size)
        if math.prod(sizes) != world_size:
            raise ValueError(
                f"dp_replicate x dp_shard x sp_size x tp_size = {' x '.join(map(str, sizes))} = "
                f"{math.prod(sizes)} must be world_size = {world_size}"
            )
        return cls(*sizes)

    @property
    def world_size(self) -> int:
        return self.dp * self.model_ranks

    @property
    def dp(self) -> int:
        """Parts that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_ranks(self) -> int:
        """Ranks that see the same samples."""
        return self.sp * self.tp

    def sharding_mesh(self, device_type: str) -> DeviceMesh:
        """Dimensions (dp_replicate, fsdp, tp), where fsdp = dp_shard x sp. Collective."""
        shape = (self.dp_replicate, self.dp_shard * self.sp, self.tp)
        return _mesh(device_type, shape, ("dp_replicate", "fsdp", "tp"), dist.group.WORLD)

    def model_mesh(self, device_type: str) -> ModelMesh:
        """The ranks that see the same samples as this one. Collective."""
        world = dist.group.WORLD
        split = _mesh(device_type, (self.dp, self.sp, self.tp), ("dp", "sp", "tp"), world)
        joint = _mesh(device_type, (self.dp, self.model_ranks), ("dp", "model"), world)
        return ModelMesh(split["sp"], joint["model"])

    def data_ranks(self, device_type: str) -> DataRanks:
        """This rank's place among those with other samples. Collective."""
        if self.model_ranks == 1:
            return DataRanks(get_rank(), self.dp, None)
        shape = (self.dp, self.model_ranks)
        mesh = _mesh(device_type, shape, ("dp", "model"), dist.group.WORLD)
        return DataRanks(mesh.get_local_rank("dp"), self.dp, mesh.get_group("dp"))


@lru_cache(maxsize=8)
def _mesh(
    device_type: str, shape: tuple[int, ...], names: tuple[str, ...], world: object
) -> DeviceMesh:
    # One mesh for all models of a process group (`world` is only a key): each makes new groups.
    return init_device_mesh(device_type, shape, mesh_dim_names=names)
