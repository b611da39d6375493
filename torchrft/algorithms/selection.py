"""Which response tokens count in the policy loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def high_entropy_mask(
    entropy: Tensor,
    mask: Tensor,
    high_entropy_token_ratio: float,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """The top share of response tokens by entropy (arXiv:2506.01939), bool [B, T].

    Args: entropy float32 [B, T]; mask bool [B, T] of response tokens; 0 < ratio <= 1 of them are
        kept, rounded up, and those as uncertain as the last one kept. `gather` concatenates a
        tensor [N] over ranks (and micro-batches), so that the choice is made over all of them.
    """
    pool = gather(entropy[mask])
    count = math.ceil(high_entropy_token_ratio * pool.numel() - 1e-9)
    if count == 0:
        return torch.zeros_like(mask)
    return mask & (entropy >= pool.topk(count).values[-1])
