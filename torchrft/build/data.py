"""The job's prompts: those to train on, in their order, and those held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from torchrft.build.rewards import with_source_key
from torchrft.config.job_config import JobConfig
from torchrft.data.loader import PromptLoader
from torchrft.data.prompts import PromptDataset, load_prompts
from torchrft.rewards.scorer import Scorer
from torchrft.tools.distributed import DataRanks, World, on_all
from torchrft.types import Prompt

if TYPE_CHECKING:
    from torchrft.models.vision import Vision


@dataclass(frozen=True)
class Prompts:
    """The stream of this rank's training prompts, and its held-out ones (None without any).

    `rollouts` is how many a whole run takes, which fixes the learning rate's schedule.
    """

    stream: PromptLoader
    held_out: list[Prompt] | None
    rollouts: int


def build_prompts(
    config: JobConfig,
    world: World,
    ranks: DataRanks,
    tokenizer: PreTrainedTokenizerBase,
    vision: Vision | None,
    scorer: Scorer,
) -> Prompts:
    """Loads the prompts and has the `scorer` look at them; collective.

    Raises ValueError for files that cannot be used, and for rows that no reward can judge.
    """
    data = with_source_key(config)

    def load(name: str, source: str) -> PromptDataset:
        prompts = load_prompts(source, data, tokenizer, name, vision)
        kept = on_all(lambda: (len(prompts), prompts.digest()), name)
        if any(other != kept[0] for other in kept):
            raise ValueError(
                f"{name}: the ranks keep other prompts, {', '.join(str(n) for n, _ in kept)} of "
                "them: give all hosts the same files, with their images"
            )
        return prompts

    training = load("prompt_data", data.prompt_data or "")
    size = config.rollout.rollout_batch_size
    stream = PromptLoader(training, size, config.training.seed, ranks.rank, ranks.size)
    held_out: list[Prompt] | None = None
    if (source := config.evaluation.eval_data) is not None:
        held_out = list(load("eval_data", source)[world.rank :: world.world_size])
    scorer.check(training)
    scorer.check(held_out or [], "eval_data")
    return Prompts(stream, held_out, stream.total_steps(config.training.num_episodes))
