"""SGLang as the rollout engine: in a process beside the trainer's, or running servers by HTTP.

Tried with SGLang 0.5.16 (torch 2.11, CUDA). Both ways take the same requests; weights travel by
CUDA IPC, so a server must be on the trainer's host. SGLang takes no seed per request: sampled
tokens differ from run to run.
"""

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # its reductions let CUDA tensors travel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from torchrft.config.job_config import Rollout
from torchrft.models.loader import expected_model
from torchrft.rollout import sglang_loader
from torchrft.rollout.canary import Canary, WeightSyncError
from torchrft.rollout.engine import check_prompts, completion, neighbors
from torchrft.rollout.weight_sync import buckets
from torchrft.tools.distributed import get_rank, get_world_size
from torchrft.tools.http import Deadline, Server, ServerError, run
from torchrft.tools.hub import trusts_code_of
from torchrft.tools.payload import parse
from torchrft.types import Completion, Prompt, SamplingParams

_BUCKET = 2**30  # bytes sent at a time: a hand-over needs up to three times as much memory
_CACHE = ["kv_cache", "cuda_graph"]  # what sleeps first and wakes last; graphs if SGLang was told


class LocalSglang:
    """`sglang.Engine` in processes of its own, started here; its calls are named as over HTTP."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        os.environ.setdefault("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "1")  # graphs' memory sleeps, too
        import sglang

        self.engine = sglang.Engine(**arguments)

    def post(self, path: str, payload: dict[str, Any]) -> Any:
        name = path.removeprefix("/")
        if name == "update_weights_from_tensor":
            from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

            request = UpdateWeightsFromTensorReqInput(**payload)
            manager = self.engine.tokenizer_manager
            done = manager.update_weights_from_tensor(request, None)
            success, message = self.engine.loop.run_until_complete(done)
            return {"success": success, "message": message}
        return getattr(self.engine, name)(**payload)

    def close(self) -> None:
        self.engine.shutdown()


class HttpSglang:
    """A running SGLang server. Raises ConnectionError when it does not answer or refuses."""

    def __init__(self, url: str, timeout: float) -> None:
        self.server, self.timeout = Server(url, "server_urls"), timeout

    def post(self, path: str, payload: dict[str, Any]) -> Any:
        url, deadline = self.server.under(path), Deadline(self.timeout, "request_timeout")
        try:
            content = run(self.server.exchange(url, payload, deadline))
        except (OSError, ServerError, ValueError) as error:
            raise ConnectionError(f"SGLang at {url}: {error}") from error
        try:
            return parse(content)
        except ValueError:
            return content.decode(errors="replace")

    def close(self) -> None:
        """The server is the user's."""


