"""torchrft's own rollout engine: continuous batching in plain PyTorch, on any device."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from torchrft.models.loader import empty_model
from torchrft.models.support import check_length, refuse_unsupported
from torchrft.models.tokenizer import decode
from torchrft.models.vision import Vision
from torchrft.parallel.compile import apply_compile
from torchrft.rollout.engine import check_prompts, texts
from torchrft.rollout.native.generation import Generation
from torchrft.rollout.native.graphs import GraphGeneration, supports
from torchrft.rollout.native.joined import join_projections
from torchrft.rollout.weight_sync import copy_weights
from torchrft.types import Completion, FinishReason, Kept, Prompt, SamplingParams


class NativeEngine:
    """Runs the transformers model itself, one copy per rank; see `RolloutEngine` for the calls.

    >>> engine = NativeEngine(config, tokenizer, stop_token_ids=(1,))       # doctest: +SKIP
    >>> engine.update_weights(named_full_tensors(model), version=0)         # doctest: +SKIP
    >>> engine.generate(prompts, SamplingParams(n=8, temperature=1.0))      # doctest: +SKIP

    Raises ValueError for a model that `refuse_unsupported` refuses.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: tuple[int, ...],
        max_num_seqs: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compile: bool = False,
        vision: Vision | None = None,
    ) -> None:
        self.tokenizer, self.vision = tokenizer, vision
        self.stop_token_ids = stop_token_ids
        self.max_num_seqs = max_num_seqs
        self.device = torch.device(device)
        self.limit = refuse_unsupported(config, cache=True)
        model: Any = empty_model(config, dtype, self.device)
        self.model = model.eval().requires_grad_(False)
        join_projections(self.model.get_decoder())
        self.compiled = compile and self.device.type == "cuda"
        self.warm: set[tuple[float, ...]] = set()  # see GraphGeneration
        if self.compiled:
            for module in self.model.modules():
                if hasattr(module, "layer_idx"):  # filled in by GraphGeneration
                    module.register_buffer("layer_index", None, persistent=False)
            apply_compile(self.model)
            for name, module in self.model.get_decoder().named_children():
                if name in ("rotary_emb", "norm"):  # many small kernels
                    module.compile(dynamic=True)
        storages = [parameter.untyped_storage() for parameter in self.model.parameters()]
        self.storages = [(storage, storage.nbytes()) for storage in storages]
        self.version: int | None = None  # None: no weights yet
        self.fp32_head = False  # whether 16-bit hidden states and weights make float32 logits
        self.asleep = False

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.asleep:
            raise ValueError("the engine sleeps: call wake before update_weights")
        self.version = None
        copy_weights(self.model, named_tensors)
        self.version = version

    def sleep(self) -> None:
        """Frees the weights; the KV cache lives only while `generate` runs."""
        self.version, self.asleep = None, True
        for storage, _ in self.storages:
            storage.resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self.asleep = False
        for storage, size in self.storages:
            storage.resize_(size)

    def close(self) -> None:
        self.sleep()

    @torch.inference_mode()
    @torch._dynamo.config.patch(recompile_limit=64)  # shapes of caches differ
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        check_prompts(prompts, sampling, self.version, self.vision is not None, vocabulary)
        if not prompts:
            return []
        longest = max(len(p.token_ids) + sampling.budget(len(p.token_ids)) for p in prompts)
        check_length(longest, self.limit, type(self.model).__name__)
        kind: Callable[..., Generation] = Generation
        # What draws were among has no fixed size, which a captured step needs.
        if supports(self.model, bool(sampling.stop) or sampling.replay):
            kind = partial(GraphGeneration, compiled=self.compiled, warm=self.warm)
        generation = kind(
            self.model,
            prompts,
            sampling,
            stop_ids=self.stop_token_ids + sampling.stop_token_ids,
            max_num_seqs=self.max_num_seqs,
            decode=partial(decode, self.tokenizer),
            vision=self.vision,
        )
        generation.fp32_head = self.fp32_head
        tokens, logprobs, stopped = generation.run()
        return self._completions(sampling, tokens, logprobs, stopped, generation.kept_tokens())

    def _completions(
        self,
        sampling: SamplingParams,
        tokens: list[list[int]],
        logprobs: list[list[float]],
        stopped: list[bool],
        kept: Sequence[Kept | None],
    ) -> list[Completion]:
        completions = []
        stop_ids = self.stop_token_ids + sampling.stop_token_ids
        for request, text in enumerate(texts(self.tokenizer, tokens, sampling.stop, stop_ids)):
            reason: FinishReason = "stop" if stopped[request] else "length"
            assert self.version is not None
            completions.append(
                Completion(
                    prompt_index=request // sampling.n,
                    sample_index=request % sampling.n,
                    token_ids=tuple(tokens[request]),
                    logprobs=tuple(logprobs[request]),
                    text=text,
                    finish_reason=reason,
                    policy_version=self.version,
                    kept=kept[request],
                )
            )
        return completions
