"""`deepspeed.zero`: contexts in which scripts make and touch sharded models."""

import contextlib
import enum
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from torchrft.deepspeed.whole import write


class ZeroParamStatus(enum.Enum):
    """Where a parameter of stage 3 is, in its attribute `ds_status`."""

    AVAILABLE = 1  # whole on this rank
    NOT_AVAILABLE = 2  # sharded
    INFLIGHT = 3


def mark_sharded(model: nn.Module) -> None:
    """Gives sharded parameters the attributes by which scripts recognize stage 3."""
    for index, parameter in enumerate(model.parameters()):
        marks = {"ds_id": index, "ds_shape": parameter.shape, "ds_numel": parameter.numel()}
        vars(parameter).update(marks, ds_tensor=parameter, ds_status=ZeroParamStatus.NOT_AVAILABLE)


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Does nothing: FSDP2 gathers a parameter with the layer that holds it."""


@contextlib.contextmanager
def Init(
    module: nn.Module | None = None,
    data_parallel_group: None = None,
    mem_efficient_linear: bool = True,
    remote_device: str | None = None,
    pin_memory: bool = False,
    config_dict_or_path: Any = None,
    config: Any = None,
    enabled: bool = True,
    dtype: torch.dtype | None = None,
    mpu: None = None,
) -> Iterator[None]:
    """Does nothing: in DeepSpeed it shards parameters as they are made, which saves host memory
    until `initialize`; here `initialize` shards them, with the same result."""
    if data_parallel_group is not None or mpu is not None:
        raise ValueError("zero.Init shards over all ranks: leave data_parallel_group and mpu out")
    yield


class _Gathered(DTensor):
    """A sharded parameter while its whole tensor stands in for it in every operation.

    The class of the very object is changed for a while, since scripts hold it: neither a module's
    attribute nor an optimizer's entry has to be replaced and found again.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        whole = tree_map(
            lambda value: value.__dict__["whole"] if type(value) is cls else value,
            (args, kwargs or {}),
        )
        return func(*whole[0], **whole[1])

    def __hash__(self) -> int:
        return id(self)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        return self.__dict__["whole"]


class GatheredParameters:
    """Within it, `params` are whole tensors on every rank; all ranks enter it.

    What rank `modifier_rank` has made of them is written back to the shards at the end, and stays.
    With None changes are forgotten in stage 3, and last until the next step in stages 1 and 2.
    Before `initialize` parameters are whole anyway; `modifier_rank` makes them equal on all ranks.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: None = None,
        enabled: bool = True,
    ) -> None:
        if fwd_module is not None:
            raise ValueError("GatheredParameters has no fwd_module: use each weight in its module")
        given = ([params] if isinstance(params, Tensor) else list(params)) if enabled else []
        self.params = list({id(parameter): parameter for parameter in given}.values())
        self.modifier_rank = modifier_rank

    def __enter__(self) -> None:
        self.shards = [p for p in self.params if type(p) is DTensor]
        for parameter in self.shards:
            whole = parameter.full_tensor().detach()
            parameter.__dict__["whole"] = nn.Parameter(whole, parameter.requires_grad)
            parameter.__class__ = _Gathered
            _set_status(parameter, ZeroParamStatus.AVAILABLE)

    @torch.no_grad()
    def __exit__(self, kind: Any, *rest: Any) -> None:
        wholes = {}
        for shard in self.shards:
            shard.__class__ = DTensor
            _set_status(shard, ZeroParamStatus.NOT_AVAILABLE)
            wholes[id(shard)] = shard.__dict__.pop("whole")
        if self.modifier_rank is None or kind is not None or not dist.is_initialized():
            return
        for parameter in self.params:
            whole: Tensor = wholes.get(id(parameter), parameter).detach().contiguous()
            dist.broadcast(whole, self.modifier_rank)
            write(parameter, whole)


def _set_status(parameter: Tensor, status: ZeroParamStatus) -> None:
    if "ds_status" in vars(parameter):
        vars(parameter)["ds_status"] = status
