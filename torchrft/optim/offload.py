"""Optimizer state in host memory while the optimizer rests."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchrft.tools.logging import logger


class StateOffload:
    """Moves the state of `optimizer` between its device and pinned host memory, asynchronously.

    The tensors keep their identity: only their storage goes and comes back. Scalars stay. On a CPU
    the state is in host memory anyway and nothing moves, unless `device_type` says so (for tests).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device_type: str = "cuda") -> None:
        self.optimizer, self.device_type = optimizer, device_type
        self.host: dict[Tensor, Tensor] = {}  # local tensor -> its pinned copy
        self.away = False
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        if not any(True for _ in self._tensors()):
            logger.warning("adam_offload has nothing to move: the state is in host memory already")

    @torch.no_grad()  # so that to_local returns the tensor itself and no view
    def _tensors(self) -> Iterator[Tensor]:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim() > 0:
                    local = value.to_local() if isinstance(value, DTensor) else value
                    if local.device.type == self.device_type:
                        yield local

    def offload(self) -> None:
        """Copies the state to the host and frees its memory on the device."""
        if self.away:
            return
        self._fork()
        with torch.cuda.stream(self.stream):
            for tensor in self._tensors():
                host = self.host.get(tensor)
                if host is None:
                    host = self.host[tensor] = torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                    )
                host.copy_(tensor, non_blocking=True)
        # Freed once copied; the next user of the memory must not come before.
        self._join()
        for tensor in self._tensors():
            tensor.untyped_storage().resize_(0)
        self.away = True

    def prefetch(self) -> None:
        """Starts to bring the state back; what is computed meanwhile overlaps with it."""
        if not self.away:
            return
        for tensor in self._tensors():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
        self._fork()
        with torch.cuda.stream(self.stream):
            for tensor in self._tensors():
                tensor.copy_(self.host[tensor], non_blocking=True)
        self.away = False

    def wait(self) -> None:
        """Until the state is back; before the optimizer or a checkpoint uses it."""
        self.prefetch()
        self._join()

    def _fork(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def _join(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
