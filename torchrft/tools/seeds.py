"""Random state: seed everything, save and restore it, derive independent seeds."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every integer and on their order.

    Pure integer arithmetic on a hash, so the result is equal on every platform and version, and
    seeds of neighboring inputs are unrelated.

    >>> derive_seed(42, 0, 1)
    3185412929265305880
    """
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and every CUDA device); `seed` is 0 or more."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, without tensors, ready to be pickled."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().cpu().numpy().tobytes()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned.

    A state saved without CUDA leaves the CUDA generator alone, and the other way round.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["cuda"]), dtype=torch.uint8))
