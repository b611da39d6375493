"""How ranks are laid out."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchrft.config.job_config import Parallel


@dataclass(frozen=True)
class ParallelDims:
    """The sizes of the mesh. Today there is one dimension, data parallelism with sharding."""

    dp_shard: int

    @classmethod
    def of(cls, config: Parallel, world_size: int) -> ParallelDims:
        """The layout of `world_size` ranks.

        Raises ValueError, with the equation, for a layout that does not fill the ranks.
        """
        other = config.tp_size * config.sp_size * config.dp_replicate
        dp_shard = world_size // other if config.dp_shard == -1 else config.dp_shard
        if dp_shard * other != world_size or other != 1:
            raise ValueError(
                f"dp_shard {dp_shard} x other dimensions {other} must be world_size {world_size}, "
                "and only dp_shard is available yet"
            )
        return cls(dp_shard)

    @property
    def world_size(self) -> int:
        return self.dp_shard

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_shard

    def mesh(self, device_type: str) -> DeviceMesh:
        """The mesh; needs an initialized process group."""
        return init_device_mesh(device_type, (self.dp_shard,), mesh_dim_names=("dp_shard",))
