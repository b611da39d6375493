"""The order in which prompts are trained on, and how it is resumed."""

import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from torchrft.data.prompts import PromptDataset
from torchrft.types import Prompt


class PromptLoader:
    """Endless batches of prompts for one rank, in an order that only the seed decides.

    The order is an endless stream: pass after pass, each one a seeded permutation. A step takes the
    next `prompts_per_step` positions of the stream, so that a step may hold the end of one pass and
    the start of the next, and no prompt is ever skipped. Of these positions rank r takes those i
    with i % world_size == r. `position` counts prompts taken so far, over all ranks.

    >>> loader = PromptLoader(dataset, prompts_per_step=8, seed=0)  # doctest: +SKIP
    >>> len(loader.next())  # doctest: +SKIP
    8

    Its state is the same on all ranks and holds no number of ranks: a run may go on with more or
    fewer of them. Raises ValueError if `world_size` does not divide `prompts_per_step`.
    """

    def __init__(
        self,
        prompts: PromptDataset,
        prompts_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        if not len(prompts):
            raise ValueError("there are no prompts")
        if prompts_per_step % world_size:
            asked = f"{prompts_per_step} prompts per step"
            raise ValueError(f"{asked} cannot be divided among {world_size} ranks")
        self.prompts, self.seed = prompts, seed
        self.num_prompts, self.prompts_per_step = len(prompts), prompts_per_step
        self.content = prompts.digest()
        self.rank, self.world_size, self.position = rank, world_size, 0
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch has deprecated since.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            loader = StatefulDataLoader(
                prompts,
                batch_sampler=self._indices(),
                collate_fn=list,
                # Its own generator, or making the iterator would draw from the global one.
                generator=torch.Generator(),
            )
        # In this process a batch is made when it is asked for, so the stream's position is exact.
        assert loader.num_workers == 0
        self._batches: Iterator[list[Prompt]] = iter(loader)

    def _indices(self) -> Iterator[list[int]]:
        while True:
            step = range(self.position, self.position + self.prompts_per_step)
            self.position = step.stop
            yield [self._index(at) for at in step if at % self.world_size == self.rank]

    def _index(self, position: int) -> int:
        number, place = divmod(position, self.num_prompts)
        return int(_permutation(self.num_prompts, self.seed, number)[place])

    def next(self) -> list[Prompt]:
        """This rank's prompts of the next step."""
        return next(self._batches)

    def peek(self) -> list[Prompt]:
        """What the next call of `next` returns; the position stays."""
        position = self.position
        try:
            return self.next()
        finally:
            self.position = position

    def at(self, position: int) -> Prompt:
        """The prompt at a position of the stream."""
        return self.prompts[self._index(position)]

    @property
    def episode(self) -> float:
        """Passes over the prompts finished so far, with the part of the current one."""
        return self.position / self.num_prompts

    def finished_episode(self, every: int, since: int) -> bool:
        """Whether the `every`-th, 2 * `every`-th, … pass ended since position `since`."""
        length = every * self.num_prompts
        return self.position // length > since // length

    def total_steps(self, num_episodes: int) -> int:
        """Steps after which every prompt has been taken at least `num_episodes` times."""
        # Whole numbers: a quotient of floats may lie just above the whole number it should be.
        return -(-num_episodes * self.num_prompts // self.prompts_per_step)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what its order follows from."""
        order = {"seed": self.seed, "num_prompts": self.num_prompts}
        return {"position": self.position, **order, "content": self.content}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; raises ValueError if it belongs to another order of prompts."""
        for key, value in (("num_prompts", self.num_prompts), ("seed", self.seed)):
            if state[key] != value:
                held = f"the checkpoint has {key} = {state[key]}, this run {value}"
                remedy = "bring back what is missing, or start anew with another save_path"
                raise ValueError(f"cannot resume the prompt order: {held}; {remedy}")
        before = state.get("content", self.content)  # earlier versions did not keep it
        changed = [name for name, value in self.content.items() if before[name] != value]
        if changed:
            other = "the same prompts in another order" if changed[0] == "order" else "other labels"
            other = "other prompts" if "prompts" in changed else other
            raise ValueError(
                f"cannot resume the prompt order: prompt_data has {other} than when the checkpoint "
                "was saved (tokens, labels, metadata columns); bring back the file and the [data] "
                "options, or start anew with another save_path and pretrain = hf/step-N of this run"
            )
        self.position = int(state["position"])


@lru_cache(maxsize=2)
def _permutation(num_prompts: int, seed: int, number: int) -> torch.Tensor:
    """The order of pass `number`; SeedSequence keeps (seed 1, pass 0) and (0, 1) apart."""
    mixed = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    return torch.randperm(num_prompts, generator=generator)
