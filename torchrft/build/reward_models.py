"""The sources of `[reward] models`: each is loaded and given what it reads."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from torchrft.config.job_config import JobConfig
from torchrft.config.reward_config import RewardModel as Entry
from torchrft.models.reward_model import load_reward_model, reward_config
from torchrft.models.support import rope_limit
from torchrft.rewards.models import Batches, Forward, Reader, ScalarModel
from torchrft.rewards.vision_model import VisionModel
from torchrft.tools.distributed import World

_LONGEST = 32768  # tokens of a sample that an engine makes room for, where its own limit is higher


def build_scalar_model(
    entry: Entry,
    config: JobConfig,
    world: World,
    dtype: torch.dtype,
    policy: PreTrainedTokenizerBase | None,
    pooling: Callable[[str, str, int], Forward],
) -> ScalarModel | VisionModel:
    """The source of an entry of `[reward] models`, loaded; collective.

    `policy` is the policy's tokenizer. `pooling(model, tokenizer, max_len)` starts an engine that
    gives scores, for rm_use_engine. Raises ValueError for a model, tokenizer, template or engine
    that cannot be used.
    """
    name, model_config = entry.name or Path(entry.pretrain).name, reward_config(entry.pretrain)
    offload = config.reward.reward_model_offload
    if hasattr(model_config, "vision_config"):
        if config.reward.rm_use_engine:
            raise ValueError(
                f'rm_use_engine = true: the reward model "{entry.pretrain}" sees images, which '
                "transformers runs; leave rm_use_engine out"
            )
        seeing = load_reward_model(entry.pretrain, config.parallel, world, dtype, whole=True)
        return VisionModel(name, entry, seeing, offload)
    limit = rope_limit(model_config) or getattr(model_config, "max_position_embeddings", None)
    reader = Reader(entry, policy, limit, model_config.get_text_config().vocab_size)
    if reader.direct and config.data.max_len > reader.max_len:
        raise ValueError(
            f'the reward model "{entry.pretrain}" reads at most {reader.max_len} tokens, but '
            f"max_len = {config.data.max_len}; lower max_len"
        )
    forward: Forward
    if config.reward.rm_use_engine:
        longest = config.data.max_len if reader.direct else min(reader.max_len, _LONGEST)
        reader.max_len = longest
        forward = pooling(entry.pretrain, reader.source, longest)
    else:
        model = load_reward_model(entry.pretrain, config.parallel, world, dtype)
        forward = Batches(model, config.rollout.micro_rollout_batch_size, offload)
    return ScalarModel(name, reader, forward)
