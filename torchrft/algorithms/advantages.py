"""Advantage estimators: rewards of samples in, advantages of tokens out."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrft.algorithms.kl import kl_divergence
from torchrft.algorithms.options import bind, check_options
from torchrft.tools.registry import Registry

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


@dataclass(frozen=True)
class AdvantageEstimator:
    """The registered estimator `name`, whitened and clipped if asked for, with all its options.

    `advantages_norm` whitens over all response tokens (always, for reinforce_plus_plus and
    reinforce_baseline); `advantage_clip` > 0 clamps to +-advantage_clip. `options` are those of
    the estimator.
    Raises: ValueError for an unknown estimator or option.
    """

    name: str
    kl_estimator: str = "k1"
    init_kl_coef: float = 0.001
    advantages_norm: bool = False
    advantage_clip: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.function, self.options, 1, f'advantage estimator "{self.name}"')

    @property
    def function(self) -> Callable[..., Any]:
        """The registered estimator."""
        return ESTIMATORS.get(self.name)  # type: ignore[no-any-return]

    @property
    def needs_values(self) -> bool:
        """Whether the estimator takes a critic's values."""
        return takes_values(self.function)

    def __call__(
        self,
        rewards: Tensor,
        group: Tensor,
        mask: Tensor,
        *,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        values: Tensor | None = None,
        reduce: Reduce = lambda tensor: tensor,
    ) -> Advantages:
        """Advantages of B samples.

        Args: rewards float [B]; group int [B], equal for the samples of one prompt; mask bool
            [B, T] of response tokens, a prefix of each row; values float [B, T] of a critic.
            With ref_logprobs and old_logprobs [B, T] the KL penalty goes into the reward:
            r_t = -init_kl_coef * KL_t + 1[t is the last token] * R. There only k1 has the policy
            gradient of the divergence; that of k2 and k3 is next to none near the reference, and
            may push away from it. `reduce` sums a tensor over ranks, for statistics that span them.
        Raises: ValueError for shapes that do not fit, a reward that is not finite (naming the
            sample), values that are missing, or what the estimator refuses.
        """
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
                raise ValueError(
                    "a KL penalty in the reward needs old_logprobs beside ref_logprobs"
                )
            kl = kl_divergence(old_logprobs, ref_logprobs, self.kl_estimator)
            kl = kl.double().where(mask, 0.0)
            tokens = tokens - self.init_kl_coef * kl
            samples = samples - self.init_kl_coef * kl.sum(-1)
        estimate = bind(self.function, self.options)
        seen = Rewards(samples, tokens, group, mask, reduce)
        if self.needs_values and values is None:
            raise ValueError(f'advantage estimator "{self.name}" needs the values of a critic')
        result = estimate(seen, values=values) if self.needs_values else estimate(seen)
        advantages = result.advantages
        if self.advantages_norm or self.name in WHITENED:
            advantages = whiten(advantages, mask, reduce)
        if (limit := self.advantage_clip) > 0:
            counts = torch.stack([(advantages.abs() > limit).sum(), mask.sum()]).double()
            clipped, total = reduce(counts).tolist()
            metrics["advantages/clipped_fraction"] = clipped / max(total, 1.0)
            advantages = advantages.clamp(-limit, limit)
        return Advantages(advantages, result.returns, {**result.metrics, **metrics})


def compute(
    estimator: str,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    **options: Any,
) -> Advantages:
    """`AdvantageEstimator` in one call: its fields, the arguments of its call, and the estimator's
    own options as keywords.

    >>> rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([7, 7])
    >>> compute("group_norm", rewards, group, torch.ones(2, 1).bool()).advantages.squeeze(1)
    tensor([ 0.7071, -0.7071])
    """
    inputs = {key: options.pop(key) for key in _INPUTS if key in options}
    shared = {key: options.pop(key) for key in _SHARED if key in options}
    return AdvantageEstimator(estimator, **shared, options=options)(rewards, group, mask, **inputs)


_INPUTS = ("old_logprobs", "ref_logprobs", "values", "reduce")
_SHARED = ("kl_estimator", "init_kl_coef", "advantages_norm", "advantage_clip")


def takes_values(function: Callable[..., Any]) -> bool:
    """Whether an estimator takes a critic's values: its call has a parameter of that name."""
    call = function.__call__ if isinstance(function, type) else function
    return "values" in inspect.signature(call).parameters


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
@dataclass(frozen=True)
class Reinforce:
    """REINFORCE (Williams, 1992): the discounted return sum_{k >= t} gamma^(k - t) r_k."""

    gamma: float = 1.0

    def __call__(self, rewards: Rewards) -> Advantages:
        returns = discounted_sum(rewards.tokens, self.gamma)
        advantages = returns.where(rewards.mask, 0.0).float()
        return Advantages(advantages, advantages)


# REINFORCE++ (arXiv:2501.03262) has the KL in the reward, its variant a baseline of the group's
# mean; `compute` whitens both.
ESTIMATORS.register("reinforce_plus_plus")(Reinforce)
ESTIMATORS.register("reinforce_baseline")(dr_grpo)


@ESTIMATORS.register("gae")
@dataclass(frozen=True)
class GAE:
    """GAE (arXiv:1506.02438) of a critic's `values` float [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lambd)^l delta_{t+l}, returns = A + V;
    V after the last token is 0.
    """

    gamma: float = 1.0
    lambd: float = 0.95

    def __call__(self, rewards: Rewards, values: Tensor) -> Advantages:
        inside = values.double().where(rewards.mask, 0.0)
        delta = rewards.tokens + self.gamma * F.pad(inside, (0, 1))[:, 1:] - inside
        delta = delta.where(rewards.mask, 0.0)
        advantages = discounted_sum(delta, self.gamma * self.lambd).where(rewards.mask, 0.0)
        return Advantages(advantages.float(), (advantages + inside).float())


@ESTIMATORS.register("cpgd")
@dataclass(frozen=True)
class CPGD:
    """CPGD (arXiv:2505.12504): centered rewards, weighted by `cpgd_weight`.

    std: / (std_g + 1e-6), as GRPO; clip_filter: times min(n / n_nonzero, 3), where n counts groups
    and n_nonzero those whose rewards differ; none: as they are.
    Raises: ValueError for an unknown weight.
    """

    cpgd_weight: str = "std"

    def __call__(self, rewards: Rewards) -> Advantages:
        centered, std = center_by_group(rewards.samples, rewards.group)
        if self.cpgd_weight == "std":
            return rewards.spread(centered / (std + 1e-6))
        if self.cpgd_weight == "clip_filter":
            groups = rewards.group.unique()
            varied = rewards.group[centered != 0].unique()
            sizes = torch.tensor([groups.numel(), varied.numel()], dtype=torch.float64)
            all_groups, all_varied = rewards.reduce(sizes.to(centered.device)).tolist()
            return rewards.spread(centered * min(all_groups / max(all_varied, 1.0), 3.0))
        if self.cpgd_weight == "none":
            return rewards.spread(centered)
        choices = "choose std, clip_filter or none"
        raise ValueError(f'cpgd_weight "{self.cpgd_weight}" is unknown; {choices}')


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
