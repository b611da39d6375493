"""DeepSpeed's `initialize` and engine, on FSDP2: `from torchrft.parallel import deepspeed`.

ZeRO stages (arXiv:1910.02054) become the equivalent sharding, see `zero.py`; what becomes of every
key of the configuration is in `config/deepspeed_keys.toml`. No code of DeepSpeed is used or needed.

>>> engine, optimizer, _, _ = initialize(model=model, config="ds.json")      # doctest: +SKIP
>>> for batch in data:                                                       # doctest: +SKIP
...     engine.backward(loss(engine(batch)))
...     engine.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from torchrft.parallel.deepspeed_config import Settings, offloads, read
from torchrft.parallel.deepspeed_schedules import Schedule
from torchrft.parallel.fsdp import apply_fsdp, set_gradient_sync
from torchrft.tools import distributed
from torchrft.tools.logging import logger

Config = Mapping[str, Any] | str | Path


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Config | None = None,
    mesh_param: Any = None,
    config_params: Config | None = None,
) -> tuple[DeepSpeedEngine, torch.optim.Optimizer | None, DataLoader[Any] | None, Any]:
    """(engine, optimizer, data loader, schedule), as `deepspeed.initialize`.

    `model` is sharded in place. An optimizer is the config's, or yours: an instance without state,
    or a function of the parameters. `lr_scheduler` is an object or a function of the optimizer.
    Raises ValueError for a config that `deepspeed_config.read` refuses, or what is missing.
    """
    chosen = config or config_params or getattr(args, "deepspeed_config", None)
    if model is None or chosen is None:
        raise ValueError("initialize needs model=... and config=...")
    if mpu is not None or mesh_param is not None:
        raise ValueError("mpu and mesh_param are not supported: use torchrft.parallel.parallelize")
    world = distributed.setup()
    settings = read(chosen, world.world_size)
    engine = DeepSpeedEngine(model, settings, world.device)
    engine.optimizer = engine.make_optimizer(optimizer, model_parameters)
    engine.lr_scheduler = engine.make_schedule(lr_scheduler)
    loader = None
    if training_data is not None:
        drop_last = bool(settings.get("dataloader_drop_last", False))
        loader = DataLoader(
            training_data,
            batch_size=settings.micro_batch_size,
            sampler=DistributedSampler(training_data, drop_last=drop_last),
            collate_fn=collate_fn,
            drop_last=drop_last,
        )
    return engine, engine.optimizer, loader, engine.lr_scheduler


class DeepSpeedEngine(nn.Module):
    """A sharded model with its optimizer and schedule; use `initialize`."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device) -> None:
        super().__init__()
        self.settings, self.device = settings, device
        self.local_rank = device.index or 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: Any = None
        self.micro_steps = self.global_steps = self.skipped_steps = 0
        self.grad_norm: float | None = None
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        bf16 = settings.get("bf16.enabled", False) or settings.get("bfloat16.enabled", False)
        dtype = torch.bfloat16 if bf16 else torch.float32
        mesh = settings.dims.sharding_mesh(device.type)["dp_replicate", "fsdp"]
        apply_fsdp(model.to(device), mesh, settings.sharding, dtype, offloads(settings))
        self.module = model

    # ---------------------------------------------------------------- making

    def make_optimizer(self, given: Any, parameters: Iterable[Any] | None) -> Any:
        """The given optimizer on the sharded parameters, or the config's."""
        if isinstance(given, torch.optim.Optimizer):
            if given.state:
                raise ValueError("initialize needs an optimizer that has not made a step yet")
            for group in given.param_groups:
                group["params"] = [self._sharded(parameter) for parameter in group["params"]]
            return given
        groups = self._groups(parameters)
        if given is not None:
            return given(groups)
        kind = self.settings.get("optimizer.type")
        if kind is None:
            return None
        options = self.settings.section("optimizer.params")
        decoupled = kind.lower() == "adamw" or options.get("adam_w_mode", True)
        # As DeepSpeed: its own kernels do not decay by default, torch's AdamW does.
        decay = 0.01 if options.get("torch_adam", False) and decoupled else 0.0
        taken = {k: v for k, v in options.items() if k in ("lr", "eps", "amsgrad")}
        make = torch.optim.AdamW if decoupled else torch.optim.Adam
        return make(
            groups,
            betas=tuple(options.get("betas", (0.9, 0.999))),
            weight_decay=options.get("weight_decay", decay),
            **taken,
        )

    def make_schedule(self, given: Any) -> Any:
        """The given schedule, or the config's."""
        if given is not None:
            return given(self.optimizer) if callable(given) else given
        kind = self.settings.get("scheduler.type")
        if kind is None:
            return None
        if self.optimizer is None:
            raise ValueError(f'scheduler.type = "{kind}" needs an optimizer')
        return Schedule(self.optimizer, kind, self.settings.section("scheduler.params"))

    def _groups(self, given: Iterable[Any] | None) -> list[Any]:
        if given is None:
            return [p for p in self.module.parameters() if p.requires_grad]
        return [
            {**item, "params": [self._sharded(p) for p in item["params"]]}
            if isinstance(item, dict)
            else self._sharded(item)
            for item in given
        ]

    def _sharded(self, parameter: Tensor) -> nn.Parameter:
        """The parameter that took the place of one of the model's."""
        name = self.names.get(id(parameter))
        if name is None:
            raise ValueError("initialize was given a parameter that is not the model's")
        return self.module.get_parameter(name)

    # ---------------------------------------------------------------- training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        context: Any = contextlib.nullcontext()
        if self.settings.get("torch_autocast.enabled", False):
            context = torch.autocast(self.device.type, torch.bfloat16)
        with context:
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> Tensor:
        """Gradients of `loss`, a mean over this rank's micro-batch; ranks are averaged."""
        boundary = self.is_gradient_accumulation_boundary()
        set_gradient_sync(self.module, boundary or self.settings.sharding.reduce_every_micro_batch)
        scaled = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss
        if self.settings.get("gradient_allreduce_op", "mean") == "sum":
            scaled = scaled * distributed.get_world_size()
        scaled.backward()
        return scaled

    def step(self) -> None:
        """Trains on what was accumulated, once a whole batch has been seen."""
        if self.optimizer is None:
            raise ValueError("the engine has no optimizer: set the section optimizer, or pass one")
        if self.is_gradient_accumulation_boundary():
            self._take_step(self.optimizer)
        self.micro_steps += 1

    def _take_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.grad_norm = float(norm)
        if bool(norm.isfinite()):
            if limit := self.settings.get("gradient_clipping", 0.0):
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            optimizer.step()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        else:
            self.skipped_steps += 1
        optimizer.zero_grad(set_to_none=True)
        self.global_steps += 1
        every = self.settings.get("steps_per_print")
        if every and self.global_steps % every == 0:
            logger.info(
                "step=%d, skipped=%d, lr=%s", self.global_steps, self.skipped_steps, self.get_lr()
            )

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` updates the weights."""
        if self.settings.get("managed_gradient_accumulation", True) is False:
            return True
        return (self.micro_steps + 1) % self.settings.accumulation == 0

    def gradient_accumulation_steps(self) -> int:
        return self.settings.accumulation

    def train_batch_size(self) -> int:
        return self.settings.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.settings.micro_batch_size

    def zero_optimization_stage(self) -> int:
        return int(self.settings.get("zero_optimization.stage", 0))

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, over all ranks, before clipping."""
        return self.grad_norm

    def get_lr(self) -> list[float]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [float(group["lr"]) for group in groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.zero_grad(set_to_none=set_to_none)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:
        """Writes save_dir/tag, for any number of ranks to load. All ranks call it."""
        tag = tag or f"global_step{self.global_steps}"
        folder = Path(save_dir) / tag
        dcp.save(self._state(), checkpoint_id=folder)

        def write() -> None:
            counts = {"micro_steps": self.micro_steps, "global_steps": self.global_steps}
            schedule = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
            rest = {"counts": counts, "schedule": schedule, "client": dict(client_state or {})}
            torch.save(rest, folder / "client_state.pt")
            if save_latest:
                (Path(save_dir) / "latest").write_text(tag)

        distributed.on_main(write, "save checkpoint")
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """(folder, client state) of the checkpoint `tag`, by default the latest; (None, {}) if
        there is none."""
        latest = Path(load_dir) / "latest"
        if tag is None and not latest.is_file():
            logger.warning("%s has no file latest; nothing is loaded", load_dir)
            return None, {}
        folder = Path(load_dir) / (tag or latest.read_text().strip())
        if not folder.is_dir():
            raise ValueError(f"there is no checkpoint {folder}")
        state = self._state(optimizer=load_optimizer_states and not load_module_only)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.module,
            [self.optimizer] if "optimizer" in state and self.optimizer else [],
            model_state_dict=state["model"],
            optim_state_dict=state.get("optimizer", {}),
        )
        rest = torch.load(folder / "client_state.pt", weights_only=False)
        if not load_module_only:
            self.micro_steps = rest["counts"]["micro_steps"]
            self.global_steps = rest["counts"]["global_steps"]
            if load_lr_scheduler_states and self.lr_scheduler is not None and rest["schedule"]:
                self.lr_scheduler.load_state_dict(rest["schedule"])
        return str(folder), rest["client"]

    def _state(self, optimizer: bool = True) -> dict[str, Any]:
        used = [self.optimizer] if self.optimizer is not None and optimizer else []
        model, state = get_state_dict(self.module, used)
        return {"model": model, "optimizer": state} if used else {"model": model}

    def save_16bit_model(self, save_dir: str, save_filename: str = "pytorch_model.bin") -> bool:
        """Writes the whole weights, in bfloat16, as one state dict."""
        whole = {}
        for name, value in self.module.state_dict().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if distributed.is_main():
                whole[name] = full.bfloat16().cpu() if full.is_floating_point() else full.cpu()

        def write() -> None:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(whole, Path(save_dir) / save_filename)

        distributed.on_main(write, "save 16-bit model")
        return True


def init_distributed(dist_backend: str | None = None, **ignored: Any) -> None:
    """Joins the process group of the job, as `deepspeed.init_distributed`."""
    if not dist.is_initialized():
        distributed.setup()
