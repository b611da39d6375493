"""Log-probs and entropies of tokens from hidden states, with and without the whole logits.

Both functions compute, for row i with logits z = temperature^-1 * (hidden_i @ weight^T):

    logprob_i = z[label_i] - logsumexp(z)        entropy_i = logsumexp(z) - sum_v softmax(z)_v z_v

in float32, differentiable in `hidden` and `weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Vocabulary:
    """A rank's part of a vocabulary that is split over `group`: tokens from `start` on."""

    group: dist.ProcessGroup
    start: int


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of `labels`, holding the logits [N, V].

    Args: hidden [N, D], weight [V, D] of one dtype; labels int64 [N]; temperature > 0. With
        `vocabulary`, weight is this rank's part of it; the logits of the others stay with them, and
        the gradient of `hidden` is this rank's part of a sum over the group.
    Returns: logprobs float32 [N], entropy float32 [N].
    """
    logits = (hidden @ weight.t()).float() / temperature
    if vocabulary is not None:
        return _SplitLogprob.apply(logits, labels, vocabulary)
    return logprob_and_entropy(logits, labels)


def logprob_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same from float32 logits [N, V] that are already divided by the temperature."""
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return -F.nll_loss(log_p, labels, reduction="none"), entropy


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 4096,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_logprob`, but at most `chunk_size` rows of logits exist at any time.

    The forward pass keeps one logsumexp and one entropy per row; the backward pass computes each
    chunk's logits again. That costs one more matmul and saves N x V floats twice.

    Args: hidden [N, D], weight [V, D] of one dtype; labels int64 [N]; temperature > 0;
        chunk_size > 0 rows; vocabulary as in `linear_logprob`.
    Returns: logprobs float32 [N], entropy float32 [N].
    Raises: ValueError for shapes that do not fit, or a non-positive temperature or chunk_size.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D], [V, D]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be [{hidden.shape[0]}]")
    if temperature <= 0 or chunk_size <= 0:
        raise ValueError(f"temperature {temperature} and chunk_size {chunk_size} must be positive")
    return _FusedLinearLogprob.apply(hidden, weight, labels, temperature, chunk_size, vocabulary)


def _statistics(
    logits: Tensor, labels: Tensor, vocabulary: Vocabulary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, logsumexp and entropy, float32 [N] each, of logits [N, V] or a part of them."""
    if vocabulary is None:
        lse = logits.logsumexp(-1)
        logprobs = logits.gather(-1, labels[:, None]).squeeze(-1) - lse
        probs = (logits - lse[:, None]).exp_()
        return logprobs, lse, lse - (probs * logits).sum(-1)
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=vocabulary.group)
    weights = (logits - largest[:, None]).exp_()
    place, here = _place(labels, vocabulary, logits.shape[1])
    chosen = logits.gather(-1, place[:, None]).squeeze(-1).where(here, 0.0)
    sums = torch.stack([weights.sum(-1), (weights * logits).sum(-1), chosen])
    dist.all_reduce(sums, group=vocabulary.group)
    total, weighted, chosen = sums.unbind()
    lse = largest + total.log()
    return chosen - lse, lse, lse - weighted / total


def _logit_gradient(
    logits: Tensor,
    lse: Tensor,
    entropy: Tensor,
    labels: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    vocabulary: Vocabulary | None,
) -> Tensor:
    """The gradient of logits [N, V], which are overwritten by it."""
    log_p = logits.sub_(lse[:, None])
    probs = log_p.exp()
    # d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
    grad = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
    grad = grad.add_(grad_logprobs[:, None]).mul_(probs).neg_()
    if vocabulary is not None:
        labels, here = _place(labels, vocabulary, logits.shape[1])
        grad_logprobs = grad_logprobs.where(here, 0.0)
    return grad.scatter_add_(-1, labels[:, None], grad_logprobs[:, None])


def _place(labels: Tensor, vocabulary: Vocabulary, size: int) -> tuple[Tensor, Tensor]:
    """Column of each label in this rank's part, and whether it is there (else the column is 0)."""
    place = labels - vocabulary.start
    here = (place >= 0) & (place < size)
    return place.where(here, 0), here


class _SplitLogprob(torch.autograd.Function):
    """logprob_and_entropy of logits whose vocabulary is split over ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        logprobs, lse, entropy = _statistics(logits, labels, vocabulary)
        ctx.save_for_backward(logits, labels, lse, entropy)
        ctx.vocabulary = vocabulary
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse, entropy = ctx.saved_tensors
        of_logprobs, of_entropy = grads
        grad = _logit_gradient(
            logits.clone(), lse, entropy, labels, of_logprobs, of_entropy, ctx.vocabulary
        )
        return grad, None, None


class _FusedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk: int,
        vocabulary: Vocabulary | None,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        logprobs, entropy, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float().div_(temperature)
            logprobs[part], lse[part], entropy[part] = _statistics(logits, labels[part], vocabulary)
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.temperature, ctx.chunk, ctx.vocabulary = temperature, chunk, vocabulary
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed in float32: with bf16 weights the chunks' sums would lose digits otherwise.
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = _logit_gradient(
                (hidden[part] @ weight.t()).float().div_(ctx.temperature),
                lse[part],
                entropy[part],
                labels[part],
                grad_logprobs[part],
                grad_entropy[part],
                ctx.vocabulary,
            )
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None
