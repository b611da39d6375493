"""Start torch.distributed, and the few collectives on plain Python values that torchrft needs.

Every helper works on the default group, does nothing at world size 1, and waits no longer than
the group's timeout: past it, `TimeoutError` names the phase, the rank that waited and those that
did not come. A rank that died shows as `ConnectionError`.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from torchrft.tools import lock
from torchrft.tools.signals import Abandoned

T = TypeVar("T")

_STORE_SECONDS = 10.0  # in which the store must say where the other ranks are
_started_here = False
_store: dist.Store | None = None  # of the group that `setup` made
_waits = 0  # of this rank, so far


class RankError(RuntimeError):
    """Another rank failed, and said why."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of the job.

    >>> World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")).is_main
    True
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class DataRanks:
    """This rank's place among those that see other samples: `rank` of `size`.

    Ranks that share samples (tensor and sequence parallelism) have the same place. `group` None
    means all ranks.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def all(cls) -> Self:
        """Every rank has samples of its own."""
        return cls(get_rank(), get_world_size())

    def sum(self, values: Mapping[str, float], phase: str) -> dict[str, float]:
        """Sums over `size` ranks, in float64. All must pass the same keys."""
        return _all_reduce(values, dist.ReduceOp.SUM, phase, self.group)

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, in float64, on the tensor's device."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to("cpu", torch.float64)
        with _waiting("sum over ranks"):
            dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def gather(self, value: T, phase: str = "gather") -> list[T]:
        """The `value` of each of the ranks, in their order. Values must be picklable."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with _waiting(phase):
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def setup(timeout_seconds: float = 1800.0) -> World:
    """Join the process group that torchrun describes, or make one of a single process.

    A group that exists already is used as it is. CPU tensors always travel by gloo, CUDA tensors by
    nccl, so that objects and metrics need no GPU memory.
    """
    global _started_here, _store, _waits
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
        _waits = 0
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            # A store inside the process needs no port, so such jobs run side by side.
            _store, rank, ranks = dist.HashStore(), 0, 1
        elif (socket := os.environ.pop("TORCHRFT_STORE", None)) is not None:  # launch.py's
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            listens = int(socket) if rank == 0 else None
            _store = dist.TCPStore(
                *where, ranks, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listens
            )
            if rank == 0:  # for other hosts' launchers
                _store.set("torchrft/job", os.environ.get("RDZV_ID", ""))
        else:
            _store, _, _ = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=_store, rank=rank, world_size=ranks, timeout=timeout)
        _started_here = True
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def teardown() -> None:
    """Leave the process group, if `setup` made it, and the folders that this process holds."""
    global _started_here, _store
    lock.release()
    if _started_here and dist.is_initialized():
        dist.destroy_process_group()
    _started_here, _store = False, None


def get_rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes what is written once."""
    return get_rank() == 0


@contextmanager
def _waiting(phase: str) -> Iterator[None]:
    global _waits
    _waits += 1
    try:
        if _store is not None:
            _store.set(f"torchrft/at/{get_rank()}", f"{_waits} {phase}")
        yield
    except RuntimeError as error:
        raise peer_error(error, phase) from error


def peer_error(error: RuntimeError, phase: str) -> OSError:
    """What a collective's `error` says of the other ranks, as TimeoutError or ConnectionError."""
    text = str(error)  # gloo and nccl raise nothing more specific
    timed_out = "imed out" in text or "imeout" in text
    kind, what = (TimeoutError, "waited too long for") if timed_out else (ConnectionError, "lost")
    where = f"rank {get_rank()} of {get_world_size()} {what} the other ranks in phase {phase!r}"
    late: list[str] = []
    if timed_out and _store is not None:
        # In a thread, since a store whose rank hangs answers nothing, without a deadline.
        asking = threading.Thread(target=_ask_who_is_late, args=(_store, late), daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)
    missing = "".join(f"; {one}" for one in late)
    return kind(
        f"{where}{missing}; look at their logs for the first error ({text.splitlines()[0]})"
    )


