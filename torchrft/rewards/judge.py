"""Generative judges: a model reads the sample in a template, and its answers become the reward."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from torchrft.config.reward_config import Judge as Entry
from torchrft.models.tokenizer import affixes, encode, render_chat
from torchrft.models.vision import Vision
from torchrft.rewards.judge_template import Content, JudgeTemplate
from torchrft.rewards.registry import RuleFault
from torchrft.rewards.source import RewardError, RewardRequest, RewardResult, SampleError
from torchrft.rewards.verdicts import Parsing, Stuck, aggregate
from torchrft.tools.images import Image
from torchrft.tools.seeds import derive_seed
from torchrft.types import Completion, Prompt, SamplingParams


class Engine(Protocol):
    """What a judge needs of a rollout engine."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]: ...

    def close(self) -> None: ...


class Answers(Protocol):
    """Gives `len(seeds[i])` answers to text i, or None for a text that is too long."""

    def __call__(
        self, texts: Sequence[Content], seeds: Sequence[Sequence[int]]
    ) -> list[list[str] | None]: ...

    def close(self) -> None: ...


@dataclass
class EngineAnswers:
    """Answers of an engine in this process; texts go through the tokenizer's chat template, as the
    user's message, if it has one. `vision` is the model's, for pictures among them."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    entry: Entry
    max_len: int
    vision: Vision | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # a server asks in several threads

    def __call__(
        self, texts: Sequence[Content], seeds: Sequence[Sequence[int]]
    ) -> list[list[str] | None]:
        entry = self.entry
        prompts = [self._prompt(place, text) for place, text in enumerate(texts)]
        longest = self.max_len - entry.max_new_tokens
        fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= longest]
        sampling = SamplingParams(
            n=entry.votes,
            temperature=entry.temperature,
            max_total_tokens=self.max_len,
            max_new_tokens=entry.max_new_tokens,
            seeds=tuple(tuple(seeds[prompt.row]) for prompt in fitting),
        )
        answers: list[list[str] | None] = [None for _ in texts]
        with self.lock:
            completions = self.engine.generate(fitting, sampling)
        for completion in completions:
            place = fitting[completion.prompt_index].row
            answers[place] = [*(answers[place] or ()), completion.text]
        return answers

    def _prompt(self, place: int, content: Content) -> Prompt:
        vision, mark, template_owner = self.vision, "", cast(Any, self.tokenizer)
        if vision is not None:
            mark, template_owner = vision.placeholder or "", vision.teller(self.tokenizer)
        parts = [content] if isinstance(content, str) else list(content)
        images = tuple(part for part in parts if isinstance(part, Image))
        # A text must not bring places for pictures along, least of all the policy's.
        texts = [part.replace(mark, "") if isinstance(part, str) else None for part in parts]
        is_chat = bool(template_owner.chat_template)
        if is_chat:
            shown: Any = content
            if vision is not None:
                image = {"type": "image"}
                shown = [image if t is None else {"type": "text", "text": t} for t in texts]
            said = [{"role": "user", "content": shown}]
            where = "the judge's prompt"
            text = render_chat(template_owner, said, where, add_generation_prompt=True)
        else:
            text = "".join(mark if t is None else t for t in texts)
        if images and vision is not None:
            ids = vision.token_ids(text, images, special=not is_chat)
        else:
            [ids] = encode(self.tokenizer, [text], special=not is_chat)
        if not is_chat and (appended := affixes(self.tokenizer)[1]):
            ids = ids[:-appended]  # the answer continues the text
        return Prompt(place, text, tuple(ids), images=images)

    def close(self) -> None:
        self.engine.close()


class Judge:
    """A judge as a source; see `RewardSource` for the calls.

    Its answers depend on the job's seed and on what it reads, and on nothing else: the same sample
    gets the same reward in any batch, on any rank and after a resume.
    """

    collective = False

    def __init__(self, entry: Entry, template: JudgeTemplate, answers: Answers, seed: int) -> None:
        self.name, self.entry, self.template = entry.name, entry, template
        self.answers, self.seed = answers, seed
        self.parse = Parsing(entry.parser)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first row that leaves a variable of the template empty."""
        self.template.check(prompts)

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        try:
            texts = [self.template.render(r.prompt, r.completion.text) for r in requests]
        except ValueError as error:
            raise SampleError(f"reward source {self.name!r}: {error}") from error
        unique = list(dict.fromkeys(texts))
        try:
            answers = self.answers(unique, [self._seeds(text) for text in unique])
        except ValueError as error:
            raise RewardError(f"reward source {self.name!r}: {error}") from error
        by_text = dict(zip(unique, answers, strict=True))
        return [
            self._result(request.prompt.row, by_text[text])
            for request, text in zip(requests, texts, strict=True)
        ]

    def _seeds(self, text: Content) -> list[int]:
        digest = hashlib.sha256()
        for part in (text,) if isinstance(text, str) else text:
            shown = part.encode(errors="surrogatepass") if isinstance(part, str) else part.read()
            digest.update(shown)
        content = int.from_bytes(digest.digest()[:8], "big")
        return [derive_seed(self.seed, content, vote) for vote in range(self.entry.votes)]

    def _result(self, row: int, answers: list[str] | None) -> RewardResult:
        if answers is None:
            error = "with the sample in it, the template is longer than the judge reads"
            return RewardResult(0.0, metrics={"unparsable": 0.0, "too_long": 1.0}, error=error)
        try:
            votes = [self._vote(row, answer) for answer in answers]
        except Stuck as stuck:
            error = f"parser = {self.entry.parser!r:.200} found no end: {stuck}"
            return RewardResult(0.0, metrics={"unparsable": 1.0, "too_long": 0.0}, error=error)
        values = [vote for vote in votes if vote is not None]
        metrics = {"unparsable": 1 - len(values) / len(votes), "too_long": 0.0}
        if not values:
            error = f"no verdict in the answer {answers[0]!r:.200}"
            return RewardResult(0.0, metrics=metrics, error=error)
        return RewardResult(aggregate(values, self.entry.aggregate), metrics=metrics)

    def _vote(self, row: int, answer: str) -> float | None:
        where = f"reward source {self.name!r}, prompt row {row}: parser = {self.entry.parser!r}"
        try:
            return self.parse(answer)
        except RuleFault as fault:
            raise RewardError(f"{where} {fault.text}") from fault

    def close(self) -> None:
        self.answers.close()
        self.parse.close()
