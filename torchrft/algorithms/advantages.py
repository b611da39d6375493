"""Advantage estimators: rewards of samples in, advantages of tokens out."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.algorithms.kl import kl_divergence
from torchrft.algorithms.options import check_options
from torchrft.config.registry import Registry

Reduce = Callable[[Tensor], Tensor]  # sums a float64 tensor over ranks


@dataclass(frozen=True)
class Advantages:
    """What an estimator returns.

    `advantages` and `returns` (what a critic should have predicted) are float32 [B, T] and zero
    outside the mask; `metrics` are floats, equal on all ranks.
    """

    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewards:
    """What an estimator gets to see of the rewards, with the KL penalty taken off if there is one.

    `samples` float64 [B] is the reward of each sample; `tokens` float64 [B, T] spreads it over its
    tokens: the sample's reward on the last one, KL penalties where they arise. `group` int64 [B] is
    equal for the samples of one prompt; `mask` bool [B, T] marks response tokens.
    """

    samples: Tensor
    tokens: Tensor
    group: Tensor
    mask: Tensor
    reduce: Reduce

    def spread(self, values: Tensor) -> Advantages:
        """`values` [B] on every response token."""
        advantages = (values[:, None] * self.mask).float()
        return Advantages(advantages, advantages)


ESTIMATORS: Registry[Any] = Registry("advantage_estimator")
WHITENED = {"reinforce_plus_plus", "reinforce_baseline"}


def compute(
    estimator: str,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k1",
    init_kl_coef: float = 0.001,
    advantages_norm: bool = False,
    advantage_clip: float = 0.0,
    reduce: Reduce = lambda tensor: tensor,
    **options: Any,
) -> Advantages:
    """Advantages of B samples by the registered `estimator`, whitened and clipped if asked for.

    Args: rewards float [B]; group int [B], equal for the samples of one prompt; mask bool [B, T] of
        response tokens, a prefix of each row. With ref_logprobs and old_logprobs [B, T] the KL
        penalty goes into the reward: r_t = -init_kl_coef * KL_t + 1[t is the last token] * R. There
        only k1 has the policy gradient of the divergence; that of k2 and k3 is next to none near
        the reference, and may push away from it.
        advantages_norm whitens over all response tokens (always, for reinforce_plus_plus and
        reinforce_baseline); advantage_clip > 0 clamps to +-advantage_clip. `reduce` sums a tensor
        over ranks, for statistics that span them. Further options are the estimator's keywords.
    Raises: ValueError for an unknown estimator or option, shapes that do not fit, a reward that is
        not finite (naming the sample), or what the estimator refuses.

    >>> rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([7, 7])
    >>> compute("group_norm", rewards, group, torch.ones(2, 1).bool()).advantages.squeeze(1)
    tensor([ 0.7071, -0.7071])
    """
    function = ESTIMATORS.get(estimator)
    check_options(function, options, f'advantage estimator "{estimator}"')
    if rewards.shape != mask.shape[:1] or group.shape != rewards.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, group {tuple(group.shape)} and mask "
            f"{tuple(mask.shape)} must be [B], [B], [B, T]"
        )
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the reward of sample {bad[0]} is {rewards[bad[0]].item()}")
    samples, metrics = rewards.double(), {}
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    tokens = samples[:, None] * last
    if ref_logprobs is not None:
        if old_logprobs is None:
            raise ValueError("a KL penalty in the reward needs old_logprobs beside ref_logprobs")
        kl = kl_divergence(old_logprobs, ref_logprobs, kl_estimator).double().where(mask, 0.0)
        tokens = tokens - init_kl_coef * kl
        samples = samples - init_kl_coef * kl.sum(-1)
    result = function(Rewards(samples, tokens, group, mask, reduce), **options)
    advantages = result.advantages
    if advantages_norm or estimator in WHITENED:
        advantages = whiten(advantages, mask, reduce)
    if advantage_clip > 0:
        counts = torch.stack([(advantages.abs() > advantage_clip).sum(), mask.sum()]).double()
        clipped, total = reduce(counts).tolist()
        metrics["advantages/clipped_fraction"] = clipped / max(total, 1.0)
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    return Advantages(advantages, result.returns, {**result.metrics, **metrics})


def needs_values(estimator: str) -> bool:
    """Whether the estimator takes a critic's values."""
    return "values" in inspect.signature(ESTIMATORS.get(estimator)).parameters


def whiten(values: Tensor, mask: Tensor, reduce: Reduce = lambda tensor: tensor) -> Tensor:
    """(values - mean) / (std + 1e-8) over all masked tokens, biased variance; zero elsewhere."""
    inside = values.double().where(mask, 0.0)
    total, count = reduce(torch.stack([inside.sum(), mask.sum().double()]))
    centered = (inside - total / count.clamp(min=1)).where(mask, 0.0)
    variance = reduce(centered.square().sum()[None])[0] / count.clamp(min=1)
    return (centered / (variance.sqrt() + 1e-8)).float()


@ESTIMATORS.register("group_norm")
def group_norm(rewards: Rewards) -> Advantages:
    """GRPO (arXiv:2402.03300): (R_i - mean_g) / (std_g + 1e-6) on every token of sample i.

    std is the unbiased one; a group of one sample, or of equal rewards, gives 0.
    """
    centered, std = center_by_group(rewards.samples, rewards.group)
    return rewards.spread(centered / (std + 1e-6))


