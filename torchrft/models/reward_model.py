"""Scalar reward models: transformers' sequence classification with one label."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from torchrft.config.job_config import Parallel
from torchrft.models import attention
from torchrft.models.loader import read_config, read_weights
from torchrft.models.prefix_tree import PrefixTree
from torchrft.models.sharded import ShardedWeights
from torchrft.models.support import from_config, mixers, refuse_unsupported
from torchrft.parallel import ParallelDims, parallelize
from torchrft.tools.distributed import World
from torchrft.tools.hub import hub_fault
from torchrft.tools.logging import logger

Group = Sequence[Sequence[int]]  # token ids of samples that begin alike


class RewardModel(nn.Module):
    """The scores of whole samples, whatever else is in their batch.

    A decoder reads a micro-batch as one row, in which what a group's samples begin with stands
    once; its score is the head on the last hidden state. Any other model (an encoder, attention of
    its own) is called as transformers calls it, with rows padded on the right and a mask.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None) -> None:
        super().__init__()
        self.model, self.device = model, device or torch.device("cpu")  # where it computes
        self.packs = _is_plain_decoder(model)
        if self.packs:
            model.set_attn_implementation(attention.NAME)
        text: Any = model.config.get_text_config()
        self.pad: int | None = getattr(text, "pad_token_id", None)

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """Scores float32 [B] of all groups' samples, in their order; none may be empty."""
        return self._packed(groups) if self.packs else self._padded([s for g in groups for s in g])

    def _packed(self, groups: Sequence[Group]) -> Tensor:
        tree = PrefixTree()
        for number, group in enumerate(groups):
            for sample in group:
                tree.add(scored_part(sample, self.pad), number)
        ids, layout, places = tree.pack()
        layout, ends = layout.to(self.device), torch.stack([place[-1] for place in places])
        with attention.handed():
            hidden = self.model.base_model(
                input_ids=ids[None].to(self.device),
                position_ids=layout.positions[None],
                use_cache=False,
                layout=layout,
            ).last_hidden_state
        head: Any = self.model.score
        return head(hidden[0, ends.to(self.device)])[:, 0].float()

    def _padded(self, samples: Group) -> Tensor:
        pad = self.pad
        if pad is None:  # any id does that ends no sample, since models look for the last other one
            last = {sample[-1] for sample in samples}
            pad = next(token for token in range(len(last) + 1) if token not in last)
            text: Any = self.model.config.get_text_config()
            text.pad_token_id = pad
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(sample) for sample in samples], batch_first=True, padding_value=pad
        )
        lengths = torch.tensor([len(sample) for sample in samples])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        out = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return out.logits[:, 0].float()

    @torch.no_grad()
    def check_padding(self) -> None:
        """Raises ValueError if padding changes scores, as where a model reads them from the right
        end of its row. All ranks call it."""
        if self.packs:
            return
        short, long = list(range(5, 8)), list(range(5, 21))
        alone, padded = self([[short]]), self([[short], [long]])[:1]
        tolerance = 1e-3 if next(self.parameters()).dtype == torch.float32 else 0.05
        if not torch.allclose(alone, padded, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"the reward model {type(self.model).__name__} gives a sample {alone.item():.4g} "
                f"alone and {padded.item():.4g} in a padded batch; set micro_rollout_batch_size = 1"
            )


