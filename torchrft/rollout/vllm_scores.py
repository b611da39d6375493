"""Scalar reward models in vLLM, as pooling models in the trainer's own process."""

from collections.abc import Sequence

import torch

from torchrft.config.availability import engine_missing
from torchrft.config.job_config import Rollout
from torchrft.models.reward_model import reward_config, scored_part
from torchrft.rollout.vllm import cache_bytes, start
from torchrft.tools.progress import Counted

_TOKENS = 16384  # that the KV cache holds at least; a sample leaves it once it has its score


class VllmScores:
    """One engine per rank for a sequence-classification model of one label, its weights loaded.

    `collective` is false: the ranks need not call it together. Raises ValueError where vLLM does
    not start, and for another engine than vLLM in this process.
    """

    collective = False

    def __init__(
        self,
        pretrain: str,
        tokenizer: str,
        max_len: int,
        rollout: Rollout,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        problem = engine_missing("vllm")
        if rollout.engine_type != "vllm" or problem:
            why = problem or f'is for engine_type = "vllm", not "{rollout.engine_type}"'
            raise ValueError(
                f'rm_use_engine = true runs the reward model "{pretrain}" in vLLM, which {why}; '
                "without rm_use_engine transformers runs it"
            )
        config = reward_config(pretrain)
        self.pad = config.get_text_config().pad_token_id
        cache = cache_bytes(config, dtype, 2 + _TOKENS // max_len, max_len)
        own = {"tokenizer": tokenizer, "runner": "pooling", "kv_cache_memory_bytes": cache}
        self.llm = start(rollout, pretrain, max_len, dtype, device.type == "cpu", own)

    def __call__(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[float]:
        """The scores of all groups' samples, in their order."""
        from vllm import PoolingParams

        parts = [scored_part(sample, self.pad) for group in groups for sample in group]
        samples = [{"prompt_token_ids": part} for part in parts]
        if not samples:
            return []
        raw = PoolingParams(use_activation=False)
        outputs = self.llm.encode(samples, raw, pooling_task="classify", use_tqdm=Counted)
        return [float(output.outputs.data) for output in outputs]

    def close(self) -> None:
        """vLLM ends with the process."""
