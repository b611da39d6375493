"""Single requests to vLLM in the trainer's process, which come while others are decoded."""

from __future__ import annotations

import time
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from torchrft.rollout.engine import random_seed
from torchrft.types import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    from torchrft.rollout.vllm import VllmEngine

_PAUSE = 0.001  # seconds between two looks of ranks that all have nothing to do


class VllmServing:
    """See `torchrft.types.Serving`. A session's keys are in vLLM's prefix cache.

    The ranks of an engine must all run the same requests: each `advance` exchanges what is new, and
    goes on only when all ranks have called it.
    """

    def __init__(self, engine: VllmEngine, sampling: SamplingParams) -> None:
        self.engine = engine
        self.sampling = replace(sampling, n=1, seeds=None)
        self.numbers = count()
        self.new: list[tuple[int, Prompt, dict[str, Any]]] = []
        self.replies: dict[str, tuple[Prompt, Future[Completion]]] = {}
        self.ended = [False] * engine.ranks.size  # whether each rank has called `close`

    def submit(
        self, prompt: Prompt, seed: int | None, session: Hashable = None
    ) -> Future[Completion]:
        engine, number = self.engine, next(self.numbers)
        seed = random_seed(self.sampling) if seed is None else seed
        sampling = replace(self.sampling, seeds=((seed,),))
        engine.check([prompt], sampling)
        options = sampling_options(0, prompt, sampling, engine.stop_token_ids)
        reply: Future[Completion] = Future()
        self.new.append((number, prompt, options))
        self.replies[self._name(number, engine.ranks.rank)] = prompt, reply
        return reply

    def advance(self) -> bool:
        self._advance("open")
        return self.engine.ranks.size > 1 or bool(self.replies)

    def _advance(self, state: str) -> None:
        engine, ranks = self.engine, self.engine.ranks
        new, self.new = self.new, []
        parts = ranks.gather((new, state), "rollout")
        self.ended = [of_rank != "open" for _, of_rank in parts]
        for rank, (requests, of_rank) in enumerate(parts):
            if of_rank == "failed" and rank != ranks.rank:
                self.ended = [True] * ranks.size  # nobody exchanges anything any more
                raise ConnectionError(f"the engine's rank {rank} has failed")
            for number, prompt, options in requests:
                self._add(self._name(number, rank), prompt, options)
        if engine.llm.llm_engine.has_unfinished_requests():
            self._answer(engine.llm.llm_engine.step())
        elif ranks.size > 1:
            time.sleep(_PAUSE)

    def _add(self, name: str, prompt: Prompt, options: dict[str, Any]) -> None:
        from vllm.sampling_params import RequestOutputKind

        engine = self.engine
        parameters = engine.parameters(options, self.sampling.temperature)
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        engine.cached = True
        engine.llm.llm_engine.add_request(name, engine.input(prompt), parameters)

    def _answer(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.finished and output.request_id in self.replies:
                prompt, reply = self.replies.pop(output.request_id)
                (completion,) = self.engine.completions(0, prompt, output, self.sampling)
                if reply.set_running_or_notify_cancel():
                    reply.set_result(completion)

    @staticmethod
    def _name(number: int, rank: int) -> str:
        return f"{rank}-{number}"

    def release(self, session: Hashable) -> None:
        """vLLM drops what was not used for longest, where it needs the memory."""

    def close(self, failed: bool = False) -> None:
        if failed:
            self.engine.abort()
            for _, reply in self.replies.values():
                reply.cancel()
            if self.engine.ranks.size > 1 and not all(self.ended):
                self.new.clear()
                self.engine.ranks.gather(([], "failed"), "rollout")
            return
        while self.engine.ranks.size > 1 and not all(self.ended):
            self._advance("closed")


def sampling_options(
    place: int, prompt: Prompt, sampling: SamplingParams, stop_token_ids: tuple[int, ...]
) -> dict[str, Any]:
    """vLLM's sampling parameters for prompt number `place`, without the temperature."""
    # Sample j has the seed of sample 0 plus j: vLLM takes one seed for a request.
    seed = sampling.seeds[place][0] % 2**62 if sampling.seeds is not None else None
    return {
        "n": sampling.n,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "max_tokens": sampling.budget(len(prompt.token_ids)),
        "min_tokens": sampling.min_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*stop_token_ids, *sampling.stop_token_ids}),
        "ignore_eos": True,  # the end-of-sequence tokens are among the stop ids
        "detokenize": bool(sampling.stop),
        # Stop strings are looked for in the text that rewards see.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # of the sampled token
    }
