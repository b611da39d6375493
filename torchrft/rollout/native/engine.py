"""torchrft's own rollout engine: continuous batching in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from torchrft.models import attention
from torchrft.models.loader import empty_model
from torchrft.models.support import check_length, refuse_unsupported
from torchrft.models.tokenizer import decode
from torchrft.parallel.compile import apply_compile
from torchrft.rollout.engine import check_prompts, texts
from torchrft.rollout.native.graphs import FixedCache, GraphRunner, supports
from torchrft.rollout.native.joined import join_projections
from torchrft.rollout.native.kv_cache import SlotCache
from torchrft.rollout.native.scheduler import Request, Runner, Sample, Scheduler
from torchrft.rollout.native.sessions import Sessions
from torchrft.rollout.native.slots import Slots
from torchrft.rollout.native.step import Decoder, EagerRunner, Step
from torchrft.rollout.weight_sync import copy_weights
from torchrft.tools import progress
from torchrft.types import Completion, FinishReason, Prompt, SamplingParams

if TYPE_CHECKING:
    from torchrft.models.vision import Vision
    from torchrft.rollout.native.serving import NativeServing


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
        self.warm: set[tuple[float, ...]] = set()  # see GraphRunner
        if self.compiled:
            decoder = self.model.get_decoder()
            decoder.set_attn_implementation(attention.TRACED)
            for module in decoder.modules():
                if hasattr(module, "layer_idx"):  # filled in by GraphRunner
                    module.register_buffer("layer_index", None, persistent=False)
            apply_compile(self.model)
            for name, module in decoder.named_children():
                if name in ("rotary_emb", "norm"):  # many small kernels
                    module.compile(dynamic=True)
        storages = [parameter.untyped_storage() for parameter in self.model.parameters()]
        self.storages = [(storage, storage.nbytes()) for storage in storages]
        self.version: int | None = None  # None: no weights yet
        self.fp32_head = False  # whether 16-bit hidden states and weights make float32 logits
        self.asleep = False
        self.serving: NativeServing | None = None

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.asleep:
            raise ValueError("the engine sleeps: call wake before update_weights")
        self._forget()
        self.version = None
        copy_weights(self.model, named_tensors)
        self.version = version

    def sleep(self) -> None:
        """Frees the weights; the KV cache lives only while `generate` runs or it serves."""
        self._forget()
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

    def serve(self, sampling: SamplingParams, at_once: int) -> NativeServing:
        """See `torchrft.types.Serves`."""
        from torchrft.rollout.native.serving import NativeServing

        self.serving = NativeServing(self, sampling, min(self.max_num_seqs, at_once))
        return self.serving

    def _forget(self) -> None:
        if self.serving is not None:
            self.serving.forget()

    @torch.inference_mode()
    @torch._dynamo.config.patch(recompile_limit=64)  # shapes of caches differ
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        check_prompts(prompts, sampling, self.version, self.vision is not None, vocabulary)
        if not prompts:
            return []
        requests = self._requests(prompts, sampling)
        longest = max(len(r.prompt.token_ids) + r.budget for r in requests)
        check_length(longest, self.limit, type(self.model).__name__)
        slots = min(self.max_num_seqs, len(requests) * sampling.n)
        budget = max(request.budget for request in requests)
        has_images = any(request.prompt.images for request in requests)
        scheduler = self.scheduler(sampling, slots, longest, budget, has_images)
        for request in requests:
            scheduler.add(request)
        samples: list[Sample] = []
        while scheduler.busy:
            samples += scheduler.advance()
            progress.at(len(samples), len(prompts) * sampling.n, "samples")
        samples.sort(key=lambda sample: (sample.request.number, sample.index))
        return [self.completion(sample, sampling) for sample in samples]

    def _requests(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Request]:
        n = sampling.n
        seeds: Sequence[Sequence[int]] | None = sampling.seeds
        if seeds is None:  # greedily nothing is drawn: the generators stay as they are
            draw = torch.zeros if sampling.temperature == 0 else partial(torch.randint, 2**62)
            seeds = draw((len(prompts) * n,), dtype=torch.long).view(-1, n).tolist()
        budgets = [sampling.budget(len(prompt.token_ids)) for prompt in prompts]
        shifts = [0 if self.vision is None else self.vision.shift(prompt) for prompt in prompts]
        return list(map(Request, range(len(prompts)), prompts, seeds, budgets, shifts))

    def scheduler(
        self,
        sampling: SamplingParams,
        slots: int,
        longest: int,
        budget: int,
        has_images: bool,
        sessions: Sessions | None = None,
    ) -> Scheduler:
        """One for sequences of up to `longest` tokens, `budget` of them sampled."""
        decoder = Decoder(self.model, self.vision, self.fp32_head)
        state = Slots.empty(slots, budget, self.device, has_images)
        stop_ids = self.stop_token_ids + sampling.stop_token_ids
        # One more than the longest sequence, since a slot is reserved for a token and the next.
        cache = SlotCache(slots, longest + 1)
        if captured := supports(self.model, sampling):
            heads = self.model.config.get_text_config().num_attention_heads
            cache = FixedCache(slots, longest + 1, heads, self.compiled)
        step = Step(decoder, cache, state, sampling, stop_ids, captured and self.compiled)
        runner: Runner = GraphRunner(step, self.warm) if captured else EagerRunner(step)
        return Scheduler(runner, partial(decode, self.tokenizer), sessions)

    def completion(self, sample: Sample, sampling: SamplingParams) -> Completion:
        """What a finished sample is for the caller."""
        stop_ids = self.stop_token_ids + sampling.stop_token_ids
        (text,) = texts(self.tokenizer, [sample.tokens], sampling.stop, stop_ids)
        reason: FinishReason = "stop" if sample.stopped else "length"
        tokens, logprobs = tuple(sample.tokens), tuple(sample.logprobs)
        place = sample.request.number, sample.index
        assert self.version is not None
        return Completion(*place, tokens, logprobs, text, reason, self.version, sample.kept)
