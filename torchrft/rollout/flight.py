"""A round of generation that runs in another thread while the trainer computes."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

from torchrft.types import Completion, SamplingParams


@dataclasses.dataclass(frozen=True)
class Flight:
    """Completions under way for the prompts at `places`, made when the stream was at `position`.

    `options` say how they are sampled, but for the seeds, which follow from the places.
    """

    position: int
    places: list[int]
    options: dict[str, Any]
    completions: Future[list[Completion]]

    def rows(self) -> list[tuple[int, Completion]] | None:
        """This rank's completions with their places, or None if they are not complete."""
        done = self.completions
        if not done.done() or done.exception() is not None:
            return None
        return [(self.places[c.prompt_index], c) for c in done.result()]

    @classmethod
    def landed(
        cls,
        position: int,
        places: Sequence[int],
        sampling: SamplingParams,
        rows: Sequence[tuple[int, Completion]],
    ) -> Self:
        """A complete flight of this rank's prompts, out of the `rows` of all ranks."""
        index = {place: number for number, place in enumerate(places)}
        own = [
            dataclasses.replace(completion, prompt_index=index[place])
            for place, completion in rows
            if place in index
        ]
        own.sort(key=lambda completion: (completion.prompt_index, completion.sample_index))
        completions = Future[list[Completion]]()
        completions.set_result(own)
        return cls(position, list(places), without_seeds(sampling), completions)


def without_seeds(sampling: SamplingParams) -> dict[str, Any]:
    """The options of `sampling`, whose seeds follow from the prompts' places."""
    return dataclasses.asdict(dataclasses.replace(sampling, seeds=None))
