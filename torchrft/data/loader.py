"""The order in which prompts are trained on, and how it is resumed."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from torchrft.data.prompts import PromptDataset
from torchrft.types import Prompt


@lru_cache(maxsize=2)
def _permutation(num_prompts: int, seed: int, number: int) -> torch.Tensor:
    """The order of pass `number`; SeedSequence keeps (seed 1, pass 0) and (0, 1) apart."""
    mixed = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    return torch.randperm(num_prompts, generator=generator)


class PromptLoader:
    """Endless batches of prompts for one rank, in an order that only the seed decides.

    The prompts are an endless stream: pass after pass, each one a seeded permutation. A step takes
    the next `prompts_per_step` positions of it, so that a step may hold the end of one pass and the
    start of the next, and no prompt is ever skipped. Of these positions rank r takes those i with
    i % world_size == r.

    >>> loader = PromptLoader(dataset, prompts_per_step=8, seed=0)  # doctest: +SKIP
    >>> len(loader.next())  # doctest: +SKIP
    8

    `position` counts prompts taken so far, over all ranks. The state is the same on all ranks and
    holds no number of ranks: a run may go on with more or fewer of them. Raises ValueError if
    `world_size` does not divide `prompts_per_step`.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        prompts_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        if not len(dataset):
            raise ValueError("there are no prompts")
        if prompts_per_step % world_size:
            raise ValueError(
                f"{prompts_per_step} prompts per step cannot be divided among {world_size} ranks"
            )
        self.dataset, self.prompts_per_step, self.seed = dataset, prompts_per_step, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0

    def next(self) -> list[Prompt]:
        """This rank's prompts of the next step."""
        prompts = self.peek()
        self.position += self.prompts_per_step
        return prompts

    def peek(self) -> list[Prompt]:
        """What the next call of `next` returns; the position stays."""
        positions = range(self.position, self.position + self.prompts_per_step)
        return [self._prompt(i) for i in positions if i % self.world_size == self.rank]

    def _prompt(self, position: int) -> Prompt:
        number, place = divmod(position, len(self.dataset))
        return self.dataset[int(_permutation(len(self.dataset), self.seed, number)[place])]

    @property
    def episode(self) -> float:
        """Passes over the prompts finished so far, with the part of the current one."""
        return self.position / len(self.dataset)

    def finished_episode(self, every: int, since: int) -> bool:
        """Whether the `every`-th, 2 * `every`-th, … pass ended since position `since`."""
        length = every * len(self.dataset)
        return self.position // length > since // length

    def total_steps(self, num_episodes: int) -> int:
        """Steps after which every prompt has been taken at least `num_episodes` times."""
        # Whole numbers: a quotient of floats may lie just above the whole number it should be.
        return -(-num_episodes * len(self.dataset) // self.prompts_per_step)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: `position` counts prompts taken over all ranks."""
        return {"position": self.position, **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; raises ValueError if it belongs to another order of prompts."""
        for key, value in self._order().items():
            if state[key] != value:
                raise ValueError(
                    f"cannot resume the prompt order: the checkpoint has {key} = {state[key]}, "
                    f"this run {value}"
                )
        self.position = int(state["position"])

    def _order(self) -> dict[str, int]:
        return {"num_prompts": len(self.dataset), "seed": self.seed}
