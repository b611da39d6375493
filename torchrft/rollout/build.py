"""From `[rollout] engine_type` to an engine."""

from __future__ import annotations

import torch

from torchrft.config.job_config import Rollout
from torchrft.models.loader import load_config, load_model, load_tokenizer, stop_token_ids
from torchrft.rollout.engine import RolloutEngine
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors


def build_engine(
    config: Rollout,
    pretrain: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    load_weights: bool = True,
) -> RolloutEngine:
    """The engine of `config.engine_type` for the model in the folder or hub id `pretrain`.

    With `load_weights=False` the engine waits for `update_weights`, as in the trainer, and no
    weights are read. Raises ValueError for an engine that is not there yet.
    """
    if config.engine_type != "native":
        raise ValueError(f'engine_type = "{config.engine_type}" is not available yet; use "native"')
    tokenizer = load_tokenizer(pretrain)
    model_config = load_config(pretrain)
    engine = NativeEngine(
        model_config,
        tokenizer,
        stop_token_ids(model_config, pretrain, tokenizer.eos_token_id),
        max_num_seqs=config.max_num_seqs,
        dtype=dtype,
        device=device,
    )
    if load_weights:
        engine.update_weights(named_full_tensors(load_model(pretrain, dtype=dtype)), version=0)
    return engine
