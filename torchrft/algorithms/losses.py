"""Policy losses: log-probs and advantages of tokens in, one differentiable number out.

A policy loss is a frozen record of its options; called, it returns the losses of tokens.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from torchrft.algorithms.aggregation import Denominators, aggregate, token_mean
from torchrft.algorithms.corrections import correction_weights
from torchrft.algorithms.kl import kl_divergence
from torchrft.algorithms.options import bind, check_options
from torchrft.tools.registry import Registry

Metrics = dict[str, Tensor]

LOSSES: Registry[Any] = Registry("policy_loss")
TENSORS = 4  # arguments of a loss that are no options
_TOKEN_MEAN = {"cispo"}  # the others' papers average over each sequence first


@dataclass(frozen=True)
class Tokens:
    """The tensors of a policy loss: float32 [B, T] of response tokens, where `mask` bool is true.

    `keep` bool [B, T] marks the tokens that keep their policy loss (see `high_entropy_mask`); the
    denominators count the others too. `rollout_logprobs` are the engine's.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    keep: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for unequal shapes."""
        for other in (getattr(self, name) for name in self.__dataclass_fields__):
            if other is not None and other.shape != self.logprobs.shape:
                shapes = f"{tuple(other.shape)} differs from {tuple(self.logprobs.shape)}"
                raise ValueError(f"shape {shapes}")


@dataclass(frozen=True)
class PolicyLoss:
    """agg(w * token losses of `name`) + init_kl_coef * agg(KL) - entropy_coef * agg(entropy).

    `options` are those of the registered loss `name`; left out, they are those of its paper.
    `loss_aggregation` is by default the paper's, too. `rollout_correction` weighs or drops terms by
    the engine's log-probs (see `corrections`).
    Raises: ValueError for an unknown loss or option, or token weights in gmpo, a loss of sequences.
    """

    name: str
    loss_aggregation: str | None = None
    kl_estimator: str = "k3"
    init_kl_coef: float = 0.001
    entropy_coef: float = 0.0
    rollout_correction: str = "none"
    rollout_correction_cap: float = 2.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.function, self.options, TENSORS, f'policy loss "{self.name}"')
        self._refuse_token_weights(self.rollout_correction.startswith("token_"))

    @property
    def function(self) -> Callable[..., Any]:
        """The registered loss."""
        return LOSSES.get(self.name)  # type: ignore[no-any-return]

    @property
    def aggregation(self) -> str:
        """`loss_aggregation`, or the paper's."""
        paper = "token_mean" if self.name in _TOKEN_MEAN else "seq_mean_token_mean"
        return self.loss_aggregation or paper

    def with_coefficients(self, init_kl_coef: float, cpgd_drift_coef: float) -> Self:
        """The same loss with other weights of the KL term and of CPGD's drift, if it has one."""
        options = dict(self.options)
        if "cpgd_drift_coef" in options:
            options["cpgd_drift_coef"] = cpgd_drift_coef
        return replace(self, init_kl_coef=init_kl_coef, options=options)

    def __call__(self, tokens: Tokens, denominators: Denominators) -> tuple[Tensor, Metrics]:
        """The scalar loss, and metrics that add up over micro-batches and ranks.

        The metrics are policy/loss, policy/kl, policy/approx_kl (k3 of policy and old policy) and
        the loss's own.
        Raises: ValueError for tensors that the options need and `tokens` lack, an unknown
            aggregation, or a missing max_response_length.
        """
        mask, how = tokens.mask, self.aggregation
        self._refuse_token_weights(tokens.keep is not None)
        # Masked before use, not only after: a gradient of 0 times a masked NaN would still be NaN.
        seen = (tokens.logprobs, tokens.old_logprobs, tokens.advantages)
        logprobs, old_logprobs, advantages = (tensor.where(mask, 0.0) for tensor in seen)
        token_loss = bind(self.function, self.options)
        losses, measured = token_loss(logprobs, old_logprobs, advantages, mask)
        if (kind := self.rollout_correction) != "none":
            option, cap = f'rollout_correction "{kind}"', self.rollout_correction_cap
            engine = _needed(tokens.rollout_logprobs, option, "rollout_logprobs")
            losses = losses * correction_weights(kind, old_logprobs, engine, mask, cap)
        losses = losses if tokens.keep is None else losses.where(tokens.keep, 0.0)
        loss = aggregate(losses, mask, how, denominators)
        measured["policy/approx_kl"] = kl_divergence(old_logprobs, logprobs.detach(), "k3")
        measured["policy/kl"] = torch.zeros_like(logprobs)
        if tokens.ref_logprobs is not None:
            reference = tokens.ref_logprobs.where(mask, 0.0)
            kl = measured["policy/kl"] = kl_divergence(logprobs, reference, self.kl_estimator)
            loss = loss + self.init_kl_coef * aggregate(kl, mask, how, denominators)
        if self.entropy_coef:
            coefficient = f"entropy_coef = {self.entropy_coef}"
            entropy = _needed(tokens.entropy, coefficient, "the tokens' entropy")
            loss = loss - self.entropy_coef * aggregate(entropy, mask, how, denominators)
        means = {name: token_mean(value, mask, denominators) for name, value in measured.items()}
        return loss, means | {"policy/loss": loss.detach()}

    def _refuse_token_weights(self, weighs_tokens: bool) -> None:
        if self.name == "gmpo" and weighs_tokens:
            raise ValueError(
                "tokens cannot be chosen or weighed in gmpo, whose loss is of sequences"
            )