class HostWeights:
    """Keeps a model's weights in pinned host memory, and on their device only while they are used.

    The tensors keep their identity: only their storage goes and comes back. They never change, so
    nothing is copied when they go. On a CPU the weights are in host memory anyway and nothing
    moves, unless `device_type` says so (for tests).
    """

    def __init__(self, model: nn.Module, device_type: str = "cuda") -> None:
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}  # a storage's bytes, and their copy
        for tensor in (*model.parameters(), *model.buffers()):
            with torch.no_grad():  # so that to_local returns the tensor itself and no view
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if local.device.type != device_type or storage.data_ptr() in self.copies:
                continue
            data = torch.empty(0, dtype=torch.uint8, device=local.device).set_(storage)
            host = torch.empty(data.shape, dtype=torch.uint8, pin_memory=data.is_cuda).copy_(data)
            self.copies[storage.data_ptr()] = data, host
        if not self.copies:
            logger.warning(
                "reward_model_offload has nothing to move: the weights are in host memory already"
            )
        self._free()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are usable inside."""
        for data, host in self.copies.values():
            data.untyped_storage().resize_(host.numel())
            data.copy_(host, non_blocking=True)
        try:
            yield
        finally:
            self._free()

    def _free(self) -> None:
        for data, _ in self.copies.values():
            data.untyped_storage().resize_(0)
        if torch.cuda.is_available():  # engines take memory past torch's allocator
            torch.cuda.empty_cache()


def load_reward_model(
    source: str, parallel: Parallel, world: World, dtype: torch.dtype, whole: bool = False
) -> RewardModel:
    """The model of a folder or hub id, frozen, on this rank's device; its parameters in `dtype`.

    Over several ranks it is fully sharded (FSDP2) unless it is to be `whole`, whatever tensor and
    sequence parallelism the policy has: every rank scores samples of its own. Collective. Raises
    ValueError for a source that is no sequence-classification model of one label, or lacks weights.
    """
    config = reward_config(source)
    auto = AutoModelForSequenceClassification
    several = world.world_size > 1 and not whole
    sharded = ShardedWeights.of(source, partial(from_config, config, auto)) if several else None
    if sharded is not None:
        loaded: Any = sharded.model(dtype)
    else:
        try:
            loaded = read_weights(auto, source, "the reward model", config, dtype=dtype)
        except OSError as error:
            why = hub_fault(source, error) or f'the reward model "{source}" has no weights: {error}'
            raise ValueError(why) from error
    model = RewardModel(loaded.eval().requires_grad_(False), world.device)
    if sharded is None:
        model.to(world.device)
    if several:
        dims = ParallelDims(parallel.dp_replicate, world.world_size // parallel.dp_replicate)
        # Gathered layer by layer: nothing else would shard a model again that has no backward pass.
        parallelize(model, dims, parallel.model_copy(update={"fsdp": True}), dtype)
    if sharded is not None:
        sharded.fill(model, torch.device("cpu") if parallel.fsdp_cpu_offload else world.device)
    return model


def reward_config(source: str) -> PreTrainedConfig:
    """The config of a scalar reward model. Raises ValueError if it is that of no such model."""
    config = read_config(source, "the reward model")
    names = config.architectures or []
    if names and not any("ForSequenceClassification" in name for name in names):
        raise ValueError(
            f'the reward model "{source}" has no classification head: it is a {names[0]}, and only '
            "a ...ForSequenceClassification gives scores; a causal LM can be one of [reward] judges"
        )
    if config.num_labels != 1:
        raise ValueError(
            f'the reward model "{source}" has num_labels = {config.num_labels}, but a reward is '
            "one number: use a model with num_labels = 1"
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f'the reward model "{source}" has an encoder and a decoder, which is not supported'
        )
    return config


def scored_part(sample: Sequence[int], pad: int | None) -> list[int]:
    """A decoder's sample up to the token whose state transformers scores: the last one that is no
    padding token, or the first if all are.

    >>> scored_part([5, 0, 6, 0], 0), scored_part([0, 0], 0), scored_part([5, 0], None)
    ([5, 0, 6], [0], [5, 0])
    """
    end = len(sample)
    while pad is not None and end > 1 and sample[end - 1] == pad:
        end -= 1
    return list(sample[:end])


def _is_plain_decoder(model: PreTrainedModel) -> bool:
    """Whether torchrft's attention and a head on one hidden state give the model's own scores."""
    config: Any = model.config
    own_forward = type(model).forward is not GenericForSequenceClassification.forward
    causal = all(getattr(module, "is_causal", True) is True for module in model.modules())
    if own_forward or not causal or config.get_text_config() is not config:
        return False
    try:
        refuse_unsupported(config, head=False)
    except ValueError:
        return False
    return not mixers(config)
