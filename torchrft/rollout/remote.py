"""Running vLLM servers as the rollout engine, over HTTP: see docs/remote_engines.md.

A server names the weights that made a completion by a tag that the engine gives it: the run, the
policy version and the temperature by which logits are divided. A completion with another tag, from
a server that was restarted or belongs to another run, is never used.
"""

import math
import os
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from torchrft.config.job_config import Rollout
from torchrft.models.loader import expected_model
from torchrft.rollout.canary import Canary, WeightSyncError
from torchrft.rollout.engine import check_prompts, completion
from torchrft.rollout.remote_serving import RemoteServing
from torchrft.rollout.vllm_serving import sampling_options
from torchrft.rollout.weight_files import WeightFiles
from torchrft.rollout.weight_sync import layout
from torchrft.tools import distributed
from torchrft.tools.credentials import bearer_token
from torchrft.tools.http import Deadline, Server, ServerError, ServerGroup, run, run_all
from torchrft.types import Completion, Prompt, SamplingParams

_GENERATE = "/inference/v1/generate"  # vLLM's "tokens in, tokens out"
_CHANGING = "changing"  # the tag of a server between two others


class _Rescaled(Exception):
    """Another rank changed the server's temperature while it made a completion."""


class RemoteVllmEngine:
    """Rollouts from vLLM servers that run on their own; see `RolloutEngine` for the calls.

    `generate` may run in one thread while another calls `update_weights`: what is in flight ends on
    the old weights, what comes later is made by the new ones, and each completion says which.

    Of `rollout` it takes server_urls, max_num_seqs (sequences that this rank keeps outstanding at
    each server, about), request_timeout (retries included), request_retries (where no connection
    was found, or a 5xx), weight_folder (which servers must see under the same path) and the
    temperature expected of `generate`: others cost a pause of the servers.

    Raises ValueError at the start with a sentence for each server that cannot be used, and
    ConnectionError from `generate` and `update_weights` when none is left, or when one refuses a
    request as such.
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
    ) -> None:
        variable = "VLLM_API_KEY" if os.environ.get("VLLM_API_KEY") else None
        token = bearer_token(variable, "the token of server_urls")
        self.group = ServerGroup(
            [Server(url, "server_urls", token) for url in rollout.server_urls],
            "rollout servers",
            ConnectionError,
            until="the next weight update",
            turn=distributed.get_rank(),  # ranks begin at different servers
        )
        self.rollout, self.tokenizer, self.stop_token_ids = rollout, tokenizer, stop_token_ids
        self.temperature = rollout.temperature
        self.version: int | None = None
        self.newest = -1  # the version that is on its way to the servers, or there
        self.expected = expected_model(config, dtype)
        self.needs = (pretrain, str(dtype).removeprefix("torch."), max_len)
        folder = rollout.weight_folder
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(
                f'weight_folder = "{folder}" is not a folder; make it, or name another'
            )
        # Every rank's, but rank 0's is used; it goes with the process.
        try:
            self._temporary_folder = tempfile.TemporaryDirectory(prefix="torchrft-", dir=folder)
        except OSError as error:
            raise ValueError(
                f"weight_folder: no folder for the weights can be made ({error}); name another"
            ) from error
        mine = (uuid.uuid4().hex, self._temporary_folder.name)
        self.run_id, self.folder = distributed.on_main(lambda: mine, "rollout servers")
        self._control = threading.Condition()  # held while servers change their weights or scale
        self._users = 0  # calls of generate that go on
        parts = distributed.on_all(lambda: run_all(self._fault, self.group.servers), "servers")
        if faults := {fault for part in parts for fault in part if fault is not None}:
            raise ValueError("\n".join(sorted(faults)))

    # ---------------------------------------------------------------- servers

    async def _ask(self, server: Server, path: str, body: Any = None, retry: bool = True) -> Any:
        deadline = Deadline(self.rollout.request_timeout, "request_timeout")
        return await server.ask(path, body, deadline, self.rollout.request_retries if retry else 0)

    async def _fault(self, server: Server) -> str | None:
        """Why the server cannot be used, in a sentence with the remedy."""
        extension = {"method": "torchrft_info", "args": [self.folder]}
        try:
            server.info = (await self._ask(server, "/collective_rpc", extension))["results"][0]
            await self._ask(server, "/weight_info")
            await self._probe_generate(server)
        except ConnectionError as error:
            return f"{server.url} cannot be reached ({error}); start it or correct server_urls"
        except ServerError as error:
            return (
                f"{server.url} is not a vLLM server for torchrft ({error}); start it with the "
                "options of docs/remote_engines.md"
            )
        misfit = self._misfit(server.info)
        return f"{server.url} {misfit}" if misfit else None

    async def _probe_generate(self, server: Server) -> None:
        """Raises ServerError if token ids cannot be sent: an empty request is only a bad one."""
        try:
            await self._ask(server, _GENERATE, {})
        except ServerError as error:
            if error.status not in (400, 422):
                raise

    def _misfit(self, info: dict[str, Any]) -> str | None:
        """What about a server keeps it from being used, with the remedy."""
        pretrain, dtype, length = self.needs
        if info["layout"] != layout(self.expected):
            return f"serves another model, {info['model']}: start it with --model {pretrain}"
        if info["dtype"] != dtype:
            return f"computes in {info['dtype']}: start it with --dtype {dtype}"
        if info["max_len"] < length:
            return (
                f"takes {info['max_len']} tokens, fewer than max_len = {length}: start it with "
                f"--max-model-len {length}, or lower max_len"
            )
        if info["logprobs_mode"] != "raw_logprobs":
            return f"gives {info['logprobs_mode']}: start it with --logprobs-mode raw_logprobs"
        if info["backend"] != "torchrft":
            backend = '{"backend":"torchrft"}'
            return f"takes no weights: start it with --weight-transfer-config '{backend}'"
        if not info["sees_folder"]:
            return f"does not see {self.folder}: set weight_folder to a folder that it shares"
        if info["cuts_prompts"]:
            return "cuts prompts, which fails on a CPU: start it with --no-enable-chunked-prefill"
        return None

    # ---------------------------------------------------------------- weights

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Rank 0 writes the weights and has every server load them; the others wait for it."""
        pairs = Canary(self.expected, lambda name: []).watch(named_tensors)
        files = WeightFiles()
        if distributed.is_main():
            files = WeightFiles.write(pairs, self.folder)
        else:
            for _ in pairs:
                pass
        with self._control:
            self.newest, self.version = version, None  # unless it goes well
            self.temperature, faults = distributed.on_main(
                lambda: self._send(files, version), "weight sync"
            )
            run(self._take_over(faults))
            if all(faults):
                raise self.group.given_up("no server took the weights")
            self.version = version

    def _send(self, files: WeightFiles, version: int) -> tuple[float, list[str | None]]:
        """The temperature of the logits, and for each server why it did not take the weights."""
        try:
            if files.failure is not None:
                raise WeightSyncError(files.failure)
            self.group.try_each(partial(self._push, files, version), self.group.servers)
            return self.temperature, [server.fault for server in self.group.servers]
        finally:
            files.remove()

    async def _take_over(self, faults: list[str | None]) -> None:
        """On every rank, those servers are used that rank 0 gave the weights."""
        for server, fault in zip(self.group.servers, faults, strict=True):
            if fault is None:
                self.group.readmit(server)
            else:
                self.group.rest(server, fault)

    async def _push(self, files: WeightFiles, version: int, server: Server) -> None:
        if server.fault is not None and (fault := await self._fault(server)) is not None:
            raise ConnectionError(fault)
        try:
            await self._change(server, version, files)
        except ServerError as error:
            _, canary, said = error.message.partition("weight update: ")
            if canary:  # out of what vLLM wraps around it
                said = said.partition("', please check")[0]
                raise WeightSyncError(f"weight update of {server.url}: {said}") from None
            raise
        self.group.readmit(server)

    async def _change(
        self, server: Server, version: int | None, files: WeightFiles | None = None
    ) -> None:
        """Gives the server weights and a temperature, between what it was asked and will be.

        If that fails it stays paused, so that nothing is made by whatever it holds.
        """
        ask, tag = partial(self._ask, server), self._tag(version, self.temperature)
        scale = {"method": "torchrft_temperature", "args": [repr(self.temperature)]}
        await ask("/pause?mode=wait", {})
        await ask("/update_weight_version", {"new_version": _CHANGING})
        if files is not None:
            await self._load(server, files)
        await ask("/collective_rpc", scale)
        await ask("/update_weight_version", {"new_version": tag})
        await ask("/resume", {})

    async def _load(self, server: Server, files: WeightFiles) -> None:
        """vLLM's weight update, from `files`."""
        ask = partial(self._ask, server)
        try:
            await ask("/start_weight_update", {}, retry=False)
        except ServerError:  # a trainer that was killed in the middle of one has left it open
            await ask("/finish_weight_update", {}, retry=False)
            await ask("/start_weight_update", {}, retry=False)
        info = {"paths": files.paths, "marks": files.marks}
        await ask("/update_weights", {"update_info": info}, retry=False)
        await ask("/finish_weight_update", {}, retry=False)
        # What was computed by the old weights.
        await ask("/reset_encoder_cache", {})
        if not (await ask("/reset_prefix_cache", {}))["success"]:
            raise ConnectionError("it keeps the KV cache of the old weights")

    def _tag(self, version: int | None, temperature: float) -> str:
        return f"{self.run_id}/{version}/{temperature!r}"

    # ---------------------------------------------------------------- memory

    def sleep(self) -> None:
        """Servers that can sleep do; nothing happens at the others, which keep their weights."""
        self._everywhere("/sleep?level=2")

    def wake(self) -> None:
        self._everywhere("/wake_up")

    def _everywhere(self, path: str) -> None:
        able = [server for server in self.group.servers if server.info["sleeps"]]
        if not able:
            return
        self.version = None  # weights do not survive
        distributed.barrier("rollout")  # nobody generates any more
        if distributed.is_main():
            self.group.try_each(lambda server: self._ask(server, path, {}), able)
        distributed.barrier("rollout")

    def close(self) -> None:
        """The servers are the user's and go on; only the folder of the weights goes."""
        self._temporary_folder.cleanup()

    # ---------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        self.check(prompts, sampling)
        if not prompts:
            return []
        limit = max(1, self.rollout.max_num_seqs // sampling.n) * len(self.group.servers)
        with self.scaled(sampling.temperature or 1.0) as oldest:
            complete = partial(self.complete, sampling, oldest)
            responses = run_all(complete, list(enumerate(prompts)), limit, "prompts")
        return [completion for samples in responses for completion in samples]

    def serve(self, sampling: SamplingParams, at_once: int) -> RemoteServing:
        """See `torchrft.types.Serves`."""
        return RemoteServing(self, sampling)

    def check(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Raises ValueError for what the servers cannot do."""
        if sampling.first_token_temperature is not None:
            raise ValueError("vLLM has no first_token_temperature; use the native engine")
        with self._control:  # not in the middle of a weight update
            check_prompts(prompts, sampling, self.version)

    @contextmanager
    def scaled(self, temperature: float) -> Iterator[int]:
        """Meanwhile all servers divide their logits by `temperature`.

        Yields the oldest policy version that may make a completion.
        """
        with self._control:
            self._control.wait_for(lambda: not self._users or self.temperature == temperature)
            if self.temperature != temperature:
                self.temperature = temperature
                usable = [server for server in self.group.servers if server.fault is None]
                self.group.try_each(self._rescale, usable)
            self._users += 1
            oldest = self.version
        assert oldest is not None
        try:
            yield oldest
        finally:
            with self._control:
                self._users -= 1
                self._control.notify_all()

    async def _rescale(self, server: Server) -> None:
        tag = self._tag(self.version, self.temperature)
        if (await self._ask(server, "/weight_info"))["weight_version"] != tag:  # by another rank
            await self._change(server, self.version)

    async def complete(
        self,
        sampling: SamplingParams,
        oldest: int,
        numbered_prompt: tuple[int, Prompt],
        preferred: Server | None = None,
    ) -> list[Completion]:
        """The completions of one prompt, from the first server that makes them."""
        place, prompt = numbered_prompt
        options = sampling_options(place, prompt, sampling, self.stop_token_ids)
        # The server divides by the temperature itself, as VllmEngine does.
        options["temperature"] = 1.0 if sampling.temperature else 0.0
        body = {"token_ids": list(prompt.token_ids), "sampling_params": options}

        async def ask(server: Server) -> list[Completion]:
            try:
                choices = (await self._ask(server, _GENERATE, body))["choices"]
            except ServerError as error:
                if error.status in (400, 422):
                    raise
                raise ConnectionError(str(error)) from error
            made = [self._completion(place, choice, sampling, oldest) for choice in choices]
            return sorted(made, key=lambda completion: completion.sample_index)

        subject = f"prompt row {prompt.row}"
        while True:
            try:
                forever = Deadline(math.inf)
                return await self.group.answer(subject, ask, forever, preferred=preferred)
            except _Rescaled:  # all ranks rescale, to the same: soon it stays
                continue

    def _completion(
        self, place: int, choice: dict[str, Any], sampling: SamplingParams, oldest: int
    ) -> Completion:
        """Raises ConnectionError for one that must not be used, _Rescaled for one to ask anew."""
        index, reason = choice["index"], choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise ConnectionError(f"it ended a request with {reason!r}")
        tags = [span["version"] for span in choice["weight_versions"] or ()]
        temperature = sampling.temperature or 1.0
        versions = {self._tag(v, temperature): v for v in range(oldest, self.newest + 1)}
        if len(tags) > 1 and {*tags[:-1]} == {_CHANGING} and tags[-1] in versions:
            raise _Rescaled
        if len(tags) != 1 or tags[0] not in versions:
            raise ConnectionError(f"it does not hold this run's weights, but {tags}")
        version = versions[tags[0]]
        content = choice["logprobs"]["content"]
        rows = zip(choice["token_ids"], (token["logprob"] for token in content), strict=True)
        tokenizer, ends = self.tokenizer, self.stop_token_ids
        return completion(place, index, rows, reason, version, sampling, tokenizer, ends)
