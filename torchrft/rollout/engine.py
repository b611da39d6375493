"""The protocol every rollout engine speaks."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from torchrft.models.tokenizer import decode
from torchrft.tools.distributed import DataRanks
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


def check_prompts(
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    version: int | None,
    sees_images: bool = False,
    vocabulary: int | None = None,
    longest: int | None = None,
) -> None:
    """Raises ValueError for an engine without weights (`version` None), and for a prompt that is
    empty, leaves no room for a response, has images that the engine does not see, a token id that
    is not below `vocabulary`, or with its response more than the engine's `longest` tokens."""
    if version is None:
        raise ValueError("the engine has no weights: call update_weights before generate")
    if sampling.seeds is not None and [len(row) for row in sampling.seeds] != [sampling.n] * len(
        prompts
    ):
        given = sum(len(row) for row in sampling.seeds)
        raise ValueError(f"{given} seeds were given for {len(prompts) * sampling.n} completions")
    for position, prompt in enumerate(prompts):
        if not prompt.token_ids:
            raise ValueError(f"prompt {position} (row {prompt.row}) has no tokens")
        if prompt.images and not sees_images:
            raise ValueError(
                f"prompt {position} (row {prompt.row}) has images, which this engine does not see: "
                'use engine_type = "native" or "vllm" in the trainer\'s process'
            )
        if sampling.budget(len(prompt.token_ids)) < 1:
            raise ValueError(
                f"prompt {position} (row {prompt.row}) has {len(prompt.token_ids)} tokens, which "
                f"leaves no room for a response: max_len is {sampling.max_total_tokens}"
            )
        if vocabulary is not None and max(prompt.token_ids) >= vocabulary:
            raise ValueError(
                f"prompt {position} (row {prompt.row}) has the token id {max(prompt.token_ids)}, "
                f"but the model knows {vocabulary} tokens: is the tokenizer another model's?"
            )
        length = len(prompt.token_ids) + sampling.budget(len(prompt.token_ids))
        if longest is not None and length > longest:
            raise ValueError(
                f"prompt {position} (row {prompt.row}) and its response may have {length} tokens, "
                f"more than the {longest} that the engine was built for: raise max_len"
            )


def random_seed(sampling: SamplingParams) -> int:
    """One for a request that brought none; greedily nothing is drawn."""
    return 0 if sampling.temperature == 0 else int(torch.randint(2**62, ()))


def neighbors(tp_size: int) -> DataRanks:
    """This rank among the `tp_size` consecutive ranks that share an engine."""
    if tp_size == 1:
        return DataRanks()
    groups = [
        dist.new_group(list(range(first, first + tp_size)))
        for first in range(0, dist.get_world_size(), tp_size)
    ]
    rank = dist.get_rank()
    return DataRanks(rank % tp_size, tp_size, groups[rank // tp_size])


def completion(
    prompt: int,
    sample: int,
    rows: Iterable[tuple[int, float]],
    reason: str,
    version: int | None,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> Completion:
    """Sample number `sample` of a prompt, of (token id, log-prob) `rows`; the engine ends at
    `stop_ids` and those of `sampling`.

    Raises ConnectionError if the engine did not end it, but broke off for another `reason`, and
    ValueError for sampling with `replay`, which needs to know what was sampled among.
    """
    if sampling.replay:
        raise ValueError("replay: only the native engine tells what it samples among; use that")
    if reason not in ("stop", "length"):
        raise ConnectionError(f"the rollout engine ended a request with {reason!r}")
    assert version is not None
    pairs = list(rows)
    tokens, logprobs = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    text = texts(tokenizer, [tokens], sampling.stop, {*stop_ids, *sampling.stop_token_ids})[0]
    return Completion(prompt, sample, tokens, logprobs, text, cast(Any, reason), version)


def texts(
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Sequence[int]],
    stop: Sequence[str],
    stop_ids: Collection[int] = (),
) -> list[str]:
    """The responses' texts as sampled, without the stop token or string that ended them: see
    `decode`. The end-of-sequence token always is a stop token."""
    return [decode(tokenizer, ids, stop, {tokenizer.eos_token_id, *stop_ids}) for ids in responses]
