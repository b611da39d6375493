"""Scalar reward models that look at the prompt's images, through their own processor."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from torchrft.config.reward_config import RewardModel as Entry
from torchrft.models.reward_model import HostWeights, RewardModel
from torchrft.models.vision import load_processor
from torchrft.rewards.source import RewardRequest, RewardResult, SampleError
from torchrft.rewards.text import chat_text, text_or_file
from torchrft.types import Prompt


class VisionModel:
    """A reward model with an image tower as a source, whole on this rank; one sample at a time.

    It reads the chat template (`chat_template`, or its processor's) over the prompt's messages and
    the response, or without one the prompt's text followed by the response's.

    Raises ValueError for a processor or template that does not load.
    """

    collective = False

    def __init__(self, name: str, entry: Entry, model: RewardModel, offload: bool) -> None:
        self.name, self.model, self.lock = name, model, threading.Lock()
        source = entry.tokenizer or entry.pretrain
        self.processor = load_processor(source, "name one by `tokenizer`, beside the reward model")
        given = entry.chat_template
        own = self.processor.chat_template or self.processor.tokenizer.chat_template
        self.template = own if given is None else text_or_file(given, "chat_template")
        self.host = HostWeights(model) if offload else None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for prompts that this model cannot read."""
        for seeing in (True, False):  # the first with a picture, and the first without
            for prompt in islice((p for p in prompts if bool(p.images) is seeing), 1):
                self.read(prompt, "")

    def read(self, prompt: Prompt, response: str) -> dict[str, Any]:
        """The model's inputs, with a batch of one. Raises ValueError, naming the prompt's row."""
        response = response.replace(self.processor.image_token, "")  # no place for a picture
        # The processor's tokenizer puts this one there itself.
        text = prompt.text.removeprefix(self.processor.tokenizer.bos_token or "") + response
        if self.template is not None:
            said = [{"type": "text", "text": response}]
            text = chat_text(self.processor, self.template, prompt, said)
        try:
            pictures = [image.open() for image in prompt.images]
            return dict(
                self.processor(
                    text=[text],
                    images=pictures or None,
                    return_tensors="pt",
                    # A template writes its special tokens itself.
                    add_special_tokens=self.template is None,
                )
            )
        except ValueError as error:
            raise ValueError(f"prompt row {prompt.row}: {error}") from error

    @torch.no_grad()
    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """See RewardSource."""
        results = []
        with self.lock, self.host.on_device() if self.host else nullcontext():
            for request in requests:
                try:
                    inputs = self.read(request.prompt, request.completion.text)
                except ValueError as error:
                    raise SampleError(f"reward source {self.name!r}, {error}") from error
                given = {name: value.to(self.model.device) for name, value in inputs.items()}
                results.append(RewardResult(self.model.model(**given).logits.item()))
        return results

    def close(self) -> None:
        del self.model
