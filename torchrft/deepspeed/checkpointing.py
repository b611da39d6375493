"""`deepspeed.checkpointing`: activation checkpointing, by torch.utils.checkpoint."""

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

_configured = False


def configure(mpu_: None = None, deepspeed_config: Any = None, **options: Any) -> None:
    """Takes note that a script has configured it; raises ValueError for what is not done here.

    `partition_activations`, `contiguous_checkpointing`, `checkpoint_in_cpu`, `synchronize` and
    `profile` change where activations lie and what is logged, not results.
    """
    global _configured
    if mpu_ is not None:
        raise ValueError("checkpointing.configure has no mpu_: leave it out")
    known = {
        *("partition_activations", "contiguous_checkpointing", "num_checkpoints"),
        *("checkpoint_in_cpu", "synchronize", "profile"),
    }
    for name in options.keys() - known:
        raise ValueError(
            f"checkpointing.configure has no option {name}; valid: {', '.join(sorted(known))}"
        )
    _configured = True


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _configured


def reset() -> None:
    """Frees buffers in DeepSpeed; there are none here."""


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed again in the backward pass, with the same random numbers."""
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)