for _name in ("gspo", "gmpo", "dapo", "cispo"):  # their novelty is in the loss, not here
    ESTIMATORS.register(_name)(group_norm)


@ESTIMATORS.register("dr_grpo")
def dr_grpo(rewards: Rewards) -> Advantages:
    """Dr. GRPO (arXiv:2503.20783): R_i - mean_g, without the bias of dividing by std_g."""
    return rewards.spread(center_by_group(rewards.samples, rewards.group)[0])


@ESTIMATORS.register("rloo")
def rloo(rewards: Rewards) -> Advantages:
    """RLOO (arXiv:2402.14740): R_i - mean of the other members of g.

    Raises: ValueError for a group of one.
    """
    _, index, count = rewards.group.unique(return_inverse=True, return_counts=True)
    size = count[index].double()
    if bool((count == 1).any()):
        alone = int((size == 1).nonzero()[0])
        raise ValueError(
            f"rloo compares a sample with the others of its group, but sample {alone} is alone in "
            "its group: n_samples_per_prompt must be at least 2"
        )
    centered, _ = center_by_group(rewards.samples, rewards.group)
    return rewards.spread(centered * size / (size - 1))  # R - (n mean - R) / (n - 1)


@ESTIMATORS.register("reinforce")
def reinforce(rewards: Rewards, gamma: float = 1.0) -> Advantages:
    """REINFORCE (Williams, 1992): the discounted return sum_{k >= t} gamma^(k - t) r_k."""
    returns = discounted_sum(rewards.tokens, gamma)
    advantages = returns.where(rewards.mask, 0.0).float()
    return Advantages(advantages, advantages)


# REINFORCE++ (arXiv:2501.03262) has the KL in the reward, its variant a baseline of the group's
# mean; `compute` whitens both.
ESTIMATORS.register("reinforce_plus_plus")(reinforce)
ESTIMATORS.register("reinforce_baseline")(dr_grpo)


@ESTIMATORS.register("gae")
def gae(rewards: Rewards, values: Tensor, gamma: float = 1.0, lambd: float = 0.95) -> Advantages:
    """GAE (arXiv:1506.02438) of a critic's `values` float [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lambd)^l delta_{t+l}, returns = A + V;
    V after the last token is 0.
    """
    inside = values.double().where(rewards.mask, 0.0)
    delta = rewards.tokens + gamma * F.pad(inside, (0, 1))[:, 1:] - inside
    advantages = discounted_sum(delta.where(rewards.mask, 0.0), gamma * lambd)
    advantages = advantages.where(rewards.mask, 0.0)
    return Advantages(advantages.float(), (advantages + inside).float())


@ESTIMATORS.register("cpgd")
def cpgd(rewards: Rewards, cpgd_weight: str = "std") -> Advantages:
    """CPGD (arXiv:2505.12504): centered rewards, weighted by `cpgd_weight`.

    std: / (std_g + 1e-6), as GRPO; clip_filter: times min(n / n_nonzero, 3), where n counts groups
    and n_nonzero those whose rewards differ; none: as they are.
    Raises: ValueError for an unknown weight.
    """
    centered, std = center_by_group(rewards.samples, rewards.group)
    if cpgd_weight == "std":
        return rewards.spread(centered / (std + 1e-6))
    if cpgd_weight == "clip_filter":
        groups = rewards.group.unique()
        varied = rewards.group[centered != 0].unique()
        sizes = torch.tensor([groups.numel(), varied.numel()], dtype=torch.float64)
        all_groups, all_varied = rewards.reduce(sizes.to(centered.device)).tolist()
        return rewards.spread(centered * min(all_groups / max(all_varied, 1.0), 3.0))
    if cpgd_weight == "none":
        return rewards.spread(centered)
    raise ValueError(f'cpgd_weight "{cpgd_weight}" is unknown; choose std, clip_filter or none')


def center_by_group(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(R_i - mean_g, unbiased std_g) in float64 [B]; exactly 0 where a group's rewards are equal.

    Groups are the samples of equal `group`, in any order and of any size.
    """
    _, index = group.unique(return_inverse=True)
    count = index.bincount().double()
    value = rewards.double()
    mean = torch.zeros_like(count).index_add_(0, index, value) / count
    lowest = torch.full_like(count, torch.inf).scatter_reduce_(0, index, value, "amin")
    highest = torch.full_like(count, -torch.inf).scatter_reduce_(0, index, value, "amax")
    # The mean of equal numbers may be off by a rounding error, which dividing by a tiny standard
    # deviation would blow up.
    centered = (value - mean[index]).where((lowest < highest)[index], 0.0)
    squares = torch.zeros_like(count).index_add_(0, index, centered.square())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return centered, std[index]


def discounted_sum(values: Tensor, factor: float) -> Tensor:
    """sum_{k >= t} factor^(k - t) values[:, k], for values [B, T]."""
    if factor == 1.0:
        return values.flip(-1).cumsum(-1).flip(-1)
    out = torch.empty_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = values[:, t] + factor * running
        out[:, t] = running
    return out
