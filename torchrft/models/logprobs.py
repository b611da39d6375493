"""Log-probs and entropies of tokens from hidden states, with and without the whole logits.

Both functions compute, for row i with logits z = temperature^-1 * form(hidden_i @ weight^T), where
`form` is the identity for most models:

    logprob_i = z[label_i] - logsumexp(z)        entropy_i = logsumexp(z) - sum_v softmax(z)_v z_v

in float32, differentiable in `hidden` and `weight`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrft.models.logit_form import PLAIN, LogitForm
from torchrft.types import Kept

_OUT = -1e30  # a logit that is left out: far below all others, yet 0 times it is 0


@dataclass(frozen=True)
class Vocabulary:
    """A rank's part of a vocabulary that is split over `group`: tokens from `start` on."""

    group: dist.ProcessGroup
    start: int


@dataclass(frozen=True)
class Head:
    """How `head_logprob` makes log-probs of hidden states.

    At most `chunk_size` rows of logits exist at a time. `vocabulary` is a rank's part of it. With
    `kept`, one set of tokens for each row, the softmax is over those alone. With `fp32`, logits
    are float32 products of factors of a lower precision, which are never rounded to it. `form` is
    what the model does to its logits.
    """

    temperature: float = 1.0
    chunk_size: int = 4096
    vocabulary: Vocabulary | None = None
    kept: Kept | None = None
    fp32: bool = False
    form: LogitForm = PLAIN

    def logits(self, hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
        """The model's logits [n, V] of the `rows`, not yet divided by the temperature; what is not
        kept is so low that it adds nothing."""
        logits = product(hidden[rows], weight) if self.fp32 else hidden[rows] @ weight.t()
        logits = self.form(logits)
        if self.kept is None:
            return logits
        start = 0 if self.vocabulary is None else self.vocabulary.start
        kept = self.kept.part(rows).mask(logits.shape[1], start)
        return logits.masked_fill_(~kept, _OUT * min(self.temperature, 1.0))


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, D] @ weight [V, D]^T in float32: neither products nor sums are rounded to the
    factors' dtype."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
    form: LogitForm = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of `labels`, holding the logits [N, V].

    Args: hidden [N, D], weight [V, D] of one dtype; labels int64 [N]; temperature > 0. With
        `vocabulary`, weight is this rank's part of it; the logits of the others stay with them, and
        the gradient of `hidden` is this rank's part of a sum over the group. `form`: see `Head`.
    Returns: logprobs float32 [N], entropy float32 [N].
    """
    logits = form(hidden @ weight.t()).float() / temperature
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
    return head_logprob(hidden, weight, labels, Head(temperature, chunk_size, vocabulary))


def head_logprob(
    hidden: Tensor, weight: Tensor, labels: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """As `fused_linear_logprob`, with all that `head` says; entropies are those of its softmax."""
    return _FusedLinearLogprob.apply(hidden, weight, labels, head)


def _statistics(
    logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, logsumexp and entropy, float32 [N] each, of unscaled logits [N, V]."""
    logits = logits.float() / temperature
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, labels[:, None]).squeeze(-1) - lse
    return logprobs, lse, lse - ((logits - lse[:, None]).exp() * logits).sum(-1)


def _split_statistics(
    logits: Tensor, labels: Tensor, temperature: float, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits whose vocabulary is split over ranks."""
    logits = logits.float() / temperature
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
    temperature: float,
    lse: Tensor,
    entropy: Tensor,
    place: Tensor,
    grad_label: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """The gradient of unscaled logits [N, V], in their dtype.

    d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy). `grad_label` is what the
    onehot at `place` is multiplied with: 0 where the label is another rank's.
    """
    log_p = logits.float() / temperature - lse[:, None]
    inner = (log_p + entropy[:, None]) * grad_entropy[:, None] + grad_logprobs[:, None]
    onehot = torch.arange(logits.shape[1], device=logits.device) == place[:, None]
    grad = torch.where(onehot, grad_label[:, None], 0.0) - log_p.exp() * inner
    return (grad / temperature).to(logits.dtype)


@cache
def _one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for a GPU: instead of a dozen kernels, each of which reads and writes all logits."""
    return torch.compile(function, dynamic=True)  # not at import, where it costs a second


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
        logprobs, lse, entropy = _split_statistics(logits, labels, 1.0, vocabulary)
        place, here = _place(labels, vocabulary, logits.shape[1])
        ctx.save_for_backward(logits, place, here, lse, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, place, here, lse, entropy = ctx.saved_tensors
        grad_label = grads[0].where(here, 0.0)
        grad = _logit_gradient(logits, 1.0, lse, entropy, place, grad_label, *grads)
        return grad, None, None


class _FusedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        rows, chunk, vocabulary = hidden.shape[0], head.chunk_size, head.vocabulary
        logprobs, entropy, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
        statistics = _one_kernel(_statistics) if hidden.is_cuda else _statistics
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = head.logits(hidden, weight, part)
            if vocabulary is None:
                found = statistics(logits, labels[part], head.temperature)
            else:
                found = _split_statistics(logits, labels[part], head.temperature, vocabulary)
            logprobs[part], lse[part], entropy[part] = found
        place, here = labels, torch.ones_like(labels, dtype=torch.bool)
        if vocabulary is not None:
            place, here = _place(labels, vocabulary, weight.shape[0])
        ctx.save_for_backward(hidden, weight, place, here, lse, entropy)
        ctx.head = head
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, place, here, lse, entropy = ctx.saved_tensors
        head: Head = ctx.head
        grad_label = grads[0].where(here, 0.0)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed in float32: with bf16 weights the chunks' sums would lose digits otherwise.
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        gradient = _one_kernel(_logit_gradient) if hidden.is_cuda else _logit_gradient
        for start in range(0, hidden.shape[0], head.chunk_size):
            part = slice(start, start + head.chunk_size)
            logits = head.logits(hidden, weight, part)
            chunk = [x[part] for x in (lse, entropy, place, grad_label, *grads)]
            grad = gradient(logits, head.temperature, *chunk)
            grad = head.form.backward(grad, logits).to(weight.dtype)
            del logits
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[part])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32; on CUDA the product is never rounded to the factors' dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