def _ask_who_is_late(store: dist.Store, late: list[str]) -> None:
    """Adds a sentence for each rank that has waited less often than this one."""
    for rank in range(get_world_size()):
        key = f"torchrft/at/{rank}"
        with suppress(RuntimeError):  # rank 0, whose store it is, has ended meanwhile
            seen = store.get(key).decode() if store.check([key]) else "0 the start"
            count, _, phase = seen.partition(" ")
            if int(count) < _waits:
                late.append(f"rank {rank} is missing, and was last seen in phase {phase!r}")


def comes_from_a_collective(error: RuntimeError) -> bool:
    """Whether gloo or nccl raised `error`, inside of FSDP2 or DTensor for example."""
    words = ("gloo", "Connection closed by peer", "NCCL", "ProcessGroup", "Connection reset")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _all_reduce(
    values: Mapping[str, float], op: Any, phase: str, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    if get_world_size() == 1:
        return dict(values)
    # Sorted, because the ranks may have filled their dicts in different orders.
    names = sorted(values)
    packed = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    with _waiting(phase):
        dist.all_reduce(packed, op, group=group)
    reduced = dict(zip(names, packed.tolist(), strict=True))
    return {name: reduced[name] for name in values}


def all_reduce_max(values: Mapping[str, float], phase: str = "all_reduce_max") -> dict[str, float]:
    """Maxima over ranks, in one float64 collective. All ranks must pass the same keys."""
    return _all_reduce(values, dist.ReduceOp.MAX, phase)


def any_rank(flag: bool, phase: str = "any_rank") -> bool:
    """Whether `flag` is true on at least one rank."""
    return bool(all_reduce_max({"flag": float(flag)}, phase)["flag"])


def barrier(phase: str = "barrier") -> None:
    """Wait until every rank is here."""
    # A gloo reduction: dist.barrier would take the GPU of a mixed group and not time out.
    _all_reduce({"here": 0.0}, dist.ReduceOp.SUM, phase)


class Agreement:
    """Finds out whether all ranks have come to the same place, past faults of their own.

    On a group of its own, since a rank may still wait in a collective of the others. Make it on all
    ranks together.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if get_world_size() > 1 else None

    def on(self, value: Any, seconds: float) -> bool:
        """Whether all ranks call this within `seconds` of each other, with equal values."""
        if self.group is None:
            return True
        values: list[Any] = [None] * get_world_size()
        try:
            dist.monitored_barrier(self.group, timedelta(seconds=seconds))
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError:  # a rank is gone, or waits elsewhere
            return False
        return all(other == value for other in values)


def on_main(function: Callable[[], T], phase: str) -> T:
    """Run `function` on rank 0 alone and return its result on every rank.

    Raises:
        Exception: on rank 0 what `function` raised, on the others RankError with its text; so a
            full disk on rank 0 ends the job instead of leaving the others waiting.
    """
    return on_all(function if is_main() else lambda: cast(T, None), phase)[0]


def on_all(function: Callable[[], T], phase: str) -> list[T]:
    """Run `function` on every rank and return all results, in rank order, on every rank.

    Raises:
        Exception: what `function` raised here, or RankError naming the rank where it failed.
    """
    if get_world_size() == 1:
        return [function()]
    raised: BaseException | None = None
    failure, value = None, None
    try:
        value = function()
    except (Exception, Abandoned) as error:
        raised, failure = error, f"{type(error).__name__}: {error}"
    outcomes = DataRanks.all().gather((failure, value), phase)
    if raised is not None:
        raise raised
    for rank, (failure, _) in enumerate(outcomes):
        if failure is not None:
            raise RankError(f"rank {rank} failed in phase {phase!r}: {failure}")
    return [cast(T, value) for _, value in outcomes]
