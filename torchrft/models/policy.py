"""The policy: a transformers causal LM whose forward returns token log-probs instead of logits."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from torchrft.models.attention import Layout, handed, padded
from torchrft.models.logit_form import PLAIN
from torchrft.models.logprobs import Head, fused_linear_logprob, head_logprob, linear_logprob
from torchrft.models.mixers import gather_mixers
from torchrft.models.split import joined, local_vocabulary, part_of, shared
from torchrft.models.support import check_length, logit_form, mixers, refuse_unsupported
from torchrft.parallel.mesh import ModelMesh
from torchrft.types import Kept

if TYPE_CHECKING:
    from torchrft.models.vision import ImageBatch


class Inputs(Protocol):
    """What a forward pass needs; `torchrft.learn.packing.MicroBatch` is one."""

    input_ids: Tensor  # int64 [rows, length]
    position_ids: Tensor  # int64 [rows, length]
    layout: Layout | None
    targets: Tensor  # int64 [M]: flat positions whose next token is a response token
    labels: Tensor  # int64 [M]: those next tokens
    images: ImageBatch | None
    kept: Kept | None  # of the M targets: log-probs are over these tokens alone


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    layout: Layout | None,
    images: ImageBatch | None,
) -> Tensor:
    """The language model's last hidden states [B, L, D]; see `Vision.see` for the arguments."""
    whole: Any = model
    decoder = whole.get_decoder()
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if images is not None:
        from torchrft.models.vision import embedded

        inputs = embedded(whole, decoder, input_ids, images)
    options: dict[str, Any] = {"use_cache": False, "layout": layout or padded}
    with handed():
        return decoder(**inputs, position_ids=position_ids, **options).last_hidden_state


def target_states(
    model: nn.Module,
    inputs: Inputs,
    ranks: DeviceMesh | None,
    among: DeviceMesh | None,
    limit: int | None,
) -> tuple[Tensor, slice]:
    """Hidden states [rows, D] at this rank's part of the targets, and which part that is: `ranks`
    have the same inputs, `among` divide the targets. Raises ValueError for a sequence of more than
    `limit` tokens."""
    if limit is not None and inputs.input_ids.shape[1] > limit:  # else a GPU need not be asked
        check_length(int(inputs.position_ids.max()) + 1, limit, type(model).__name__)
    hidden = hidden_states(
        model, inputs.input_ids, inputs.position_ids, inputs.layout, inputs.images
    )
    rows = part_of(inputs.targets.numel(), among)
    return shared(hidden, ranks).flatten(0, 1)[inputs.targets[rows]], rows


class PolicyModel(nn.Module):
    """Log-probs and entropies of the response tokens of a micro-batch.

    The head is used inside this forward because FSDP2 unshards parameters only around methods of
    the modules it wraps, and because only the `targets` positions need logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        fused: bool = False,
        chunk_size: int = 4096,
        fp32_head: bool = False,
    ) -> None:
        super().__init__()
        self.limit = refuse_unsupported(model.config, kind=type(model))
        self.form = logit_form(model.config, type(model))
        gather_mixers(model.get_decoder(), mixers(model.config, type(model)))
        head: Any = model.get_output_embeddings()
        if head.bias is not None:
            raise ValueError(f"{type(model).__name__} needs a language-model head without bias")
        self.model = model
        self.mesh: ModelMesh | None = None  # set by torchrft.parallel.parallelize
        self.temperature, self.fp32_head = temperature, fp32_head
        self.fused, self.chunk_size = fused, chunk_size
        head.logprobs = MethodType(_logprobs, head)  # which parallelize makes one of FSDP2's

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns logprobs float32 [M] and entropy float32 [M] of `inputs.labels`."""
        # Over `sp` ranks each takes a part of the tokens, over `tp` ranks a part of the vocabulary.
        sp, ranks = (None, None) if self.mesh is None else (self.mesh.sp, self.mesh.all)
        hidden, rows = target_states(self.model, inputs, ranks, sp, self.limit)
        head: Any = self.model.get_output_embeddings()
        # Unfused, all rows are one chunk.
        chunk_size = self.chunk_size if self.fused else max(len(hidden), 1)
        kept = None if inputs.kept is None else inputs.kept.part(rows)
        how = Head(self.temperature, chunk_size, None, kept, self.fp32_head, self.form)
        values = head.logprobs(hidden, inputs.labels[rows], how, self.fused)
        logprobs, entropy = (joined(v, rows, inputs.targets.numel(), sp) for v in values)
        return logprobs, entropy


def _logprobs(
    head: nn.Linear, hidden: Tensor, labels: Tensor, how: Head, fused: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of `labels` and entropies."""
    weight, vocabulary = local_vocabulary(head.weight)
    if how.fp32 or how.kept is not None or (fused and how.form != PLAIN):
        return head_logprob(hidden, weight, labels, replace(how, vocabulary=vocabulary))
    if fused:
        options = (how.temperature, how.chunk_size, vocabulary)
        return fused_linear_logprob(hidden, weight, labels, *options)
    return linear_logprob(hidden, weight, labels, how.temperature, vocabulary, how.form)
