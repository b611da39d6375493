"""The job's learner: policy, reference and critic, their optimizers, and what they maximize."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchrft.algorithms import advantages
from torchrft.algorithms.losses import LOSSES, TENSORS, PolicyLoss
from torchrft.algorithms.options import option_parameters, options_from
from torchrft.algorithms.presets import resolve
from torchrft.build.models import ModelBuilder
from torchrft.config.fields import is_set
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import CRITIC_FIELDS, is_chosen
from torchrft.config.start import optimizer_steps
from torchrft.learn.learner import Learner, Objective
from torchrft.learn.optimizer_step import OptimizerStep
from torchrft.optim.lr_scheduler import build_scheduler
from torchrft.optim.optimizer import build_optimizer
from torchrft.parallel import ParallelDims
from torchrft.parallel.zero import sharding
from torchrft.rewards.shaping import RewardShaper
from torchrft.tools.distributed import World

if TYPE_CHECKING:
    from torchrft.models.vision import Vision


def build_learner(
    config: JobConfig,
    world: World,
    dims: ParallelDims,
    dtype: torch.dtype,
    rollouts: int,
    shaper: RewardShaper,
    vision: Vision | None,
) -> Learner:
    """The learner of a run of so many `rollouts`, with models that compute in `dtype`; collective.

    Raises ValueError for options that estimator or loss do not take or lack, and for models that
    cannot be loaded or spread over the ranks like that.
    """
    model, optimizer = config.model, config.optimizer
    objective = build_objective(config)
    models = ModelBuilder(config, world, dims, dtype)
    reference = None
    if config.algorithm.init_kl_coef > 0:
        init = model.init if model.ref_pretrain is None else "pretrained"
        reference = models.policy(model.ref_pretrain or model.pretrain, init, dtype)
        reference.requires_grad_(False)
    # With use_mp_opt the float32 master weights are the optimizer's.
    master = torch.bfloat16 if optimizer.use_mp_opt else torch.float32
    stepper = partial(_stepper, config, rollouts, dims, world, vision)
    policy = models.policy(model.pretrain, model.init, master)
    actor = stepper(policy, optimizer.actor_learning_rate)
    critic = None
    if objective.estimator.needs_values:
        init = model.init if model.critic_pretrain is None else "pretrained"
        values = models.critic(model.critic_pretrain or model.pretrain, init, master)
        critic = stepper(values, optimizer.critic_learning_rate)
    return Learner(objective, config.algorithm, actor, reference, critic, shaper)


def build_objective(config: JobConfig) -> Objective:
    """Estimator and losses of the `[algorithm]` section.

    Raises ValueError for options that they do not take or lack, or that have no effect.
    """
    algorithm = config.algorithm
    names = ("policy_loss", "loss_aggregation", "kl_placement")
    overrides = {name: getattr(algorithm, name) for name in names}
    preset = resolve(algorithm.advantage_estimator, **overrides)
    fields = algorithm.model_dump()
    function = advantages.ESTIMATORS.get(preset.estimator)
    with_values = {**fields, "values": None}  # a critic's, which come with each call
    options = options_from(function, with_values, algorithm.advantage_options, 1)
    options.pop("values", None)
    estimator = advantages.AdvantageEstimator(
        preset.estimator,
        kl_estimator=algorithm.kl_estimator,
        init_kl_coef=algorithm.init_kl_coef,
        advantages_norm=algorithm.advantages_norm,
        advantage_clip=algorithm.advantage_clip,
        options=options,
    )
    _refuse_idle_fields(config, estimator)
    token_loss, user_options = LOSSES.get(preset.policy_loss), algorithm.policy_loss_options
    loss = PolicyLoss(
        preset.policy_loss,
        loss_aggregation=preset.loss_aggregation,
        kl_estimator=algorithm.kl_estimator,
        init_kl_coef=algorithm.init_kl_coef,
        entropy_coef=algorithm.entropy_coef,
        rollout_correction=algorithm.rollout_correction,
        rollout_correction_cap=algorithm.rollout_correction_cap,
        options=options_from(token_loss, fields, user_options, TENSORS),
    )
    return Objective(estimator, loss, preset.kl_placement == "reward")


def _refuse_idle_fields(config: JobConfig, estimator: advantages.AdvantageEstimator) -> None:
    """Raises ValueError for a field that is set and that the estimator does not take."""
    taken = option_parameters(estimator.function, 1)
    set_names = [name for name in ("gamma", "lambd") if is_set(config, name)]
    idle = [(name, "does not take it", name) for name in set_names if name not in taken]
    if not estimator.needs_values:
        critics = [name for name in CRITIC_FIELDS if is_chosen(config, name)]
        idle += [(name, "needs no critic", "values") for name in critics]
    for name, why, parameter in idle:
        raise ValueError(
            f"{name} has no effect: {config.algorithm.advantage_estimator} {why}; leave it "
            f"out, or give the function a parameter {parameter}"
        )


def _stepper(
    config: JobConfig,
    rollouts: int,
    dims: ParallelDims,
    world: World,
    vision: Vision | None,
    model: nn.Module,
    learning_rate: float,
) -> OptimizerStep:
    """Optimizer and schedule of a model, over the whole run."""
    options = config.optimizer
    total = options.lr_total_steps or optimizer_steps(config, rollouts)
    optimizer = build_optimizer(model, options, learning_rate, options.use_mp_opt)
    return OptimizerStep(
        model,
        optimizer,
        build_scheduler(optimizer, options, total),
        config.training,
        config.rollout,
        max_norm=options.max_norm,
        max_len=config.data.max_len,
        max_response_length=config.rollout.max_new_tokens or config.data.max_len,
        reduce_every_micro_batch=sharding(config.parallel).reduce_every_micro_batch,
        ranks=dims.data_ranks(world.device.type),
        tp=dims.tp,
        adam_offload=options.adam_offload,
        vision=vision,
    )
