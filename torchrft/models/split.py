"""Heads on hidden states that several ranks hold: each computes a part, all get the whole."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from torchrft.models.logprobs import Vocabulary


def shared(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """`tensor`, equal on all ranks of `mesh`, each of which uses it for a part of the result: its
    gradient is summed over them."""
    if mesh is None or mesh.size() == 1:
        return tensor
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def part_of(count: int, mesh: DeviceMesh | None) -> slice:
    """This rank's part of `count` rows."""
    if mesh is None:
        return slice(0, count)
    rank, size = mesh.get_local_rank(), mesh.size()
    return slice(count * rank // size, count * (rank + 1) // size)


def joined(values: Tensor, rows: slice, count: int, mesh: DeviceMesh | None) -> Tensor:
    """All `count` rows on every rank, from each one's `values` of its `rows`."""
    if mesh is None or mesh.size() == 1:
        return values
    places = torch.arange(rows.start, rows.stop, device=values.device)
    mine = values.new_zeros(count).index_copy(0, places, values)
    parts = DTensor.from_local(mine, mesh, [Partial()], run_check=False)
    # A copy: FSDP2 warns of views among a module's outputs.
    return parts.redistribute(placements=[Replicate()]).to_local().clone()


def local_vocabulary(weight: Tensor) -> tuple[Tensor, Vocabulary | None]:
    """A head's weight [V, D]; if it is split over tensor-parallel ranks, this one's part and where
    in the vocabulary it lies."""
    if not isinstance(weight, DTensor):
        return weight, None
    mesh = weight.device_mesh
    # DTensor splits like torch.chunk: equal parts, the last ones smaller or empty.
    size = -(-weight.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * size, weight.shape[0])
    return weight.to_local(), Vocabulary(mesh.get_group(), start)