def policy_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominators: Denominators | None = None,
    max_response_length: float | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """`PolicyLoss` in one call: its fields, those of `Tokens` and the loss's options as keywords.

    Left out, denominators are the batch's own, and there is no KL term without ref_logprobs.
    `seq_mean_token_sum_norm` needs max_response_length, here or in `denominators`.
    """
    tensors = {key: options.pop(key) for key in Tokens.__dataclass_fields__ if key in options}
    tokens = Tokens(logprobs, old_logprobs, advantages, mask, **tensors)
    shared = {key: options.pop(key) for key in _SHARED if key in options}
    loss = PolicyLoss(name, **shared, options=options)
    return loss(tokens, _denominators(denominators, mask, max_response_length))


_SHARED = [
    key for key in inspect.signature(PolicyLoss).parameters if key not in ("name", "options")
]


def _denominators(given: Denominators | None, mask: Tensor, budget: float | None) -> Denominators:
    chosen = given or Denominators.of(mask)
    return chosen if budget is None else replace(chosen, max_response_length=budget)


def _needed(tensor: Tensor | None, option: str, what: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{option} needs {what}")
    return tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip: float = 0.2,
    loss_aggregation: str = "seq_mean_token_mean",
    denominators: Denominators | None = None,
    max_response_length: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's critic loss: agg(max((V_clip - ret)^2, (V - ret)^2)) / 2.

    V_clip = V_old + clamp(V - V_old, +-value_clip). Args: values, old_values, returns float32
    [B, T]; mask bool [B, T]; aggregation and denominators as in `policy_loss`.
    Returns: the scalar loss, and metrics that add up like those of `policy_loss`.
    """
    denominators = _denominators(denominators, mask, max_response_length)
    values, old_values, returns = (x.where(mask, 0.0) for x in (values, old_values, returns))
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    loss = aggregate(torch.maximum(plain, clipped), mask, loss_aggregation, denominators) / 2
    return loss, {
        "clip_fraction": token_mean((clipped > plain).float(), mask, denominators),
        "value_mean": token_mean(values, mask, denominators),
    }


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """l = logprobs - old_logprobs, clamped to +-20 so that exp(l) stays finite."""
    return (logprobs - old_logprobs).clamp(-20.0, 20.0)


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1], mean over each sequence's response tokens."""
    return values.where(mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Metrics]:
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    losses = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        limit = -dual_clip * advantages
        beyond = (advantages < 0) & (limit < losses)
        losses, clipped = torch.where(beyond, limit, losses), clipped | beyond
    return losses, {"policy/clip_fraction": clipped.float()}


@LOSSES.register("ppo_clip")
@dataclass(frozen=True)
class PPOClip:
    """PPO's clipped surrogate (arXiv:1707.06347), with separate bounds (clip-higher, DAPO).

    max(-r A, -clamp(r, 1 - clip_range, 1 + clip_range_higher) A) with r = exp(l), per token [B, T];
    with dual_clip c > 1 (arXiv:1912.09729) and A < 0 at most -c A.
    """

    clip_range: float = 0.2
    clip_range_higher: float = 0.3
    dual_clip: float | None = None

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        ratio = log_ratio(logprobs, old_logprobs).exp()
        return _clipped(ratio, advantages, self.clip_range, self.clip_range_higher, self.dual_clip)


@LOSSES.register("gspo")
@dataclass(frozen=True)
class GSPO:
    """GSPO-token (arXiv:2507.18071): ppo_clip on the sequence's ratio, the gradient per token.

    s_i = exp(mean_t l_t), s_it = sg[s_i] exp(logprob_t - sg[logprob_t]). The clip ranges of the
    paper's experiments are 3e-4 and 4e-4: a mean of logarithms moves little.
    """

    clip_range: float = 3e-4
    clip_range_higher: float = 4e-4

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        sequence = _sequence_mean(log_ratio(logprobs, old_logprobs), mask).exp().detach()
        ratio = sequence * (logprobs - logprobs.detach()).exp()
        return _clipped(ratio, advantages, self.clip_range, self.clip_range_higher)


@LOSSES.register("gmpo")
@dataclass(frozen=True)
class GMPO:
    """GMPO (arXiv:2507.20673): the geometric mean of the token ratios, clipped token by token.

    l'_t = sgn(A) min(sgn(A) l_t, sgn(A) clamp(l_t, -clip_range, clip_range_higher)), and the loss
    of sequence i is -A_i exp(mean_t l'_t), the same on all its tokens. The clip is in log space:
    the paper's range of ratios is e^-0.4 to e^0.4.
    """

    clip_range: float = 0.4
    clip_range_higher: float = 0.4

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        log_r = log_ratio(logprobs, old_logprobs)
        bounded = log_r.clamp(-self.clip_range, self.clip_range_higher)
        sign = advantages.sign()
        chosen = sign * torch.minimum(sign * log_r, sign * bounded)
        losses = -advantages * _sequence_mean(chosen, mask).exp()
        return losses, {"policy/clip_fraction": (sign * bounded < sign * log_r).float()}


@LOSSES.register("cpgd")
@dataclass(frozen=True)
class CPGD:
    """CPGD (arXiv:2505.12504): clipped log-ratio and a drift that holds the policy to the old one.

    -min(l A, clamp(l, ln(1 - clip_range), ln(1 + clip_range_higher)) A) + cpgd_drift_coef * drift,
    drift_t = (exp(l_t) - 1) - l_t, an estimate of KL(old || policy).
    Raises: ValueError for clip_range >= 1, whose logarithm does not exist.
    """

    clip_range: float = 0.2
    clip_range_higher: float = 0.3
    cpgd_drift_coef: float = 0.001

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        if self.clip_range >= 1:
            raise ValueError(
                f"cpgd clips at ln(1 - clip_range): clip_range {self.clip_range} must be < 1"
            )
        log_r = log_ratio(logprobs, old_logprobs)
        bounded = log_r.clamp(math.log(1 - self.clip_range), math.log(1 + self.clip_range_higher))
        plain, limited = log_r * advantages, bounded * advantages
        drift = log_r.exp() - 1 - log_r
        losses = -torch.minimum(plain, limited) + self.cpgd_drift_coef * drift
        clipped = (limited < plain).float()
        return losses, {"policy/clip_fraction": clipped, "policy/drift": drift.detach()}


@LOSSES.register("cispo")
@dataclass(frozen=True)
class CISPO:
    """CISPO (arXiv:2506.13585): -sg[clamp(r, 1 - clip_range, 1 + clip_range_higher)] A logprob.

    No token loses its gradient: the ratio is only a weight. The paper sets no lower bound, which is
    clip_range = 1, and gives no number for the upper one, which is the guide's.
    """

    clip_range: float = 1.0
    clip_range_higher: float = 0.3

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        ratio = log_ratio(logprobs, old_logprobs).exp().detach()
        weight = ratio.clamp(1 - self.clip_range, 1 + self.clip_range_higher)
        return -weight * advantages * logprobs, {"policy/clip_fraction": (weight != ratio).float()}


@LOSSES.register("reinforce")
@dataclass(frozen=True)
class Reinforce:
    """REINFORCE (Williams, 1992): -A logprob; the ratio to the old policy plays no part."""

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Metrics]:
        return -advantages * logprobs, {"policy/clip_fraction": torch.zeros_like(advantages)}
