"""What a vLLM server needs in order to serve a `RemoteVllmEngine`: see docs/remote_engines.md.

`--worker-extension-cls torchrft.rollout.vllm_server.Extension` adds these methods to the server's
workers and registers the weight transfer backend "torchrft". Tried with vLLM 0.32.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, base
from vllm.model_executor.model_loader import reload as layerwise

from torchrft.models.loader import expected_model
from torchrft.rollout.canary import Canary, WeightSyncError, fingerprint
from torchrft.rollout.fused_weights import Places
from torchrft.rollout.vllm_model import load, scale_logits
from torchrft.rollout.weight_sync import layout
from torchrft.tools.hub import trust_code_of


class Extension:
    """Methods that vLLM's workers get; they are called by /collective_rpc, with strings."""

    torchrft_scale: float | None = None  # the temperature of the logits; None before the hook

    def torchrft_info(self: Any, probe: str) -> dict[str, Any]:
        """What a trainer must know before it uses this server; `probe` is a file of its own."""
        config = self.vllm_config
        model, transfer = config.model_config, config.weight_transfer_config
        on_cpu = self.device.type == "cpu"
        return {
            "model": str(model.model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_len": model.max_model_len,
            "layout": layout(_expected(model)),
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "backend": transfer.backend if transfer else None,
            "sees_folder": os.path.exists(probe),
            "sleeps": bool(model.enable_sleep_mode) and not on_cpu,
            # A seeded prompt cut in two ends in "CPU Generator does not use offset".
            "cuts_prompts": on_cpu and bool(config.scheduler_config.enable_chunked_prefill),
        }

    def torchrft_temperature(self: Any, temperature: str) -> None:
        """From now on logits are divided by it before vLLM sees them."""
        if self.torchrft_scale is None:
            scale_logits(self.get_model(), lambda: self.torchrft_scale)
        self.torchrft_scale = float(temperature)


@dataclass
class Files(base.WeightTransferUpdateInfo):
    """All weights: safetensors files, and the mark of each tensor as the trainer sent it."""

    paths: list[str]
    marks: dict[str, int]


class FileTransfer(base.WeightTransferEngine[base.WeightTransferInitInfo, Files]):
    """Loads weights from files that the trainer wrote, all in one go, and checks them."""

    init_info_cls = base.WeightTransferInitInfo
    update_info_cls = Files
    places: Places | None = None

    def init_transfer_engine(self, init_info: base.WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Files) -> None:
        """Raises WeightSyncError for a tensor that the model does not hold as it was sent."""
        expected = _expected(self.model_config)
        # First without the model, which does not recover from a load that breaks off.
        for _ in Canary(expected, lambda name: []).watch(_read(update_info)):
            pass
        reload = self._reload if self.device.type == "cpu" else None
        self.places = self.places or Places(self.model)
        load(self.places, expected, _read(update_info), reload)

    def _reload(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        layerwise.initialize_layerwise_reload(self.model)
        self.model.load_weights(pairs)
        layerwise.finalize_layerwise_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _expected(model: Any) -> Any:
    """What the trainer sends for a vLLM ModelConfig; the server was told whether code may run."""
    trust_code_of([model.hf_config.name_or_path] if model.trust_remote_code else [])
    return expected_model(model.hf_config, model.dtype)


def _read(files: Files) -> Iterator[tuple[str, Tensor]]:
    for path in files.paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                if int(fingerprint(tensor)) != files.marks.get(name):
                    raise WeightSyncError(
                        f'weight update: "{name}" in the files is not what the trainer sent'
                    )
                yield name, tensor


WeightTransferEngineFactory.register_engine("torchrft", FileTransfer)
