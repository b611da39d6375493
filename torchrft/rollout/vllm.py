"""vLLM as the rollout engine, in the trainer's own process.

Tried with vLLM 0.25 (torch 2.11, CUDA) and 0.32 (torch 2.13, CPU).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from torchrft.config.job_config import Rollout
from torchrft.models.loader import expected_model
from torchrft.models.vision import Vision
from torchrft.rollout.engine import check_prompts, completion, neighbors
from torchrft.rollout.fused_weights import Places
from torchrft.rollout.vllm_model import head_dtypes, load, scale_logits
from torchrft.rollout.vllm_serving import VllmServing, sampling_options
from torchrft.tools.distributed import DataRanks
from torchrft.tools.hub import trusts_code_of
from torchrft.tools.logging import logger
from torchrft.tools.progress import Counted
from torchrft.tools.seeds import rng_state, set_rng_state
from torchrft.types import Completion, Prompt, SamplingParams

# Set before vLLM is imported, unless the user did. One process: the trainer's tensors are then
# handed over by reference. FlashInfer's sampler knows no seeds per request.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_Request = tuple[Prompt, dict[str, Any]]
_ALONE = DataRanks()


class VllmEngine:
    """One vLLM engine for every `tp_size` ranks in a row; see `RolloutEngine` for the calls.

    Args:
        rollout: engine_mem_util is the share of the GPU's memory that vLLM may take; on a CPU it
            takes what `max_num_seqs` sequences of `max_len` tokens need. The table `vllm`, further
            arguments of `vllm.LLM`, goes before torchrft's own.
        pretrain: folder or hub id whose config vLLM reads; its weights are not loaded.
        max_len: tokens of the longest prompt with its response.

    Raises ValueError, with vLLM's own words, when vLLM does not start.
    """

    def __init__(
        self,
        rollout: Rollout,
        pretrain: str,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: tuple[int, ...],
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        vision: Vision | None = None,
    ) -> None:
        if vision is not None and vision.source not in (None, pretrain):
            raise ValueError(
                f'processor = "{vision.source}": vLLM takes the processor from pretrain = '
                f'"{pretrain}"; copy it there, or use engine_type = "native"'
            )
        self.tokenizer, self.stop_token_ids, self.vision = tokenizer, stop_token_ids, vision
        self.dtype, self.on_cpu = dtype, torch.device(device).type == "cpu"
        self.sleeps = rollout.enable_engine_sleep and not self.on_cpu
        self.version: int | None = None
        self.asleep = self.cache_asleep = self.sleep_was_refused = False
        self.cached = False  # whether vLLM keeps anything that these weights computed
        self.temperature = 1.0
        self.ranks = neighbors(rollout.engine_tp_size)
        self.expected, self.max_len = expected_model(config, dtype), max_len
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.stops_at_strings = bool(rollout.stop) or vision is not None
        self.places: Places | None = None
        arguments: dict[str, Any] = {
            "load_format": "dummy",
            "tensor_parallel_size": rollout.engine_tp_size,
            "logprobs_mode": "raw_logprobs",
            "skip_tokenizer_init": not self.stops_at_strings,
        }
        if vision is not None:
            # Its constants are buffers, in which "dummy" weights are random numbers.
            arguments["mm_device_do_normalize"] = False
        if self.on_cpu:
            # A prompt cut in two with a seed ends in "CPU Generator does not use offset".
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(max_len, 8192)
            sequences = rollout.max_num_seqs
            arguments["kv_cache_memory_bytes"] = cache_bytes(config, dtype, sequences, max_len)
        else:
            arguments["enable_sleep_mode"] = self.sleeps
        self.llm = start(rollout, pretrain, max_len, dtype, self.on_cpu, arguments, self.ranks)
        self.llm.apply_model(lambda model: scale_logits(model, self._temperature))
        wants_fp32 = "hf_overrides" in rollout.vllm
        if wants_fp32 and self.llm.apply_model(head_dtypes) != [{torch.float32}]:
            raise ValueError(
                "fp32_head: this vLLM has no float32 head; use a newer one (0.32 has it), or "
                'engine_type = "native"'
            )

    # ---------------------------------------------------------------- weights

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.asleep:
            raise ValueError("the engine sleeps: call wake before update_weights")
        self.version = None
        self.llm.apply_model(lambda model: self._load(model, named_tensors))
        if self.cache_asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
            self.cache_asleep = False
        if self.cached:  # what the old weights computed; it takes as long as half a hand-over
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM keeps the KV cache of the old weights; build it anew")
            if hasattr(self.llm.llm_engine, "reset_encoder_cache"):
                self.llm.llm_engine.reset_encoder_cache()
            self.cached = False
        self.version = version

    def _load(self, model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        def reload(pairs: Iterable[tuple[str, Tensor]]) -> None:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})

        self.places = self.places or Places(model)
        load(self.places, self.expected, named_tensors, reload if self.on_cpu else None)

    # ---------------------------------------------------------------- memory

    def sleep(self) -> None:
        """Frees weights and KV cache, on a GPU; vLLM on a CPU cannot, and says so once."""
        if self.asleep:
            return
        self.version, self.asleep = None, True
        if self.sleeps:
            if self.cache_asleep:  # awake without new weights: vLLM only sleeps as a whole
                self.llm.wake_up(tags=["kv_cache"])
            self.llm.sleep(level=2)  # and empties its caches
            self.cache_asleep, self.cached = True, False
        elif not self.sleep_was_refused:
            self.sleep_was_refused = True
            why = "vLLM cannot sleep on a CPU" if self.on_cpu else "it was built without sleep"
            logger.info(f"the rollout engine keeps its memory while the trainer computes: {why}")

    def wake(self) -> None:
        """Takes the weights' memory again; the KV cache's follows when the weights are there."""
        if self.sleeps and self.asleep:
            torch.cuda.empty_cache()  # what torch keeps of the trainer's memory, vLLM cannot take
            self.llm.wake_up(tags=["weights"])
        self.asleep = False

    def close(self) -> None:
        """Frees what `sleep` does; the rest of vLLM ends with the process."""
        self.sleep()

    # ---------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        self.check(prompts, sampling)
        requests = [
            (prompt, sampling_options(place, prompt, sampling, self.stop_token_ids))
            for place, prompt in enumerate(prompts)
        ]
        # The ranks of one engine must all run the same requests; each keeps its own.
        parts = self.ranks.gather(requests, "rollout")
        everything = [request for part in parts for request in part]
        if not everything:
            return []
        outputs = self._run(everything, sampling.temperature)
        first = sum(len(part) for part in parts[: self.ranks.rank])
        mine = zip(prompts, outputs[first : first + len(prompts)], strict=True)
        return [
            completion
            for place, (prompt, output) in enumerate(mine)
            for completion in self.completions(place, prompt, output, sampling)
        ]

    def check(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Raises ValueError for what this engine cannot do."""
        if sampling.first_token_temperature is not None:
            raise ValueError("vLLM has no first_token_temperature; use the native engine")
        if sampling.stop and not self.stops_at_strings:
            raise ValueError(
                f"this engine does not stop at {list(sampling.stop)}: it was built without "
                "[rollout] stop, which gives it a tokenizer"
            )
        sees = self.vision is not None
        check_prompts(prompts, sampling, self.version, sees, self.vocabulary, self.max_len)

    def _run(self, requests: Sequence[_Request], temperature: float) -> list[Any]:
        parameters = [self.parameters(options, temperature) for _, options in requests]
        inputs = [self.input(prompt) for prompt, _ in requests]
        self.cached = True
        try:
            return self.llm.generate(inputs, parameters, use_tqdm=Counted)
        except BaseException:
            self.abort()
            raise

    def parameters(self, options: dict[str, Any], temperature: float) -> Any:
        """vLLM's SamplingParams; the temperature is that of all that is under way."""
        import vllm

        self.temperature = temperature or 1.0
        sampled = 1.0 if temperature else 0.0
        return vllm.SamplingParams(temperature=sampled, flat_logprobs=True, **options)

    def abort(self) -> None:
        """Ends what is under way: after an interrupt it would be part of the next call."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def input(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        if not prompt.images:
            return {"prompt_token_ids": list(prompt.token_ids)}
        assert self.vision is not None
        return {
            "prompt_token_ids": list(self.vision.bare_token_ids(prompt)),
            "multi_modal_data": {"image": self.vision.pictures(prompt)},
        }

    def _temperature(self) -> float:
        return self.temperature

    def completions(
        self, place: int, prompt: Prompt, output: Any, sampling: SamplingParams
    ) -> list[Completion]:
        """What vLLM's `output` for prompt number `place` is for the caller.

        Raises RuntimeError if vLLM has made other tokens of its pictures than the trainer.
        """
        if prompt.images and tuple(output.prompt_token_ids) != prompt.token_ids:
            raise RuntimeError(
                f"vLLM makes {len(output.prompt_token_ids)} tokens of prompt row {prompt.row}, "
                f"the trainer {len(prompt.token_ids)}: their processors differ"
            )
        stops, tokenizer = self.stop_token_ids, self.tokenizer
        found = []
        for one in sorted(output.outputs, key=lambda one: one.index):
            rows, reason = zip(one.token_ids, one.logprobs.logprobs, strict=True), one.finish_reason
            how = (reason, self.version, sampling, tokenizer, stops)
            found.append(completion(place, one.index, rows, *how))
        return found

    def serve(self, sampling: SamplingParams, at_once: int) -> VllmServing:
        """See `torchrft.types.Serves`."""
        return VllmServing(self, sampling)


def start(
    rollout: Rollout,
    pretrain: str,
    max_len: int,
    dtype: torch.dtype,
    on_cpu: bool,
    own: dict[str, Any],
    ranks: DataRanks = _ALONE,
) -> Any:
    """`vllm.LLM` of this rank, one of the engine's `ranks`, with `own` arguments of its kind, with
    its errors in a sentence and the random state as it was."""
    arguments: dict[str, Any] = {
        "model": pretrain,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_len,
        "max_num_seqs": rollout.max_num_seqs,
        "seed": 0,
        "trust_remote_code": trusts_code_of(pretrain),
    }
    memory = rollout.engine_mem_util
    device = {"enforce_eager": True} if on_cpu else {"gpu_memory_utilization": memory}
    arguments |= {**device, **own, **rollout.vllm}
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM, EngineArgs
    except ImportError as error:
        raise ValueError(
            f"vLLM is installed, but cannot be imported: {error}; install the build for this torch "
            f"({torch.__version__}), see docs/rollout_engines.md"
        ) from error
    if "mm_device_do_normalize" not in EngineArgs.__dataclass_fields__:  # versions before 0.32
        arguments.pop("mm_device_do_normalize", None)
    if dist.is_initialized() and dist.get_world_size() > 1:
        arguments = {"distributed_executor_backend": "external_launcher", **arguments}
    state = rng_state()  # vLLM seeds the whole process
    try:
        with _shared_memory(ranks) if on_cpu and ranks.size > 1 else nullcontext():
            llm = LLM(**arguments)
    except TypeError as error:
        said = f"[rollout.vllm] holds an argument that vLLM does not know: {error}"
        raise ValueError(said) from error
    except (ValueError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())
        said = f"vLLM did not start: {text[:600]}"
        if "memory" in text.lower():
            said += (
                f"; engine_mem_util = {memory} does not fit beside what the GPU holds: change it"
            )
        raise ValueError(said) from error
    finally:
        set_rng_state(state)
    if ranks.size > 1:
        _unlink_queue()
    if dist.is_initialized():
        # vLLM's own end, at exit, destroys every process group: the trainer's, too.
        finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
    return llm


@contextmanager
def _shared_memory(ranks: DataRanks) -> Iterator[None]:
    """Memory of this engine's own for the ranks that share it on a CPU. vLLM names it after the
    ranks alone, so that a job beside this one, or one that was killed, had taken the name. The name
    goes when all ranks are joined: no end of a process leaves it behind."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    own = f"torchrft-{ranks.gather(uuid4().hex, 'start of vLLM')[0]}"
    named = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda c: own + named(c).lstrip("/"))
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(named)
        for file in Path("/dev/shm").glob(f"{own}*"):
            file.unlink(missing_ok=True)


def _unlink_queue() -> None:
    """Takes the name of the queue between the engine's ranks, who all have it: processes that are
    killed, or end at once, do not leave it behind."""
    from vllm.distributed.parallel_state import get_tp_group

    buffer: Any = getattr(getattr(get_tp_group(), "mq_broadcaster", None), "buffer", None)
    if getattr(buffer, "is_creator", False):
        buffer.shared_memory.unlink()
        buffer.is_creator = False


def cache_bytes(config: PreTrainedConfig, dtype: torch.dtype, sequences: int, length: int) -> int:
    """KV cache of so many sequences of that length, and a little for rounding to blocks."""
    text: Any = config.get_text_config()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * dim * dtype.itemsize
    return sequences * (length + 256) * token
