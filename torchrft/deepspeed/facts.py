"""What scripts ask the engine, and what they set on it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from torchrft.deepspeed.config import Settings, offloads
from torchrft.optim.offload import StateOffload


class TputTimer:
    """The engine's `tput_timer`: counts optimizer steps; nothing is timed or logged here."""

    def __init__(self) -> None:
        self.epoch_count = self.global_step_count = 0

    def start(self) -> None:
        """Does nothing."""

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        self.global_step_count += int(global_step)

    def update_epoch_count(self) -> None:
        self.epoch_count += 1


class Facts:
    """The engine's methods that train nothing."""

    settings: Settings
    device: torch.device
    world_size: int
    global_rank: int
    optimizer: torch.optim.Optimizer | None
    grad_norm: float | None
    _step_applied: bool

    def gradient_accumulation_steps(self) -> int:
        return self.settings.accumulation

    def train_batch_size(self) -> int:
        return self.settings.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.settings.micro_batch_size

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the number of micro-batches of a step."""
        micro = self.settings.micro_batch_size * self.world_size
        if train_batch_size < 1 or train_batch_size % micro:
            raise ValueError(
                f"train_batch_size = {train_batch_size} must be a multiple of "
                f"train_micro_batch_size_per_gpu x ranks = {micro}"
            )
        self.settings.train_batch_size = train_batch_size
        self.settings.accumulation = train_batch_size // micro

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the samples of a micro-batch; the number of micro-batches stays."""
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size = {micro_batch_size} must be above 0")
        self.settings.micro_batch_size = micro_batch_size
        self.settings.train_batch_size = (
            micro_batch_size * self.settings.accumulation * self.world_size
        )

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Sampler[int] | None = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """A loader of this rank's micro-batches, in random order with route "train".

        Its options are DataLoader's under DeepSpeed's names; it has no worker processes by itself.
        """
        sampler = data_sampler or DistributedSampler(dataset, shuffle=route == "train")
        return DataLoader(
            dataset,
            batch_size or self.settings.micro_batch_size,
            sampler=sampler,
            num_workers=num_local_io_workers or 0,
            collate_fn=collate_fn,
            drop_last=self.settings.get("dataloader_drop_last", False),
        )

    def get_batch_info(self) -> tuple[int, int, int]:
        """Train batch size, micro-batch size and micro-batches of a step."""
        settings = self.settings
        return settings.train_batch_size, settings.micro_batch_size, settings.accumulation

    @property
    def dp_world_size(self) -> int:
        return self.world_size

    @property
    def mp_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return self.global_rank

    def managed_gradient_accumulation(self) -> bool:
        return bool(self.settings.get("managed_gradient_accumulation", True))

    def zero_optimization_stage(self) -> int:
        return int(self.settings.get("zero_optimization.stage", 0))

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() >= 3

    def zero_cpu_offload(self) -> bool:
        return offloads(self.settings)

    def loss_scale(self) -> float:
        """1: there is no loss scaling, since fp16 is refused."""
        return 1.0

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def bfloat16_enabled(self) -> bool:
        return any(self.settings.get(f"{name}.enabled", False) for name in ("bf16", "bfloat16"))

    def fp16_enabled(self) -> bool:
        return False

    def torch_autocast_enabled(self) -> bool:
        return bool(self.settings.get("torch_autocast.enabled", False))

    def gradient_clipping(self) -> float:
        """Largest gradient norm: DeepSpeed clips at 1 unless told otherwise; 0 clips nothing."""
        return float(self.settings.get("gradient_clipping", 1.0))

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, over all ranks, before clipping."""
        return self.grad_norm

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        return self._step_applied

    def get_lr(self) -> list[float]:
        return [float(rate) for rate in self._of_groups("lr")]

    def get_mom(self) -> list[Any]:
        """Adam's betas, or the momentum, of every parameter group."""
        return self._of_groups("betas") or self._of_groups("momentum")

    def set_lr(self, lr: float) -> None:
        """Of every parameter group, until a schedule sets it again."""
        for group in self._groups():
            group["lr"] = lr

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def _of_groups(self, name: str) -> list[Any]:
        return [group[name] for group in self._groups() if name in group]

    # ---------------------------------------------------------------- memory

    def offload_states(
        self,
        include: Any = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves the optimizer's state to the host until `reload_states`, or the next step.

        Weights and gradients stay. Raises ValueError for a device that is not the CPU, and where
        `include` names none of the optimizer's state.
        """
        names = {getattr(name, "value", name) for name in include or ["optim_states"]}
        target = getattr(device, "value", device)
        if target != "cpu" or "optim_states" not in names:
            raise ValueError(
                f"offload_states(include={sorted(names)}, device={target!r}) is not supported: it "
                'moves "optim_states" to "cpu"'
            )
        if self.optimizer is not None and self.device.type == "cuda":
            self._offload = StateOffload(self.optimizer)
            self._offload.offload()

    def reload_states(self, non_blocking: bool = False) -> None:
        """Brings back what `offload_states` moved."""
        offload = self.__dict__.pop("_offload", None)
        if offload is not None:
            offload.prefetch()
            offload.wait()
