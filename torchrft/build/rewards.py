"""The job's rewards: functions, models, judges and servers in one scorer."""

from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from torchrft.build.rollout import judge_engine
from torchrft.config.job_config import Data, JobConfig
from torchrft.rewards.scorer import Scorer, Weighted, build_scorer
from torchrft.tools.distributed import World


def build_rewards(
    config: JobConfig, world: World, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None
) -> Scorer:
    """The scorer of `config.reward`; all ranks build it together.

    `tokenizer` is the policy's, or None where there is no policy. Raises ValueError for what cannot
    be used: a function, a model folder, a server that does not answer.
    """
    reward, others = config.reward, []
    # Optional sources are imported where they are selected.
    for entry in reward.scalar_models(config.model.pretrain):
        from torchrft.build.reward_models import build_scalar_model
        from torchrft.rollout.vllm_scores import VllmScores

        pooling = partial(VllmScores, rollout=config.rollout, dtype=dtype, device=world.device)
        model = build_scalar_model(entry, config, world, dtype, tokenizer, pooling)
        others.append(Weighted(model, entry.weight, entry.normalize))
    for judge in reward.judges:
        from torchrft.build.judges import build_judge

        engine = partial(judge_engine, config=config, dtype=dtype, device=world.device)
        others.append(Weighted(build_judge(judge, config, engine), judge.weight, judge.normalize))
    if reward.remote_rm_url:
        from torchrft.rewards.remote import RemoteRewards

        remote = RemoteRewards(reward)
        others.append(Weighted(remote, reward.remote_rm_weight, reward.remote_rm_normalize))
    if config.environment.name is not None:
        from torchrft.rewards.environment import EnvironmentRewards

        others.append(Weighted(EnvironmentRewards(), config.environment.environment_weight))
    return build_scorer(reward, others)


def with_source_key(config: JobConfig) -> Data:
    """The `[data]` section, with the column of data sources among those that are read."""
    data, key = config.data, config.reward.source_key
    if key is None or key in data.metadata_keys:
        return data
    return data.model_copy(update={"metadata_keys": [*data.metadata_keys, key]})
