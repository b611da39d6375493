"""From `[rollout] engine_type` to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchrft.config.availability import engine_missing
from torchrft.config.job_config import Rollout
from torchrft.models.loader import load_config, load_model, load_tokenizer, stop_token_ids
from torchrft.rollout.engine import RolloutEngine
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors

if TYPE_CHECKING:
    from torchrft.models.vision import Vision


def build_engine(
    config: Rollout,
    pretrain: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    load_weights: bool = True,
    max_len: int = 4096,
    compile: bool = False,
    vision: Vision | None = None,
) -> RolloutEngine:
    """The engine of `config.engine_type` for the model in the folder or hub id `pretrain`.

    Args: load_weights, false for an engine that waits for `update_weights`, as in the trainer: no
        weights are read; max_len, tokens of the longest prompt with its response, for vLLM
    and SGLang; compile, whether the native engine compiles its layers, on a GPU; vision, for
    prompts with images.
    Raises ValueError for an engine that is not installed or does not start.
    """
    problem = None if config.server_urls else engine_missing(config.engine_type)
    if problem:
        raise ValueError(f'engine_type = "{config.engine_type}" {problem}')
    tokenizer = load_tokenizer(pretrain)
    model_config = load_config(pretrain)
    stop_ids = stop_token_ids(model_config, pretrain, tokenizer.eos_token_id)
    vocabulary = model_config.get_text_config().vocab_size
    if unknown := [token for token in config.stop_token_ids if token >= vocabulary]:
        raise ValueError(
            f"stop_token_ids holds {unknown[0]}, but the model knows {vocabulary} tokens: leave it "
            "out"
        )
    policy = (pretrain, model_config, tokenizer, stop_ids, max_len, dtype)
    engine: RolloutEngine
    if config.engine_type == "native":
        engine = NativeEngine(
            model_config, tokenizer, stop_ids, config.max_num_seqs, dtype, device, compile, vision
        )
    elif config.engine_type == "vllm" and config.server_urls:
        from torchrft.rollout.remote import RemoteVllmEngine

        engine = RemoteVllmEngine(config, *policy)
    elif config.engine_type == "vllm":
        from torchrft.rollout.vllm import VllmEngine

        engine = VllmEngine(config, *policy, device, vision)
    else:
        from torchrft.rollout.sglang import SglangEngine, join_sglang, start_sglang

        transport: Any
        if config.server_urls:
            transport = join_sglang(config.server_urls, config.request_timeout)
        else:
            transport = start_sglang(config, pretrain, max_len, dtype)
        tp_size = config.engine_tp_size
        served = (transport, model_config, tokenizer, stop_ids, tp_size, dtype, device, max_len)
        engine = SglangEngine(*served)
    if load_weights:
        use = "policy" if config.engine_type == "native" else "engine"
        model = load_model(pretrain, dtype=dtype, use=use)
        engine.update_weights(named_full_tensors(model), version=0)
    return engine
