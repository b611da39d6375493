"""Log-probs and entropies of tokens from hidden states, with and without the whole logits.

Both functions compute, for row i with logits z = temperature^-1 * (hidden_i @ weight^T):

    logprob_i = z[label_i] - logsumexp(z)        entropy_i = logsumexp(z) - sum_v softmax(z)_v z_v

in float32, differentiable in `hidden` and `weight`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_logprob(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of `labels`, holding the logits [N, V].

    Args: hidden [N, D], weight [V, D] of one dtype; labels int64 [N]; temperature > 0.
    Returns: logprobs float32 [N], entropy float32 [N].
    """
    logits = (hidden @ weight.t()).float() / temperature
    return logprob_and_entropy(logits, labels)


def logprob_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same from float32 logits [N, V] that are already divided by the temperature."""
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 4096,
) -> tuple[Tensor, Tensor]:
    """As `linear_logprob`, but at most `chunk_size` rows of logits exist at any time.

    The forward pass keeps one logsumexp and one entropy per row; the backward pass computes each
    chunk's logits again. That costs one more matmul and saves N x V floats twice.

    Args: hidden [N, D], weight [V, D] of one dtype; labels int64 [N]; temperature > 0;
        chunk_size > 0 rows.
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
    return _FusedLinearLogprob.apply(hidden, weight, labels, temperature, chunk_size)


class _FusedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        logprobs, entropy, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float().div_(temperature)
            lse[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, labels[part, None]).squeeze(-1) - lse[part]
            probs = (logits - lse[part, None]).exp_()
            entropy[part] = lse[part] - (probs * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
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
            logits = (hidden[part] @ weight.t()).float().div_(ctx.temperature)
            log_p = logits.sub_(lse[part, None])
            probs = log_p.exp()
            # d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
            grad = log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None])
            grad = grad.add_(grad_logprobs[part, None]).mul_(probs).neg_()
            grad.scatter_add_(-1, labels[part, None], grad_logprobs[part, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None
