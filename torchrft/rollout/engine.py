"""The protocol every rollout engine speaks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from torchrft.types import Completion, Prompt, SamplingParams


class RolloutEngine(Protocol):
    """Generates completions with a policy whose weights arrive from the trainer.

    One engine serves one rank (or engine_tp_size ranks together). The trainer calls, every step:
    wake, update_weights, generate, sleep.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """`sampling.n` completions of every prompt, prompt by prompt, in order.

        Raises ValueError for a prompt that leaves no room for a response.
        """

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over every weight, by Hugging Face name; later completions carry `version`.

        Raises ValueError naming the first unknown, missing or misshapen tensor.
        """

    def sleep(self) -> None:
        """Give memory back: the KV cache and the weights, which must be sent again after `wake`."""

    def wake(self) -> None:
        """Take the memory again."""

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
