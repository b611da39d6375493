"""ZeRO stages (arXiv:1910.02054) as settings of FSDP2."""

from dataclasses import dataclass

from torchrft.config.job_config import Parallel


@dataclass(frozen=True)
class Sharding:
    """FSDP2 always shards optimizer state; the rest is when things are gathered and reduced.

    `reshard_after_forward`: parameters are gathered again for the backward pass, so that they are
    sharded in between. `reduce_every_micro_batch`: gradients are reduced and sharded after each
    micro-batch rather than once per optimizer step.
    """

    reshard_after_forward: bool
    reduce_every_micro_batch: bool


def stage(number: int) -> Sharding:
    """Stage 0 keeps replicas, which the mesh says; for the rest it is like stage 1."""
    return Sharding(reshard_after_forward=number == 3, reduce_every_micro_batch=number >= 2)


def sharding(config: Parallel) -> Sharding:
    """Full sharding with `fsdp`, else that of `zero_stage`."""
    return stage(3 if config.fsdp else config.zero_stage)
