"""Sampling of one token per sequence, reproducible per sequence.

Random numbers are a function of (seed of the sequence, position in its response), so a sequence's
tokens do not depend on what else is in the batch or on the order of generation.
"""

import math
from typing import Any

import torch
from torch import Tensor

_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (int64's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 [B] in [0, 1): SplitMix64 (Steele et al., 2014) of int64 seeds and positions [B]."""
    x = seeds + (positions + 1) * _INCREMENT
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def keep_likely(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zeroes what top-k, then top-p (Holtzman et al., 2020) leave out of probs [B, V].

    Tokens as likely as the last one kept are kept too; the result is not renormalized.
    """
    vocabulary = probs.shape[-1]
    if 0 < top_k < vocabulary:
        least = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = probs.where(probs >= least, 0.0)
    if top_p < 1.0:
        ordered = probs.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        inside = before < top_p * ordered.sum(-1, keepdim=True)
        least = ordered.where(inside, torch.inf).amin(-1, keepdim=True)
        probs = probs.where(probs >= least, 0.0)
    return probs


def sample(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: what `sample_among` returns first, for its arguments."""
    return sample_among(*arguments, **options)[:2]


def sample_among(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    forbidden: Tensor | None = None,
    draw_temperature: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row, its log-prob, and what it was drawn among.

    Args: logits float [B, V]; seeds, positions int64 [B]; temperature, 0 for the most likely token;
        forbidden bool [B, V], tokens that may not be chosen; draw_temperature, if another than
        `temperature` decides the draw.
    Returns: tokens int64 [B]; logprobs float32 [B] at `temperature` (at 1 when greedy), over all
        tokens: neither top-p, top-k nor `forbidden` changes them; probs float32 [B, V] of the draw,
        up to a factor, 0 for tokens that were left out (over all tokens when greedy).
    """
    # At T = 1 the softmax reads 16-bit logits directly: a step is bound by passes over [B, V].
    scaled = logits if temperature in (0, 1) else logits.float() / temperature
    probs = scaled.softmax(-1, dtype=torch.float32)
    drawn = probs
    if temperature == 0:
        allowed = logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)
        tokens = allowed.argmax(-1)
    else:
        if draw_temperature is not None or forbidden is not None:
            allowed = scaled if draw_temperature is None else logits.float() / draw_temperature
            if forbidden is not None:  # before the softmax: the others may be tiny beside it
                allowed = allowed.masked_fill(forbidden, -torch.inf)
            drawn = allowed.softmax(-1, dtype=torch.float32)
        drawn = keep_likely(drawn, top_p, top_k)
        tokens = draw(drawn, uniforms(seeds, positions))
    # Against the likeliest token, since a probability of its own may be too small for float32.
    behind = scaled.gather(-1, tokens[:, None]).float() - scaled.amax(-1, keepdim=True).float()
    return tokens, (behind + probs.amax(-1, keepdim=True).log()).squeeze(1), drawn


def draw(probs: Tensor, points: Tensor) -> Tensor:
    """int64 [B]: the token at which the cumulative probs [B, V] pass points [B] (of their total).

    Summed in float64, and in two steps where V allows it: first the block of tokens, then the token
    in it, so that only sums of blocks and one block are held in float64.
    """
    batch, vocabulary = probs.shape
    width = math.gcd(vocabulary, 256)
    if width < 16:
        return _pass(probs.double().cumsum(-1), points[:, None]).squeeze(1)
    blocks = probs.view(batch, -1, width)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    block = _pass(cumulative, points[:, None])
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, width)).squeeze(1)
    inner = inside.double().cumsum(-1)
    rest = points[:, None] * cumulative[:, -1:] - before
    return (block * width + _pass(inner, rest / inner[:, -1:])).squeeze(1)


def _pass(cumulative: Tensor, share: Tensor) -> Tensor:
    """int64 [B, 1]: where the rows of cumulative [B, N] pass `share` [B, 1] of their last entry."""
    total = cumulative[:, -1:]
    # Rounding must not lead past the last entry that adds anything.
    point = torch.minimum(share * total, total * (1 - 2.0**-40))
    if cumulative.is_cuda:  # where a search would wait for memory at every comparison
        passed = (cumulative <= point).sum(-1, keepdim=True)
    else:
        passed = torch.searchsorted(cumulative, point, right=True)
    # Weights that hold NaN end in some token, and in a loss that is skipped.
    return passed.clamp_(max=cumulative.shape[1] - 1)
