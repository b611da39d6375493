"""The job's models: loaded, wrapped and spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from torchrft.config.job_config import JobConfig
from torchrft.data.image_prompts import images_column
from torchrft.models.heads import ValueModel
from torchrft.models.loader import cast_buffers, load_config, load_model, load_tokenizer
from torchrft.models.policy import PolicyModel
from torchrft.models.support import refuse_unsupported, sees_images
from torchrft.parallel import ParallelDims, parallelize
from torchrft.parallel.modules import refuse_split
from torchrft.tools.distributed import World
from torchrft.tools.hub import trust_code_of

if TYPE_CHECKING:
    from torchrft.models.vision import Vision

M = TypeVar("M", bound=nn.Module)


def load_vision(config: JobConfig) -> Vision | None:
    """What a job with images needs of its model; None for a job without.

    Raises ValueError for a model or a processor that does not serve.
    """
    model, data = config.model, config.data
    if images_column(data) is None:
        return None
    from torchrft.models.vision import Vision

    return Vision.load(model.pretrain, data.processor, data.min_pixels, data.max_pixels)


def check_models(config: JobConfig) -> None:
    """Raises ValueError for a model of the job that torchrft would compute wrongly, before anything
    is loaded; see `refuse_unsupported`. All models read the same token ids. From here on, code that
    comes with the models may run where the config trusts it."""
    trust_code_of(config.trusted_sources)
    model, native = config.model, config.rollout.engine_type == "native"
    uses = (model.pretrain, native, True), (model.ref_pretrain, False, True)
    for source, cache, head in (*uses, (model.critic_pretrain, False, False)):
        if source is not None:
            loaded = load_config(source)
            refuse_unsupported(loaded, config.data.max_len, cache, head)
            kind = (loaded.architectures or [loaded.model_type])[0]
            refuse_split(loaded, kind, config.parallel.tp_size, config.parallel.sp_size)
    for source in {model.ref_pretrain, model.critic_pretrain} - {None, model.pretrain}:
        _check_tokens(model.pretrain, str(source))


def _check_tokens(policy: str, source: str) -> None:
    """Raises ValueError if the model of `source` gives token ids of the policy another meaning."""
    ids = load_tokenizer(policy).get_vocab()
    sizes = [load_config(name).get_text_config().vocab_size for name in (policy, source)]
    try:
        others = load_tokenizer(source).get_vocab()
    except ValueError:  # a folder of weights alone
        others = {}
    changed = any(others.get(token, number) != number for token, number in ids.items())
    if changed or sizes[1] < min(sizes[0], max(ids.values()) + 1):
        raise ValueError(
            f'"{source}" reads other token ids than pretrain = "{policy}": {sizes[1]} tokens'
            f"{', some with another id' if changed else ''}; use a model with the same tokenizer"
        )


class ModelBuilder:
    """Builds models that compute in `dtype`; each method is collective.

    They raise ValueError for a source that cannot be loaded or spread like that.
    """

    def __init__(
        self, config: JobConfig, world: World, dims: ParallelDims, dtype: torch.dtype
    ) -> None:
        self.config, self.world, self.dims, self.dtype = config, world, dims, dtype

    def policy(self, source: str, init: str, dtype: torch.dtype) -> PolicyModel:
        """The policy or reference with weights in `dtype`."""
        config = self.config
        wrap = partial(
            PolicyModel,
            temperature=config.rollout.temperature,
            fused=config.training.fused_linear_logprob,
            chunk_size=config.training.chunk_size,
            fp32_head=config.model.fp32_head,
        )
        return self._model(wrap, source, init, dtype, "policy")

    def critic(self, source: str, init: str, dtype: torch.dtype) -> ValueModel:
        """A critic with weights in `dtype`."""
        return self._model(ValueModel, source, init, dtype, "critic")

    def _model(
        self,
        wrap: Callable[[PreTrainedModel], M],
        source: str,
        init: str,
        dtype: torch.dtype,
        use: str,
    ) -> M:
        """The model of `source` inside `wrap`, spread over the ranks."""
        training, device = self.config.training, self.world.device
        several = self.world.world_size > 1 and init != "random"
        sharded = None
        if several:
            from torchrft.models.sharded import ShardedWeights

            sharded = ShardedWeights.of(source)
        if sharded is None:
            loaded: Any = load_model(source, init, dtype, training.seed, use)
        else:
            loaded = sharded.model(dtype)
        if images_column(self.config.data) is not None:
            if not sees_images(loaded.config):
                raise ValueError(
                    f'"{source}" sees no images, but the prompts have some; use a vision-language '
                    "model"
                )
            if _sees(loaded.config) != _sees(load_config(self.config.model.pretrain)):
                raise ValueError(
                    f'"{source}" takes images otherwise than pretrain = '
                    f'"{self.config.model.pretrain}", whose processor prepares them; use a model '
                    "of the same kind and image size"
                )
        # No dropout: log-probs must be those of the policy that sampled.
        if self.config.model.freeze_vision:
            if not sees_images(loaded.config):
                raise ValueError(f'freeze_vision: "{source}" has no image tower')
            from torchrft.models.vision import freeze_vision

            freeze_vision(loaded)
        cast_buffers(loaded, self.dtype)
        model = wrap(loaded.eval())
        if sharded is None:
            model.to(device)
        mode = training.checkpointing_mode if training.gradient_checkpointing else None
        options: dict[str, Any] = {"gradient_checkpointing": mode, "compile": training.compile}
        parallelize(model, self.dims, self.config.parallel, self.dtype, **options)
        if sharded is not None:
            sharded.fill(model, device)
        return model


def _sees(config: Any) -> tuple[Any, ...]:
    """What a model and a processor must agree on."""
    names = ("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size")
    sizes = (getattr(config.vision_config, name, None) for name in names)
    return config.model_type, getattr(config, "image_token_id", None), *sizes