class SglangEngine:
    """SGLang for `tp_size` ranks in a row, led by the first; see `RolloutEngine` for the calls.

    Args: transport, None on ranks that do not lead; the others as for `VllmEngine`.
    """

    def __init__(
        self,
        transport: LocalSglang | HttpSglang | None,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: tuple[int, ...],
        tp_size: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        max_len: int | None = None,
    ) -> None:
        self.vocabulary, self.max_len = int(config.get_text_config().vocab_size), max_len
        self.transport, self.tokenizer, self.stop_token_ids = transport, tokenizer, stop_token_ids
        self.dtype, self.device, self.tp_size = dtype, torch.device(device), tp_size
        self.ranks = neighbors(tp_size)
        self.version: int | None = None
        self.asleep = self.cache_asleep = False
        self.expected = expected_model(config, dtype)

    def _post(self, path: str, **payload: Any) -> Any:
        return None if self.transport is None else self.transport.post(path, payload)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.asleep:
            raise ValueError("the engine sleeps: call wake before update_weights")
        self.version = None
        # SGLang's process compares what it holds; here it is what is missing or misshapen.
        watched = Canary(self.expected, lambda name: []).watch(named_tensors)
        pairs = ((name, tensor.to(self.device)) for name, tensor in watched)
        with ThreadPoolExecutor(1) as sender:  # a bucket is loaded while the next is gathered
            loading, failure = Future[None](), None
            loading.set_result(None)
            # To the end also after a failure: other ranks gather as well.
            for bucket in buckets(pairs, _BUCKET):
                if self.transport is not None and failure is None:
                    verdict = torch.full((self.tp_size,), -1, dtype=torch.int32, device=self.device)
                    packed = sglang_loader.pack(list(bucket.items()), verdict)
                    failure = loading.exception()
                    if failure is None:
                        loading = sender.submit(self._send, packed, list(bucket))
                    del packed
                bucket.clear()
            if failure := failure or loading.exception():
                raise failure
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # the buckets, which SGLang has let go of
        if self.cache_asleep:
            torch.cuda.empty_cache()
            self._post("/resume_memory_occupation", tags=_CACHE)
            self.cache_asleep = False
        self._post("/flush_cache")
        self.version = version

    def _send(self, packed: list[tuple[str, Tensor]], names: list[str]) -> None:
        answer = self._post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[_serialize(packed)] * self.tp_size,
            load_format=sglang_loader.PATH,
            flush_cache=False,
        )
        _, verdict = packed[-1]
        if not answer["success"]:
            raise WeightSyncError(f"SGLang refused a weight update: {answer['message']}")
        wrong = int(verdict.abs().max())
        if wrong or int(verdict.min()) < 0:
            name = names[max(wrong - 1, 0)]
            raise WeightSyncError(
                f'weight update: SGLang does not hold "{name}" as the trainer sent it; rollouts '
                "would come from another policy, so the run stops"
            )

    def sleep(self) -> None:
        if self.asleep:
            return
        self.version, self.asleep = None, True
        if not self.cache_asleep:
            self._post("/release_memory_occupation", tags=_CACHE)
            self.cache_asleep = True
        self._post("/release_memory_occupation", tags=["weights"])

    def wake(self) -> None:
        """The weights' memory; the KV cache's follows when the weights are there."""
        if self.asleep:
            torch.cuda.empty_cache()  # what torch keeps of the trainer's memory, SGLang cannot take
            self._post("/resume_memory_occupation", tags=["weights"])
        self.asleep = False

    def close(self) -> None:
        self.version = None
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        if sampling.first_token_temperature is not None:
            raise ValueError("SGLang has no first_token_temperature; use the native engine")
        check_prompts(prompts, sampling, self.version, False, self.vocabulary, self.max_len)
        parts = self.ranks.gather([prompt.token_ids for prompt in prompts], "rollout")
        everything = [token_ids for part in parts for token_ids in part]
        if not everything:
            return []
        found = [] if self.transport is None else self._run(everything, sampling)
        outputs = self.ranks.gather(found, "rollout")[0]
        first = sum(len(part) for part in parts[: self.ranks.rank]) * sampling.n
        mine = outputs[first : first + len(prompts) * sampling.n]
        return [
            self._completion(place // sampling.n, place % sampling.n, output, sampling)
            for place, output in enumerate(mine)
        ]

    def _run(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Any]:
        """SGLang's answers, prompt by prompt, in order."""
        options = [
            {
                "n": sampling.n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "max_new_tokens": sampling.budget(len(token_ids)),
                "min_new_tokens": sampling.min_new_tokens,
                "stop": list(sampling.stop) or None,
                "stop_token_ids": sorted({*self.stop_token_ids, *sampling.stop_token_ids}),
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            }
            for token_ids in prompts
        ]
        answers = self._post(
            "/generate",
            input_ids=[list(token_ids) for token_ids in prompts],
            sampling_params=options,
            return_logprob=True,
            logprob_start_len=-1,
        )
        if len(answers) != len(prompts) * sampling.n:
            raise ConnectionError(
                f"SGLang gave {len(answers)} answers to {len(prompts)} x {sampling.n} requests"
            )
        return [
            (a["meta_info"]["output_token_logprobs"], a["meta_info"]["finish_reason"])
            for a in answers
        ]

    def _completion(
        self, prompt: int, sample: int, output: Any, sampling: SamplingParams
    ) -> Completion:
        rows, reason = output
        reason = reason["type"] if isinstance(reason, Mapping) else reason
        pairs = ((int(row[1]), float(row[0])) for row in rows)
        tokenizer, ends = self.tokenizer, self.stop_token_ids
        return completion(prompt, sample, pairs, reason, self.version, sampling, tokenizer, ends)


def _serialize(tensors: list[tuple[str, Tensor]]) -> str:
    """As sglang.srt.utils.MultiprocessingSerializer does."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


def join_sglang(urls: Sequence[str], timeout: float) -> HttpSglang:
    """This rank's server. Raises ValueError when there is not one server for every rank, or when it
    does not answer."""
    ranks = get_world_size()
    if len(urls) != ranks:
        raise ValueError(
            f"[rollout] server_urls names {len(urls)} SGLang servers for {ranks} ranks; give every "
            "rank one on its own host, since weights travel by CUDA IPC"
        )
    transport = HttpSglang(urls[get_rank()], timeout)
    try:
        transport.post("/flush_cache", {})
    except ConnectionError as error:
        raise ValueError(f"[rollout] server_urls: {error}") from error
    return transport


def start_sglang(
    rollout: Rollout, pretrain: str, max_len: int, dtype: torch.dtype
) -> LocalSglang | None:
    """The engine's processes on this rank's GPUs; None on ranks that do not lead.

    Raises ValueError, with SGLang's own words, when it does not start.
    """
    rank = get_rank()
    if rank % rollout.engine_tp_size:
        return None
    local = int(os.environ.get("LOCAL_RANK", 0))
    arguments: dict[str, Any] = {
        "model_path": pretrain,
        "load_format": "dummy",
        "trust_remote_code": trusts_code_of(pretrain),
        "dtype": str(dtype).removeprefix("torch."),
        "context_length": max_len,
        "max_running_requests": rollout.max_num_seqs,
        "cuda_graph_max_bs_decode": rollout.max_num_seqs,
        "disable_prefill_cuda_graph": True,
        "tp_size": rollout.engine_tp_size,
        "base_gpu_id": local,
        "port": 30000 + 100 * local,
        "mem_fraction_static": rollout.engine_mem_util,
        "enable_memory_saver": rollout.enable_engine_sleep,
        # Stop strings and a least length need text and its tokenizer there.
        "skip_tokenizer_init": not rollout.stop and rollout.min_new_tokens == 0,
        "random_seed": rank,
        "custom_weight_loader": [sglang_loader.PATH],
        "log_level": "error",
    }
    try:
        return LocalSglang({**arguments, **rollout.sglang})
    except (TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:600]
        raise ValueError(
            f"SGLang did not start: {said}; its options are [rollout.sglang], its memory is "
            f"engine_mem_util = {rollout.engine_mem_util}"
        ) from error
