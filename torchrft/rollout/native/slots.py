"""The state of the sequences being decoded: tensors of fixed size, a row for each slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrft.rollout.native.sampler import sample, sample_among


class Slots(NamedTuple):
    """int64 [slots], unless said otherwise."""

    token: Tensor  # the last one sampled, not yet in the cache
    length: Tensor  # tokens in the cache
    generated: Tensor
    budget: Tensor
    seed: Tensor
    live: Tensor  # bool: neither free nor ended
    by_stop: Tensor  # bool: ended by a stop
    out_token: Tensor  # [slots, most of a response]
    out_logprob: Tensor  # the same, float32
    shift: Tensor | None  # of the positions after a prompt; None: no images

    @classmethod
    def empty(cls, slots: int, longest: int, device: torch.device, shifted: bool) -> Slots:
        """Free slots for responses of up to `longest` tokens."""

        def zeros(*size: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        return cls(
            *(zeros(slots), zeros(slots), zeros(slots), zeros(slots), zeros(slots)),
            *(zeros(slots, dtype=torch.bool), zeros(slots, dtype=torch.bool)),
            zeros(slots, longest),
            zeros(slots, longest, dtype=torch.float32),
            zeros(slots) if shifted else None,
        )

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def move(self, source: Tensor, target: Tensor) -> None:
        """The slots `source` (int64 [k]) become those of `target`, and are free."""
        for tensor in self.tensors():
            tensor[target] = tensor[source]
        self.live[source] = False


class Replay:
    """`sample` with log-probs over the tokens that a draw was among, which it keeps."""

    sets: Sequence[Tensor] = ()  # int32, by row of the last call

    def __call__(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, *options: Any
    ) -> tuple[Tensor, Tensor]:
        token, _, drawn = sample_among(logits, seeds, positions, temperature, *options)
        kept = (drawn > 0).scatter_(1, token[:, None], True)
        self.sets = kept.nonzero()[:, 1].int().cpu().split(kept.sum(1).tolist())
        scaled = (logits.float() / temperature).masked_fill(~kept, -torch.inf)
        return token, scaled.log_softmax(-1).gather(1, token[:, None]).squeeze(1)


def record(
    slots: Tensor | slice,
    rows: Tensor,
    logits: Tensor,
    state: Slots,
    stops: tuple[Tensor, Tensor],
    options: tuple[float, float, int, int, float | None],
    draw: Callable[..., tuple[Tensor, Tensor]] = sample,
) -> None:
    """Samples a token for each slot of `rows` (int64 [B]) and keeps it where the sequence is live.

    Args: slots: the same, or as a slice, if all are live; logits [B, V]; stops: the ids that end a
        sequence, and bool [V], true for them, since `torch.isin` sorts many ids, which cannot be
        captured; options: temperature, top-p, top-k, min_new_tokens, temperature of the draw.
    """
    stop_ids, is_stop = stops
    temperature, top_p, top_k, min_new_tokens, draw_temperature = options
    live, generated = state.live[slots], state.generated[slots]
    forbidden = None
    if min_new_tokens > 0:
        early = generated < min_new_tokens
        forbidden = torch.zeros_like(logits, dtype=torch.bool)
        forbidden[:, stop_ids] = early[:, None]
    token, logprob = draw(
        logits, state.seed[slots], generated, temperature, top_p, top_k, forbidden, draw_temperature
    )
    place = generated.clamp(max=state.out_token.shape[1] - 1)
    for log, new in ((state.out_token, token), (state.out_logprob, logprob)):
        is_full = isinstance(slots, slice)
        log[rows, place] = new if is_full else torch.where(live, new, log[rows, place])
    generated = generated + live
    stopped = live & is_stop[token]
    state.token[slots], state.generated[slots] = token, generated
    state.by_stop[slots] |= stopped
    state.live[slots] = live & ~stopped & (generated < state.budget[slots])
