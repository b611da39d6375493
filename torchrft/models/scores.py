"""Attention whose scores a model changes: soft caps and attention sinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class ScoreChange:
    """A cap bends a score s to cap * tanh(s / cap) (arXiv:2408.00118). `sinks` [H] are the scores
    of one more key for each query head, whose value is zero (arXiv:2309.17453)."""

    sinks: Tensor | None = None
    cap: float | None = None

    def weights(self, scores: Tensor, outside: Tensor) -> Tensor:
        """What values are weighed with [B, Hkv, G, ..., K], in the dtype of the scores.

        Args: scores of the same shape, already scaled, G query heads to a key head; outside bool,
            broadcast to it, true where a query does not look.
        """
        dtype, keys = scores.dtype, scores.shape[-1]
        if scores.element_size() < 4:
            scores = scores.float()
        if self.cap is not None:
            scores = (scores / self.cap).tanh() * self.cap
        scores = scores.masked_fill(outside, -torch.inf)
        if self.sinks is not None:
            by_head = self.sinks.to(scores.dtype).view(
                *scores.shape[1:3], *[1] * (scores.dim() - 3)
            )
            scores = torch.cat([scores, by_head.expand(*scores.shape[:-1], 1)], -1)
        return scores.softmax(-1)[..., :keys].to(dtype)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """[B, T, H, D] of query [B, H, T, D], holding all scores; causal where there is no mask
        (bool, true where a query looks, broadcast to [B, 1, T, K])."""
        kv_heads, length = key.shape[1:3]
        grouped = query.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, T, D]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        outside = ~(mask[:, :, None] if mask.dim() == 4 else mask)
        scores = grouped * scale @ key.unsqueeze(2).transpose(-1, -2)
        out = self.weights(scores, outside) @ value.unsqueeze(2)
        return out.flatten(1, 2).transpose(1, 2)


class Kernel(NamedTuple):
    """Attention that knows its log-sum-exps, as flash attention does (arXiv:2205.14135).

    forward(query, key, value) -> out, lse float32 [H, N]; backward(grad_out, query, key, value,
    out, lse) -> their gradients, from the weights exp(score - lse) and the `out` that it is given.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def attend_with_sinks(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor
) -> Tensor:
    """[N, H, D], as ScoreChange(sinks) has it, by a kernel that knows nothing of sinks."""
    return _Sinks.apply(kernel, query, key, value, sinks)


class _Sinks(torch.autograd.Function):
    """The sink takes its share of the weights: out * sigmoid(lse - sink) is left.

    The log-sum-exp over all keys and the sink is lse' = log(exp(lse) + exp(sink)). With lse' and
    the output that is left, the kernel's backward pass sees the weights exp(score - lse') and thus
    makes the gradients of attention with a sink. The sink's own score, whose value is zero, has the
    gradient -sum(grad * out) * exp(sink - lse').
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor
    ) -> Tensor:
        out, lse = kernel.forward(query, key, value)
        scores = sinks.to(lse.dtype)[:, None]  # [H, 1]
        left = (lse - scores).sigmoid().t()[..., None]
        out = (out * left).to(out.dtype)
        ctx.kernel = kernel
        ctx.save_for_backward(query, key, value, sinks, out, torch.logaddexp(lse, scores))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        products = (grad.to(lse.dtype) * out).sum(-1)  # [N, H]
        share = (sinks.to(lse.dtype)[:, None] - lse).exp()
        grad_sinks = -(products.t() * share).sum(1).to(sinks.dtype)
        return None, *ctx.kernel.backward(grad, query, key, value, out, lse), grad_sinks
