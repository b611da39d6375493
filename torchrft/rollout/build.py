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
    max_len: int = 4096,
) -> RolloutEngine:
    """The engine of `config.engine_type` for the model in the folder or hub id `pretrain`.

    Args: load_weights, false for an engine that waits for `update_weights`, as in the trainer: no
        weights are read; max_len, tokens of the longest prompt with its response (vLLM only).
    Raises ValueError for an engine that is not there yet or does not start.
    """
    tokenizer = load_tokenizer(pretrain)
    model_config = load_config(pretrain)
    stop_ids = stop_token_ids(model_config, pretrain, tokenizer.eos_token_id)
    engine: RolloutEngine
    if config.engine_type == "native":
        engine = NativeEngine(
            model_config, tokenizer, stop_ids, config.max_num_seqs, dtype=dtype, device=device
        )
    elif config.engine_type == "vllm" and config.server_urls:
        from torchrft.rollout.remote import RemoteVllmEngine

        engine = RemoteVllmEngine(
            config.server_urls,
            pretrain,
            model_config,
            tokenizer,
            stop_ids,
            max_len,
            config.max_num_seqs,
            timeout=config.request_timeout,
            retries=config.request_retries,
            temperature=config.temperature,
            folder=config.weight_folder,
            dtype=dtype,
        )
    elif config.engine_type == "vllm":
        from torchrft.rollout.vllm import VllmEngine

        engine = VllmEngine(
            pretrain,
            model_config,
            tokenizer,
            stop_ids,
            max_len,
            config.max_num_seqs,
            tp_size=config.engine_tp_size,
            memory=config.engine_mem_util,
            sleeps=config.enable_engine_sleep,
            dtype=dtype,
            device=device,
            stop_strings=bool(config.stop),
            options=config.vllm,
        )
    else:
        raise ValueError(f'engine_type = "{config.engine_type}" is not available yet; use "native"')
    if load_weights:
        engine.update_weights(named_full_tensors(load_model(pretrain, dtype=dtype)), version=0)
    return engine
