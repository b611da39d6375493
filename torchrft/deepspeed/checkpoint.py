"""What the DeepSpeed engine writes and reads: checkpoints, and whole weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from torchrft.checkpoint import dcp_files, objects
from torchrft.deepspeed.whole import WholeWeights, frozen
from torchrft.tools import distributed
from torchrft.tools.logging import logger

# What a checkpoint keeps of the engine itself. Not the micro-batches since the last step, whose
# gradients it does not hold: as in DeepSpeed, a loaded engine begins a step anew.
_COUNTS = ("global_steps", "skipped_steps", "global_samples")


class Checkpoints:
    """The engine's methods that write and read; all ranks call them."""

    module: nn.Module
    weights: WholeWeights
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    global_steps: int

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The model's whole weights, on every rank."""
        return dict(self.weights.gathered(exclude_frozen_parameters))

    def save_16bit_model(
        self,
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes the whole weights, in bfloat16, as one state dict."""
        whole = {}
        for name, value in self.weights.gathered(exclude_frozen_parameters):
            if distributed.is_main():
                if isinstance(value, Tensor):
                    value = (value.bfloat16() if value.is_floating_point() else value).cpu()
                whole[name] = value

        def write() -> None:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(whole, Path(save_dir) / save_filename)

        distributed.on_main(write, "save 16-bit model")
        return True

    save_fp16_model = save_16bit_model  # its older name

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes save_dir/tag, for any number of ranks to load. Raises ValueError on all ranks if
        their tags differ, and for a client_state that holds more than plain data and tensors."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        tags = distributed.DataRanks.all().gather(tag, "compare checkpoint tags")
        if len(set(tags)) > 1:
            raise ValueError(
                f"ranks write one checkpoint together, but save_checkpoint was given the tags "
                f"{', '.join(map(repr, dict.fromkeys(tags)))}; give the same tag on all ranks"
            )
        folder = Path(save_dir) / tag
        schedule = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
        counts = {name: getattr(self, name) for name in _COUNTS}
        host_state = {"counts": counts, "schedule": schedule, "client": dict(client_state or {})}
        content = distributed.on_main(lambda: objects.dumps(host_state), "read client_state")
        with self.weights.as_shards():
            state = self._state()
            for name in frozen(self.module) if exclude_frozen_parameters else ():
                state["model"].pop(name, None)
            with dcp_files.calling_dcp():
                dcp.save(
                    state, storage_writer=dcp_files.Writer(folder), planner=dcp_files.Planner()
                )

        def write() -> None:
            (folder / "client_state.json").write_bytes(content)
            if save_latest:
                (Path(save_dir) / "latest").write_text(tag)

        distributed.on_main(write, "save checkpoint")
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """(folder, client state) of the checkpoint `tag`, by default the latest; (None, {}) if
        there is none. Raises ValueError for a folder that is no checkpoint, or does not fit."""
        if custom_load_fn is not None:
            raise ValueError(
                "load_checkpoint(custom_load_fn=...) is not supported: load what fits with "
                "load_module_strict=False, and change weights within zero.GatheredParameters"
            )
        latest = Path(load_dir) / "latest"
        if tag is None and not latest.is_file():
            logger.warning("%s has no file latest; nothing is loaded", load_dir)
            return None, {}
        folder = folder_of(load_dir, tag)
        with self.weights.as_shards():
            self._load(folder, load_module_strict, load_optimizer_states and not load_module_only)
        host_state = _read_host_state(folder)
        if not load_module_only:
            vars(self).update(host_state["counts"])
            schedule = host_state["schedule"]
            if load_lr_scheduler_states and self.lr_scheduler is not None and schedule:
                self.lr_scheduler.load_state_dict(schedule)
        return str(folder), host_state["client"]

    def _state(self, optimizer: bool = True) -> dict[str, Any]:
        used = [self.optimizer] if self.optimizer is not None and optimizer else []
        model, state = get_state_dict(self.module, used)
        return {"model": model, "optimizer": state} if used else {"model": model}

    def _load(self, folder: Path, strict: bool, optimizer: bool) -> None:
        state = self._state(optimizer)
        _fit(state["model"], folder, strict)
        try:
            with dcp_files.calling_dcp():
                dcp.load(
                    state, storage_reader=dcp_files.Reader(folder), planner=dcp_files.LoadPlanner()
                )
        except (dcp_files.DamagedError, OSError):
            raise
        except Exception as reason:
            raise ValueError(
                f"checkpoint {folder} does not fit the optimizer ({str(reason).splitlines()[0]}); "
                "load_optimizer_states=False loads the weights alone"
            ) from None
        set_state_dict(
            self.module,
            [self.optimizer] if "optimizer" in state and self.optimizer else [],
            model_state_dict=state["model"],
            optim_state_dict=state.get("optimizer", {}),
            options=StateDictOptions(strict=strict),
        )


def folder_of(load_dir: str, tag: Any) -> Path:
    """The folder of the checkpoint `tag`, or of the one that the file latest names, for None.

    Raises ValueError for a folder that is no checkpoint, and a latest that leads elsewhere.
    """
    if tag is None:
        path = Path(load_dir) / "latest"
        tag = path.read_text(errors="replace").strip()
        if ".." in Path(tag).parts or Path(tag).is_absolute() or len(tag) > 255:
            raise ValueError(f"{path} names {tag!r:.80}, which is not in its folder; give a tag")
    folder = Path(load_dir) / str(tag)
    if not (folder / ".metadata").is_file():
        raise ValueError(f"there is no checkpoint of this engine in {folder}")
    return folder


def _read_host_state(folder: Path) -> dict[str, Any]:
    """What save_checkpoint wrote beside the tensors: JSON, or in earlier versions torch.save's.

    Raises ValueError for a file that is damaged, or holds more than plain data and tensors.
    """
    new = folder / "client_state.json"
    path = new if new.exists() else folder / "client_state.pt"
    with dcp_files.reading(path):
        content = objects.loads(path.read_bytes())
        objects.check_kind(content, {"counts": dict.fromkeys(_COUNTS, 0), "client": {}}, "it")
        objects.check_kind(content["schedule"] or {}, {}, "schedule")
        counts = {name: content["counts"][name] for name in _COUNTS}
        return {"counts": counts, "schedule": content["schedule"], "client": content["client"]}


def _fit(model: dict[str, Any], folder: Path, strict: bool) -> None:
    """Compares names and shapes with the checkpoint's; unless `strict`, drops what it lacks."""
    entries = dcp_files.Reader(folder).read_metadata().state_dict_metadata
    start = "model."
    held = {name.removeprefix(start): e for name, e in entries.items() if name.startswith(start)}
    saved = {name: getattr(entry, "size", None) for name, entry in held.items()}
    lacks = [name for name in model if name not in saved]
    shapes = {name: value.shape for name, value in model.items() if isinstance(value, Tensor)}
    reshaped = [
        f"{name} {tuple(saved[name] or ())} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if saved.get(name, shape) != shape
    ]
    faults = [f"has {', '.join(reshaped[:3])}"] if reshaped else []
    if strict:
        extra = [name for name in saved if name not in model]
        for verb, names in (("lacks", lacks), ("has also", extra)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults += [f"{verb} {', '.join(names[:3])}{more}"] if names else []
    if faults:
        remedy = "" if reshaped else "; load_module_strict=False loads what both have"
        what = ", ".join(faults) + remedy
        raise ValueError(f"checkpoint {folder} does not fit the model: it {what}")
    for name in lacks:
        del model[name]
