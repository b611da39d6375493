"""Scalar reward models as a source of rewards: what they read, in which batches, and when."""

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from torchrft.config.reward_config import RewardModel as Entry
from torchrft.models.reward_model import Group, HostWeights, RewardModel
from torchrft.models.tokenizer import encode
from torchrft.rewards.source import RewardRequest, RewardResult, SampleError
from torchrft.rewards.text import chat_text, text_or_file
from torchrft.tools import distributed
from torchrft.tools.hub import hub_fault, trusts_code_of
from torchrft.types import Prompt


class Reader:
    """The token ids that a reward model reads of a sample.

    Where its tokenizer has the policy's vocabulary and no other chat template, they are the very
    ids of prompt and response, with the end token if one was sampled. Else the text is tokenized
    again: that of its chat template (`chat_template`, or the tokenizer's own) over the prompt's
    messages and the response; without one, the prompt's text followed by the response's.
    With `policy` None, as in a server, prompts are texts of unknown form: they are followed by the
    response's, unless `chat_template` says otherwise.

    Raises ValueError for a tokenizer or template that does not load.
    """

    def __init__(
        self,
        entry: Entry,
        policy: PreTrainedTokenizerBase | None,
        max_len: int | None = None,
        vocab_size: float = math.inf,
    ) -> None:
        self.vocab_size = vocab_size
        self.source = entry.tokenizer or entry.pretrain
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                self.source, trust_remote_code=trusts_code_of(self.source)
            )
        except Exception as error:  # its files may hold anything
            raise ValueError(
                hub_fault(self.source, error)
                or f'the reward model "{entry.pretrain}" has no tokenizer in "{self.source}" that '
                "transformers can read; name one with tokenizer = ..."
            ) from error
        own = None if policy is None else self.tokenizer.chat_template
        given = entry.chat_template
        self.direct = (
            policy is not None
            and given is None
            and own in (None, policy.chat_template)
            and self.tokenizer.get_vocab() == policy.get_vocab()
        )
        self.template = None if self.direct else own
        if given is not None:
            self.template = text_or_file(given, "chat_template")
        limits = (max_len, self.tokenizer.model_max_length)
        self.max_len = min(limit for limit in limits if limit is not None and limit > 0)

    def __call__(self, requests: Sequence[RewardRequest]) -> list[list[int]]:
        """Raises ValueError, naming the prompt's row, for a sample that the model cannot read."""
        # A server's client may send texts alone.
        if self.direct and all(r.prompt.token_ids and r.completion.token_ids for r in requests):
            ids = [[*r.prompt.token_ids, *r.completion.token_ids] for r in requests]
        else:
            texts = [self.text(r.prompt, r.completion.text) for r in requests]
            # A template writes its special tokens itself.
            ids = encode(self.tokenizer, texts, special=self.template is None)
        for request, sample in zip(requests, ids, strict=True):
            self.refuse_images(request.prompt)
            if not 0 < len(sample) <= self.max_len:
                raise ValueError(
                    f"prompt row {request.prompt.row}: prompt and response have {len(sample)} "
                    f"tokens, and the model reads 1 to {self.max_len}"
                )
            low, high = min(sample), max(sample)
            if not 0 <= low <= high < self.vocab_size:
                raise ValueError(
                    f"prompt row {request.prompt.row}: its token ids go from {low} to {high}, and "
                    f"the model knows {self.vocab_size}"
                )
        return ids

    def text(self, prompt: Prompt, response: str) -> str:
        """The text that is tokenized."""
        if self.template is None:
            return prompt.text + response
        return chat_text(self.tokenizer, self.template, prompt, response)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for prompts that this model cannot read."""
        for prompt in prompts:
            self.refuse_images(prompt)
        if not self.direct and prompts:
            self.text(prompts[0], "")
            if self.template is None and prompts[0].messages:
                raise ValueError(
                    f'the tokenizer of the reward model in "{self.source}" is another than the '
                    "policy's and has no chat template, but the prompts are chats: give the model "
                    "a chat_template"
                )

    def refuse_images(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt with images, which this model would not see."""
        if prompt.images:
            raise ValueError(
                f"prompt row {prompt.row} has images, which the reward model sees nothing of: use "
                "a vision model, or another kind of reward"
            )


class Forward(Protocol):
    """What computes scores; `collective` says whether all ranks must call it together."""

    collective: bool

    def __call__(self, groups: Sequence[Group]) -> list[float]: ...

    def close(self) -> None: ...


class Batches:
    """Forward passes of at most `size` samples, as many on each rank.

    Raises ValueError for a model whose scores depend on padding, if `size` allows it.
    """

    collective = True

    def __init__(self, model: RewardModel, size: int, offload: bool) -> None:
        self.model, self.size = model, size
        if size > 1:
            model.check_padding()
        self.host = HostWeights(model) if offload else None

    @torch.no_grad()
    def __call__(self, groups: Sequence[Group]) -> list[float]:
        samples = [(sample, place) for place, group in enumerate(groups) for sample in group]
        order = list(range(len(samples)))
        if not self.model.packs:  # padding costs least among samples of equal length
            order.sort(key=lambda index: len(samples[index][0]))
        chunks = [order[first : first + self.size] for first in range(0, len(order), self.size)]
        most = distributed.all_reduce_max({"passes": len(chunks)}, "reward")["passes"]
        scores = [math.nan] * len(samples)
        resident: AbstractContextManager[None] = (
            nullcontext() if self.host is None or not most else self.host.on_device()
        )
        with resident:
            for chunk in chunks:
                together = groupby((samples[index] for index in chunk), key=lambda pair: pair[1])
                values = self.model([[sample for sample, _ in group] for _, group in together])
                for index, value in zip(chunk, values.tolist(), strict=True):
                    scores[index] = value
            for _ in range(int(most) - len(chunks)):  # the other ranks gather weights with this one
                self.model([[[0]]])
        return scores

    def close(self) -> None:
        del self.model


class ScalarModel:
    """A reward model as a source; see `RewardSource` for the calls."""

    def __init__(self, name: str, reader: Reader, forward: Forward) -> None:
        self.name, self.reader, self.forward = name, reader, forward
        self.lock = threading.Lock()  # a server asks from several threads
        self.collective = forward.collective

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for prompts that this model cannot read."""
        self.reader.check(prompts)

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        groups: list[Group] = []

        def read() -> None:
            try:
                samples = self.reader(requests)
            except ValueError as error:
                raise SampleError(f"reward source {self.name!r}, {error}") from error
            pairs = zip((request.prompt for request in requests), samples, strict=True)
            for _, group in groupby(pairs, key=lambda pair: (pair[0].text, pair[0].token_ids)):
                groups.append([ids for _, ids in group])

        if self.collective:  # what one rank cannot read ends the job on all, before they meet
            distributed.on_all(read, "reward")
        else:
            read()
        with self.lock:
            return [RewardResult(score) for score in self.forward(groups)]

    def close(self) -> None:
        self.forward.close()
