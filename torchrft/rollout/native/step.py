"""A decode step of the first slots, and what runs it one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchrft.models.logprobs import product
from torchrft.models.mixers import gather_mixers
from torchrft.models.policy import hidden_states
from torchrft.models.support import logit_form, mixers
from torchrft.rollout.native.kv_cache import Prefill, SlotCache
from torchrft.rollout.native.lean import is_plain, lean_step
from torchrft.rollout.native.sampler import sample
from torchrft.rollout.native.sessions import Continuation, Held
from torchrft.rollout.native.slots import Replay, Slots, record
from torchrft.rollout.native.states import States
from torchrft.types import Prompt, SamplingParams

if TYPE_CHECKING:
    from torchrft.models.vision import Vision


class Decoder:
    """The model as the scheduler calls it. fp32_head: 16-bit weights make float32 logits."""

    def __init__(self, model: PreTrainedModel, vision: Vision | None, fp32_head: bool) -> None:
        self.model, self.vision, self.fp32_head = model, vision, fp32_head
        self.base, self.head = model.get_decoder(), model.get_output_embeddings()
        self.form = logit_form(model.config, type(model))
        self.mixers = mixers(model.config, type(model))
        gather_mixers(self.base, self.mixers)
        self.device = self.head.weight.device
        self.plain = is_plain(self.base)

    def prefill(self, prompts: Sequence[Prompt], pasts: Sequence[Held] = ()) -> Prefill:
        """Keys and values of the prompts, run in one row, and their last logits.

        With `pasts`, what is held of the beginning of each, only the tokens behind it are run.
        """
        starts = [len(past.token_ids) for past in pasts] or [0] * len(prompts)
        new = [p.token_ids[start:] for p, start in zip(prompts, starts, strict=True)]
        ids, lengths = [token for tokens in new for token in tokens], [len(x) for x in new]
        ends, images = list(accumulate(lengths)), None
        states = States(self.model.config.get_text_config()) if self.mixers else None
        layout = Continuation(lengths, pasts) if pasts else Prefill(lengths, self.device, states)
        positions = layout.positions[None]
        if self.vision is not None and any(prompt.images for prompt in prompts):
            spans = zip(prompts, [0, *ends], ends, strict=False)
            positions, images = self.vision.see(positions.cpu(), spans)
            positions, images = positions.to(self.device), images.to(self.device)
        row = torch.tensor([ids], device=self.device)
        hidden = hidden_states(self.model, row, positions, layout, images)
        layout.logits = self._logits(hidden[0, torch.tensor(ends, device=self.device) - 1])
        return layout

    def decode(self, ids: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """Logits [B, V] after one token of each sequence; ids and positions int64 [B, 1]."""
        if self.plain:
            return self._logits(lean_step(self.base, ids[:, 0], positions, layout))
        return self._logits(hidden_states(self.model, ids, positions, layout, None)[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = product(hidden, self.head.weight) if self.fp32_head else self.head(hidden)
        return self.form(logits)


class Step:
    """One token for each of the first slots."""

    def __init__(
        self,
        decoder: Decoder,
        cache: SlotCache,
        state: Slots,
        sampling: SamplingParams,
        stop_ids: Iterable[int],
        compiled: bool = False,
    ) -> None:
        self.decoder, self.cache, self.state, self.sampling = decoder, cache, state, sampling
        is_stop = torch.zeros(len(decoder.head.weight), dtype=torch.bool, device=decoder.device)
        known = sorted({token for token in stop_ids if token < len(is_stop)})
        ids = torch.tensor(known, dtype=torch.long, device=decoder.device)
        is_stop[ids] = True
        self.stops = (ids, is_stop)
        self.record = torch.compile(record) if compiled else record
        self.draw: Any = Replay() if sampling.replay else sample

    def __call__(self, layout: Any) -> None:
        """A step of the slots that `layout` is for."""
        state, batch = self.state, len(layout.places)
        lengths = state.length[:batch]
        layout.begin(lengths)
        positions = lengths if state.shift is None else lengths + state.shift[:batch]
        logits = self.decoder.decode(state.token[:batch, None], positions[:, None], layout)
        # The token that was read is in the cache now; sequences that ended stay where they are.
        state.length[:batch] += state.live[:batch]
        self.take(layout.slots, layout.places, logits)

    def take(
        self, slots: Tensor | slice, rows: Tensor, logits: Tensor, temperature: float | None = None
    ) -> None:
        """Samples a token for each of `rows`, see `record`; `temperature`: that of the draw."""
        how = self.sampling
        options = (how.temperature, how.top_p, how.top_k, how.min_new_tokens, temperature)
        self.record(slots, rows, logits, self.state, self.stops, options, self.draw)


class EagerRunner:
    """Looks after every step, and runs it for just the slots that are used."""

    def __init__(self, step: Step) -> None:
        self.step = step
        # A sixteenth of the slots at once, since every time costs some calls.
        self.least_free = len(step.state.token) // 16

    def size(self, count: int) -> int:
        """Slots of a step for `count` sequences."""
        return count

    def run(self, batch: int) -> None:
        """The steps until the next look, of the first `batch` slots."""
        self.step(self.step.cache.layout(batch))
