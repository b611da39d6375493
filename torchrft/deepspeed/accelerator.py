"""`deepspeed.accelerator`: this machine's devices under DeepSpeed's names."""

import contextlib
import os
import resource
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torchrft.deepspeed.comm import get_local_rank

_NOTHING = {
    *("set_device", "synchronize", "empty_cache", "range_push", "range_pop"),
    *("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"),
    *("current_stream", "default_stream"),
}
_MEMORY = {"memory_allocated", "memory_reserved", "memory_cached"}
_PEAK = {f"max_{name}" for name in _MEMORY}
_RANDOM = {"get_rng_state", "set_rng_state", "initial_seed"}


class Accelerator:
    """The GPU where there is one, else the CPU.

    What is not written here is torch.cuda's function of that name. On a CPU, functions that order
    or clean up a device do nothing, and memory is the process's resident memory in bytes.
    """

    def __init__(self) -> None:
        self.has_gpu = torch.cuda.is_available()
        self._name = "cuda" if self.has_gpu else "cpu"

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Tensor"):
            return getattr(torch.cuda if self.has_gpu else torch, name)
        if self.has_gpu:
            return getattr(torch.cuda, name)
        if name in _NOTHING:
            return lambda *args, **kwargs: None
        if name in _MEMORY:
            return lambda *args: _resident_bytes()
        if name in _PEAK:
            return lambda *args: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if name in ("Stream", "Event"):
            return None
        if name == "stream":
            return contextlib.nullcontext
        if name in _RANDOM:
            return lambda *args: getattr(torch.random, name)(*args[:1])
        raise AttributeError(f"the accelerator {self._name!r} has no attribute {name!r}")

    def device_name(self, device_index: int | None = None) -> str:
        """A name that torch.device takes: "cpu", "cuda" or "cuda:1"."""
        index = "" if device_index is None or not self.has_gpu else f":{device_index}"
        return self._name + index

    def device(self, device_index: int | None = None) -> Any:
        """A context within which the device is the current one."""
        return torch.cuda.device(device_index) if self.has_gpu else contextlib.nullcontext()

    def current_device(self) -> int:
        return torch.cuda.current_device() if self.has_gpu else get_local_rank()

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """GPUs of this machine; on a CPU the ranks of this machine."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return torch.cuda.device_count() if self.has_gpu else local

    def is_available(self) -> bool:
        return True

    def communication_backend_name(self) -> str:
        return "nccl" if self.has_gpu else "gloo"

    def manual_seed(self, seed: int) -> Any:
        return torch.cuda.manual_seed(seed) if self.has_gpu else torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        return torch.cuda.manual_seed_all(seed) if self.has_gpu else torch.manual_seed(seed)

    def random(self) -> Any:
        return torch.random

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device."""
        if self.has_gpu:
            return torch.cuda.get_device_properties(device_index).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def available_memory(self, device_index: int | None = None) -> int:
        """Free bytes of the device."""
        if self.has_gpu:
            return torch.cuda.mem_get_info(device_index)[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported() if self.has_gpu else True

    def is_fp16_supported(self) -> bool:
        """False: `initialize` refuses fp16."""
        return False

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._name

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        return tensor.pin_memory() if self.has_gpu else tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned() if self.has_gpu else False

    def is_synchronized_device(self) -> bool:
        return not self.has_gpu


@cache
def get_accelerator() -> Accelerator:
    """The one accelerator of this process."""
    return Accelerator()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
