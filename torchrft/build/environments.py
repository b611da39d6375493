"""Where samples come from: the policy's engine, or episodes that environments play with it."""

import asyncio
import os
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from torchrft.config.job_config import JobConfig
from torchrft.rollout import RolloutEngine
from torchrft.types import Prompt, Sampler


def build_sampler(
    config: JobConfig, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase
) -> Sampler:
    """The `engine`, or a Player on it.

    Raises ValueError for an environment that cannot be made, and for a tokenizer without a chat
    template.
    """
    section = config.environment
    if section.name is None:
        return engine
    from torchrft.environments.agent import PREFIX
    from torchrft.environments.player import Player
    from torchrft.environments.pool import EnvironmentPool
    from torchrft.environments.protocol import Limits
    from torchrft.environments.renderer import ChatRenderer

    workers = section.environment_workers or min(len(os.sched_getaffinity(0)), 16)
    are_agents, seconds = section.name.startswith(PREFIX), section.environment_timeout
    if are_agents:  # one call is the whole episode
        seconds *= section.max_turns + 1
    pool = EnvironmentPool(section.name, section.options, workers, seconds)
    asyncio.run(pool.check())
    limits = Limits(section.max_turns, config.data.max_len)
    stops, options = config.rollout.stop_token_ids, config.data.chat_template_kwargs
    renderer = ChatRenderer(tokenizer, stops, **options)
    # What is set where a run is to be the same to the last bit; servers are not.
    exact = torch.are_deterministic_algorithms_enabled() and not config.rollout.server_urls
    schedule = section.episode_schedule or ("rounds" if exact else "free")
    in_rounds, seed = schedule == "rounds", config.training.seed
    return Player(engine, pool, renderer, limits, row_of, seed, in_rounds, are_agents)


def row_of(prompt: Prompt) -> dict[str, Any]:
    """What an environment gets of a row: the prompt as text or messages, label and metadata."""
    content = [dict(message) for message in prompt.messages] or prompt.text
    return {"prompt": content, "label": prompt.label, **prompt.metadata}
