"""A small policy, samples for it and a Learner, without a trainer around them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import tiny
import tiny_vlm
import torch
from tiny_job import MODEL, tiny_config

from torchrft.algorithms import advantages
from torchrft.build.learner import build_objective
from torchrft.learn.batch import make_batch
from torchrft.learn.learner import Learner
from torchrft.learn.optimizer_step import OptimizerStep
from torchrft.models.loader import load_model
from torchrft.models.policy import PolicyModel
from torchrft.models.vision import freeze_vision
from torchrft.optim.lr_scheduler import build_scheduler
from torchrft.parallel import ParallelDims, parallelize
from torchrft.parallel.zero import sharding
from torchrft.rewards.shaping import RewardShaper
from torchrft.types import Branch, Completion, Prompt, RolloutBatch, Sample, Score

NUM_GROUPS, GROUP_SIZE = 4, 4


def make_samples(seed: int = 0, longest: int = 9) -> list[Sample]:
    """4 prompts x 4 completions of 1 to `longest` random tokens with random rewards."""
    rng = random.Random(seed)
    samples = []
    for group in range(NUM_GROUPS):
        prompt_ids = tuple(rng.randrange(3, 56) for _ in range(rng.randint(2, 6)))
        prompt = Prompt(row=group, text="", token_ids=prompt_ids)
        for index in range(GROUP_SIZE):
            length = rng.randint(1, longest)
            completion = Completion(
                prompt_index=group,
                sample_index=index,
                token_ids=tuple(rng.randrange(3, 56) for _ in range(length)),
                logprobs=tuple(-4.0 + 0.3 * rng.random() for _ in range(length)),
                text="",
                finish_reason="stop",
            )
            samples.append(Sample(prompt, completion, Score(rng.random()), group))
    return samples


def _branch(rng: random.Random, prompt: Sequence[int], *pieces: tuple[int, bool]) -> Branch:
    """A branch whose pieces are (length, sampled)."""
    ids = [rng.randrange(3, 56) for length, _ in pieces for _ in range(length)]
    own = [sampled for length, sampled in pieces for _ in range(length)]
    logprobs = [-4.0 + 0.3 * rng.random() if sampled else 0.0 for sampled in own]
    return Branch(tuple(prompt), tuple(ids), tuple(own), tuple(logprobs))


def make_episodes(seed: int = 0) -> list[Sample]:
    """4 groups of 4 episodes of 1 to 3 branches, each with observed tokens in between."""
    rng = random.Random(seed)
    samples = []
    for group in range(4):
        opening = [rng.randrange(3, 56) for _ in range(rng.randint(2, 6))]
        for index in range(4):
            branches = [_branch(rng, opening, (rng.randint(1, 4), True), (3, False), (2, True))]
            for _ in range(rng.randint(0, 2)):
                longer = [*branches[-1].prompt, *branches[-1].token_ids[1:], 7]
                branches.append(_branch(rng, longer, (rng.randint(1, 5), True)))
            own = [
                (token, logprob)
                for b in branches
                for token, logprob, sampled in zip(b.token_ids, b.logprobs, b.sampled, strict=True)
                if sampled
            ]
            completion = Completion(
                *(group, index, tuple(t for t, _ in own), tuple(p for _, p in own), "", "stop"),
                branches=tuple(branches),
            )
            prompt = Prompt(group, "", ())
            samples.append(Sample(prompt, completion, Score(rng.random()), group))
    return samples


def with_advantages(samples: list[Sample]) -> RolloutBatch:
    from dataclasses import replace

    batch = make_batch(samples)
    result = advantages.compute("group_norm", batch.rewards, batch.group, batch.mask)
    return replace(batch, advantages=result.advantages, returns=result.returns)


def make_learner(
    reference_seed: int | None = None,
    *,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    init_scale: float = 3.0,
    family: dict[str, Any] | None = None,
    vlm: str | None = None,
    **options: Any,
) -> Learner:
    """A Learner of a random policy, with plain gradient descent at rate 1.

    Its steps are the clipped gradients themselves: AdamW would blow rounding errors of tiny
    gradients up to whole steps. `options` are those of the job; a `reference_seed` makes a
    reference model of other weights; `family` are the arguments of tiny.model for another
    architecture than the debug model's, `vlm` the family of a vision-language model.
    """
    sees = None if vlm is None else tiny_vlm.vision(vlm)
    options = {"lr_warmup_ratio": 0.0, "lr_decay": "constant", "max_len": 64} | options
    options.setdefault("loss_aggregation", "token_mean")
    config = tiny_config(world_size, **options)
    dims = ParallelDims.of(config.parallel, world_size)

    training = config.training

    def model(seed: int) -> PolicyModel:
        made: Any
        if sees is not None:
            made = tiny_vlm.ours(vlm, seed)
        elif family is not None:
            made = tiny.model(**family, seed=seed)
        else:
            made = load_model(MODEL, "random", torch.float32, seed)
            with torch.no_grad():  # fresh weights are small: tokens nearly equal, gradients tiny
                for parameter in made.parameters():
                    if parameter.dim() >= 2:
                        parameter.mul_(init_scale)
        if config.model.freeze_vision:
            freeze_vision(made)
        policy = PolicyModel(made.eval(), 1.0, training.fused_linear_logprob, training.chunk_size)
        parallelize(
            policy,
            dims,
            config.parallel,
            dtype,
            gradient_checkpointing=(
                training.checkpointing_mode if training.gradient_checkpointing else None
            ),
            compile=training.compile,
        )
        return policy

    policy = model(0)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    stepper = OptimizerStep(
        policy,
        optimizer,
        build_scheduler(optimizer, config.optimizer, 100),
        config.training,
        config.rollout,
        max_norm=config.optimizer.max_norm,
        max_len=config.data.max_len,
        max_response_length=12,
        reduce_every_micro_batch=sharding(config.parallel).reduce_every_micro_batch,
        ranks=dims.data_ranks("cpu"),
        tp=dims.tp,
        vision=sees,
    )
    reference = None if reference_seed is None else model(reference_seed).requires_grad_(False)
    objective, shaper = build_objective(config), RewardShaper(config.reward)
    return Learner(objective, config.algorithm, stepper, reference, None, shaper)


def full_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """A copy of every parameter, gathered from its shards if it has any."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in learner.policy.model.named_parameters()
    }
