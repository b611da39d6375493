"""Sampling of one token per sequence, reproducible per sequence.

Random numbers are a function of (seed of the sequence, position in its response), so a sequence's
tokens do not depend on what else is in the batch or on the order of generation.
"""

from __future__ import annotations

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


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    forbidden: Tensor | None = None,
    draw_temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob.

    Args: logits float [B, V]; seeds, positions int64 [B]; temperature, 0 for the most likely token;
        forbidden bool [B, V], tokens that may not be chosen; draw_temperature, if another than
        `temperature` decides the draw.
    Returns: tokens int64 [B]; logprobs float32 [B] at `temperature` (at 1 when greedy), over all
        tokens: neither top-p, top-k nor `forbidden` changes them.
    """
    scaled = logits.float() / (temperature if temperature > 0 else 1.0)
    log_p = torch.log_softmax(scaled, dim=-1)
    drawn = log_p
    if draw_temperature is not None:
        drawn = torch.log_softmax(logits.float() / draw_temperature, dim=-1)
    allowed = drawn if forbidden is None else drawn.masked_fill(forbidden, -torch.inf)
    if temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        probs = keep_likely(allowed.exp(), top_p, top_k)
        cumulative = probs.double().cumsum(-1)
        point = uniforms(seeds, positions) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens, log_p.gather(-1, tokens[:, None]).squeeze(1)
