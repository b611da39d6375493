"""The remote engine beside the in-process one, with real vLLM servers on 127.0.0.1."""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import tiny
import tiny_job
import torch
import torch.distributed as dist
from helpers import run_ranks

from torchrft.config.job_config import Rollout
from torchrft.rollout import build_engine
from torchrft.rollout.canary import WeightSyncError
from torchrft.rollout.weight_files import WeightFiles
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.tools.http import Deadline, run
from torchrft.types import Prompt, SamplingParams

if importlib.util.find_spec("uvicorn") is None:
    pytest.skip(
        "vLLM's HTTP server needs uvicorn: see docs/remote_engines.md", allow_module_level=True
    )

ROOT = Path(__file__).parents[2]
MAX_LEN = 256
PROMPTS = [Prompt(0, "", (7, 8, 9)), Prompt(1, "", (20,)), Prompt(2, "", tuple(range(30, 47)))]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=16, max_total_tokens=MAX_LEN)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # saves importing vLLM three times
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
FLAGS = (
    "--host 127.0.0.1 --load-format dummy --dtype float32 --enforce-eager --max-num-seqs 32 "
    f"--max-model-len {MAX_LEN} --kv-cache-memory-bytes 33554432 --no-enable-chunked-prefill "
    "--max-num-batched-tokens 8192 --enable-scale-out "
    "--worker-extension-cls faulty_extension.Extension"  # torchrft's, with faults on demand
).split()


class VllmServer:
    """`vllm serve` in a session of its own, so that a signal reaches all its processes."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.folder, self.log = f"http://127.0.0.1:{self.port}", folder, log
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *FLAGS]
        self.command += ["--port", str(self.port), "--model", str(folder)]
        self.command += ["--weight-transfer-config", '{"backend":"torchrft"}']
        self.start()

    def start(self):
        path = os.pathsep.join(
            [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        )
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{self.url}/health").status
            time.sleep(0.25)
        raise TimeoutError(self.log.read_text()[-3000:])

    def signal(self, signum):
        os.killpg(self.process.pid, signum)

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()


def options(tied):
    return {
        "head_dim": 32,
        "hidden_size": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "max_position_embeddings": MAX_LEN,
    }


def folder_of(path, tied):
    config = tiny.config("qwen2", **options(tied), architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tiny_job.MODEL}/{name}", path)
    return path


def weights(tied, seed):
    return tiny.model("qwen2", "eager", seed=seed, **options(tied))


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One with a tied and one with an untied model; always killed at the end."""
    base = tmp_path_factory.mktemp("servers")
    started = []
    try:
        for name, tied in (("tied", True), ("untied", False)):
            started.append(VllmServer(folder_of(base / name, tied), base / f"{name}.log"))
        for server in started:
            server.wait()
        yield dict(zip(("tied", "untied"), started, strict=True)), base
    finally:
        for server in started:
            server.end()


@pytest.fixture(scope="module")
def twins(servers, tmp_path_factory):
    """Two servers of the untied model, in place of those before: memory is for two at a time."""
    running, base = servers
    running["tied"].end()
    twin = VllmServer(base / "untied", base / "twin.log")
    try:
        twin.wait()
        yield running["untied"], twin
    finally:
        twin.end()


def remote(folder, *servers, **given):
    urls = [getattr(server, "url", server) for server in servers]
    fields = {
        "rollout_batch_size": 1,
        "engine_type": "vllm",
        "max_num_seqs": 32,
        "server_urls": urls,
        "request_timeout": 30.0,
        "request_retries": 1,
        **given,
    }
    return build_engine(
        Rollout.model_validate(fields), str(folder), load_weights=False, max_len=MAX_LEN
    )


def ask_server(server, path, body):
    return run(server.ask(path, body, Deadline(30)))


def in_process(folder):
    rollout = Rollout(rollout_batch_size=1, engine_type="vllm", max_num_seqs=32, stop=["5"])
    return build_engine(rollout, str(folder), load_weights=False, max_len=MAX_LEN)


def seeds(prompts, n):
    return tuple(tuple(100 * i + j for j in range(n)) for i in range(prompts))


def long_rollout(count):
    """Greedy prompts whose responses hardly end, and so last."""
    prompts = [Prompt(i, "", (3 + i % 50, 5 + i // 50)) for i in range(count)]
    sampling = SamplingParams(
        temperature=0.0, max_new_tokens=200, min_new_tokens=200, max_total_tokens=MAX_LEN
    )
    return prompts, sampling


def places(completions):
    return [(c.prompt_index, c.sample_index) for c in completions]


def tokens(completions):
    return [c.token_ids for c in completions]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_equals_the_engine_in_process(kind, servers):
    running, base = servers
    engine, own = remote(base / kind, running[kind]), in_process(base / kind)
    different = set()
    for version in range(5):
        model = weights(kind == "tied", seed=version)
        for one in (engine, own):
            one.update_weights(named_full_tensors(model), version)
        for temperature, top_p, top_k, n in ((0.0, 1, 0, 1), (0.7, 1, 0, 4), (1.3, 0.6, 9, 3)):
            sampling = SamplingParams(
                n=n,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_new_tokens=12,
                max_total_tokens=MAX_LEN,
                seeds=seeds(3, n),
            )
            mine, other = engine.generate(PROMPTS, sampling), own.generate(PROMPTS, sampling)
            assert places(mine) == places(other) == [(i, j) for i in range(3) for j in range(n)]
            assert {c.policy_version for c in mine} == {version}
            for a, b in zip(mine, other, strict=True):
                assert (a.token_ids, a.finish_reason, a.text) == (
                    b.token_ids,
                    b.finish_reason,
                    b.text,
                )
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        different.add(tuple(tokens(mine)))
        engine.sleep()  # on a CPU nothing happens
        engine.wake()
    assert len(different) == 5
    stops = SamplingParams(
        temperature=0.0,
        max_total_tokens=40,
        stop_token_ids=tuple(range(2, 30)),
        min_new_tokens=4,
        stop=("5",),
    )
    assert tokens(engine.generate(PROMPTS, stops)) == tokens(own.generate(PROMPTS, stops))
    assert engine.generate([], GREEDY) == []
    shared = engine.folder
    assert os.listdir(shared) == []
    engine.close()
    assert not os.path.exists(shared)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_canary_on_the_server(kind, servers):
    """A tensor that is stale, permuted or dropped while the server loads it is named."""
    running, base = servers
    engine, model = remote(base / kind, running[kind]), weights(kind == "tied", seed=1)
    ask = partial(ask_server, engine.group.servers[0])
    generator = torch.Generator().manual_seed(0)
    version = 0
    for name, _ in list(model.named_parameters())[::3]:
        for fault in ("none", "stale", "permuted", "dropped"):
            ask("/collective_rpc", {"method": "test_fault", "args": [name, fault]})
            with torch.no_grad():
                for each in model.parameters():
                    each.add_(1e-3 * torch.randn(each.shape, generator=generator))
            version += 1
            if fault == "none":
                engine.update_weights(named_full_tensors(model), version)
                continue
            said = (
                f'^weight update of http.*: the engine does not hold "{name}" as the .* run stops$'
            )
            with pytest.raises(WeightSyncError, match=said):
                engine.update_weights(named_full_tensors(model), version)
            with pytest.raises(ValueError, match="no weights"):
                engine.generate(PROMPTS, GREEDY)
    ask("/collective_rpc", {"method": "test_fault", "args": ["", "none"]})


def test_files_that_are_not_what_was_sent(servers, monkeypatch):
    running, base = servers
    engine, pairs = remote(base / "untied", running["untied"]), weights(False, seed=3)
    pairs = list(named_full_tensors(pairs))
    with pytest.raises(ValueError, match=r'no value came for "lm_head\.weight"'):
        engine.update_weights(pairs[:-1], 0)
    with pytest.raises(ValueError, match='has no parameter "nonsense"'):
        engine.update_weights([*pairs, ("nonsense", torch.zeros(1))], 0)
    save, name = WeightFiles._save, "model.layers.1.mlp.up_proj.weight"

    def permuted(self, bucket, folder):
        save(self, {**bucket, name: bucket[name].flip(0)}, folder)

    def full(self, bucket, folder):
        save(self, bucket, "/nowhere")

    monkeypatch.setattr(WeightFiles, "_save", permuted)
    with pytest.raises(
        WeightSyncError, match=f'"{name}" in the files is not what the trainer sent$'
    ):
        engine.update_weights(pairs, 0)
    monkeypatch.setattr(WeightFiles, "_save", full)
    taken = []
    with pytest.raises(WeightSyncError, match=r"/nowhere/0.safetensors cannot be written .* make"):
        engine.update_weights((taken.append(pair) or pair for pair in pairs), 0)
    assert len(taken) == len(pairs)  # gathering is collective: it must be gone through
    monkeypatch.undo()
    monkeypatch.setattr("torchrft.rollout.weight_files._BUCKET", 60_000)
    written = []
    monkeypatch.setattr(WeightFiles, "remove", lambda self: written.extend(self.paths))
    engine.update_weights(pairs, 7)
    assert len(written) > 4
    assert max(map(os.path.getsize, written)) < 60_000 + 2 * 56 * 128 * 4
    assert {c.policy_version for c in engine.generate(PROMPTS, GREEDY)} == {7}


def test_servers_that_do_not_fit(servers, tmp_path):
    running, base = servers
    url = running["untied"].url
    for given, said in (
        ({"folder": base / "tied"}, f"{url} serves another model, {base}/untied: start it with"),
        ({"dtype": torch.bfloat16}, f"{url} computes in float32: start it with --dtype bfloat16"),
        ({"max_len": 512}, f"{url} takes 256 tokens, fewer than max_len = 512: start it"),
        ({"url": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached .*start it or"),
        ({"url": "127.0.0.1:9"}, 'server_urls holds "127.0.0.1:9"; write each as http://host'),
        ({"url": f"{url}/v1"}, "/v1 is not a vLLM server for torchrft .HTTP 404.*start it with"),
        ({"weight_folder": "/nowhere"}, 'weight_folder = "/nowhere" is not a folder; make it'),
    ):
        rollout = Rollout(
            rollout_batch_size=1,
            engine_type="vllm",
            server_urls=[given.get("url", url)],
            request_retries=0,
            weight_folder=given.get("weight_folder"),
        )
        with pytest.raises(ValueError, match=said):
            build_engine(
                rollout,
                str(given.get("folder", base / "untied")),
                given.get("dtype", torch.float32),
                load_weights=False,
                max_len=given.get("max_len", MAX_LEN),
            )


def test_a_request_that_a_server_refuses(servers):
    """It ends the run with the server's words, and takes no server out: others would refuse too."""
    running, base = servers
    engine, sampling = remote(base / "untied", running["untied"]), SamplingParams(n=33)
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 2)
    refused = f"servers, {running['untied'].url} refuses prompt row 2: HTTP 400: .*33"
    with pytest.raises(ConnectionError, match=refused):
        engine.generate(PROMPTS[2:], dataclasses.replace(sampling, max_total_tokens=MAX_LEN))
    assert engine.group.servers[0].fault is None
    assert engine.group.servers[0].outstanding == 0
    assert {c.policy_version for c in engine.generate(PROMPTS, GREEDY)} == {2}


def test_a_folder_that_takes_no_weights(servers, monkeypatch):
    running, base = servers

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    said = (
        r"^weight_folder: no folder for the weights can be made \(.*No space left.*; name another"
    )
    with pytest.raises(ValueError, match=said):
        remote(base / "untied", running["untied"], weight_folder=str(base))


def test_retries_have_their_back_off(servers):
    """A server that is not there is asked once more for every retry, later and later."""
    _, base = servers
    took = []
    for retries in (0, 2):
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"127.0.0.1:9 cannot be reached .*Connection refused"):
            remote(base / "untied", "http://127.0.0.1:9", request_retries=retries)
        took.append(time.monotonic() - began)
    assert 1.2 <= took[1] - took[0] < 2.5  # 0.5 and 1 second


def two_ranks(rank, folder, url):
    """What a rank gets: tokens and versions, its view of a failed update, and how far it read."""
    engine, gathered = remote(folder, url), []

    def gathering(model):
        for name, tensor in named_full_tensors(model):
            dist.barrier()  # as the gathering of shards: all ranks or none
            gathered.append(name)
            yield name, tensor

    engine.update_weights(gathering(weights(False, seed=1)), 4)
    sampling = SamplingParams(temperature=0.8, seeds=((3,),), max_total_tokens=40)
    (completion,) = engine.generate([PROMPTS[rank]], sampling)
    if rank == 0:
        ask_server(
            engine.group.servers[0],
            "/collective_rpc",
            {"method": "test_fault", "args": ["lm_head.weight", "permuted"]},
        )
    failure = None
    try:
        engine.update_weights(gathering(weights(False, seed=2)), 5)
    except RuntimeError as error:
        failure = f"{type(error).__name__}: {error}"
    if rank == 0:
        ask_server(
            engine.group.servers[0],
            "/collective_rpc",
            {"method": "test_fault", "args": ["", "none"]},
        )
    return completion.token_ids, completion.policy_version, failure, len(gathered)


def test_two_ranks(servers):
    """Rank 0 alone sends, both gather every tensor and generate, and a fault ends both."""
    running, base = servers
    results = run_ranks(two_ranks, 2, base / "untied", running["untied"].url)
    engine = remote(base / "untied", running["untied"])
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 0)
    for rank, (token_ids, version, failure, read) in enumerate(results):
        sampling = SamplingParams(temperature=0.8, seeds=((3,),), max_total_tokens=40)
        assert engine.generate([PROMPTS[rank]], sampling)[0].token_ids == token_ids
        assert version == 4
        assert failure.startswith("WeightSyncError" if rank == 0 else "RankError: rank 0 failed")
        assert 'does not hold "lm_head.weight"' in failure
        assert read == 2 * len(dict(weights(False, seed=1).named_parameters()))


def test_a_job_trains_as_in_process(servers, tmp_path):
    running, base = servers
    job = {"pretrain": base / "untied", "engine_type": "vllm", "temperature": "0.9"}
    tiny_job.run(tmp_path / "own", **job)
    log = tmp_path / "log"
    words = tiny_job.argv(save_path=tmp_path / "far", server_urls=running["untied"].url, **job)
    assert tiny_job.run_process(words, log) == 0, log.read_text()
    for step in (1, 2):
        own, far = (tiny_job.rollout(tmp_path / name, step) for name in ("own", "far"))
        assert [row["response"] for row in own] == [row["response"] for row in far]
    for own, far in zip(
        tiny_job.records(tmp_path / "own"), tiny_job.records(tmp_path / "far"), strict=True
    ):
        assert own.keys() == far.keys()
        for name, value in own.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert far[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_one_step_off_policy(servers, tmp_path):
    """From the second step on samples are one version late; the prompts are the same ones."""
    running, base = servers
    job = {"pretrain": base / "untied", "engine_type": "vllm", "max_steps": 4}
    job |= {"server_urls": running["untied"].url, "rollout_correction": "token_tis"}
    for level in (0, 1):
        words = tiny_job.argv(save_path=tmp_path / str(level), async_level=level, **job)
        log = tmp_path / "log"
        assert tiny_job.run_process(words, log) == 0, log.read_text()
    for step in (1, 2, 3, 4):
        on, off = (tiny_job.rollout(tmp_path / level, step) for level in "01")
        assert [row["row"] for row in on] == [row["row"] for row in off]
        assert {row["policy_version"] for row in on} == {step - 1}
        assert {row["policy_version"] for row in off} == {max(step - 2, 0)}
    late = [record["rollout/staleness"] for record in tiny_job.records(tmp_path / "1")]
    assert late == [0.0, 1.0, 1.0, 1.0]


def test_an_update_while_requests_are_in_flight(twins):
    server, twin = twins
    engine = remote(server.folder, server, twin, max_num_seqs=8)
    folder_models = [weights(False, seed=seed) for seed in (1, 2)]
    prompts, sampling = long_rollout(40)
    expected = []
    for version, model in enumerate(folder_models):
        engine.update_weights(named_full_tensors(model), version)
        expected.append(tokens(engine.generate(prompts, sampling)))
    assert expected[0] != expected[1]
    engine.update_weights(named_full_tensors(folder_models[0]), 2)
    result = []
    thread = threading.Thread(target=lambda: result.extend(engine.generate(prompts, sampling)))
    thread.start()
    time.sleep(0.4)
    engine.update_weights(named_full_tensors(folder_models[1]), 3)
    thread.join()
    assert places(result) == [(i, 0) for i in range(40)]
    assert {c.policy_version for c in result} == {2, 3}
    for completion in result:
        old_or_new = expected[completion.policy_version - 2]
        assert completion.token_ids == old_or_new[completion.prompt_index]


def test_a_server_with_other_weights_is_not_used(twins, caplog):
    """As after a restart: it is left out until the next update brings it up to date."""
    server, twin = twins
    engine = remote(server.folder, server, twin)
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 0)
    prompts = [Prompt(i, "", (3 + i,)) for i in range(30)]
    before = engine.generate(prompts, GREEDY)
    ask_server(engine.group.servers[1], "/update_weight_version", {"new_version": "default"})
    assert engine.generate(prompts, GREEDY) == before
    assert "it does not hold this run's weights, but ['default']" in engine.group.servers[1].fault
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 1)
    assert [s.fault for s in engine.group.servers] == [None, None]
    ask_server(engine.group.servers[0], "/update_weight_version", {"new_version": "default"})
    assert tokens(engine.generate(prompts, GREEDY)) == tokens(before)


def test_a_trainer_that_died_in_an_update(twins):
    """Its servers are paused, with an update begun: the next run takes them over."""
    server, twin = twins
    engine = remote(server.folder, server, twin)
    for each in engine.group.servers:
        ask_server(each, "/pause?mode=wait", {})
        ask_server(each, "/start_weight_update", {})
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 0)
    assert [s.fault for s in engine.group.servers] == [None, None]
    assert len(engine.generate(PROMPTS, GREEDY)) == 3


def test_a_slow_server_has_a_deadline(twins, caplog):
    server, twin = twins
    engine = remote(server.folder, server, twin, request_timeout=2.0)
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 0)
    prompts = [Prompt(i, "", (3 + i,)) for i in range(20)]
    expected = engine.generate(prompts, GREEDY)
    twin.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert engine.generate(prompts, GREEDY) == expected
        assert 2.0 <= time.monotonic() - began < 6.0
        said = "no answer to /inference/v1/generate within request_timeout = 2 seconds"
        assert engine.group.servers[1].fault == said
        engine.update_weights(named_full_tensors(weights(False, seed=1)), 1)
        assert engine.group.servers[1].fault is not None
    finally:
        twin.signal(signal.SIGCONT)
    time.sleep(1)
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 2)
    assert [s.fault for s in engine.group.servers] == [None, None]
    again = engine.generate(prompts, GREEDY)
    assert tokens(again) == tokens(expected)
    assert {c.policy_version for c in again} == {2}


def test_one_of_two_servers_is_killed_in_mid_rollout_and_then_the_other(twins):
    server, twin = twins
    engine = remote(server.folder, server, twin, max_num_seqs=16)
    engine.update_weights(named_full_tensors(weights(False, seed=1)), 0)
    prompts, sampling = long_rollout(60)
    expected = engine.generate(prompts, sampling)
    result = []
    thread = threading.Thread(target=lambda: result.extend(engine.generate(prompts, sampling)))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    assert engine.group.servers[1].outstanding > 0
    twin.signal(signal.SIGKILL)
    thread.join()
    assert places(result) == [(i, 0) for i in range(60)]
    assert tokens(result) == tokens(expected)
    assert engine.group.servers[1].fault is not None
    engine.update_weights(named_full_tensors(weights(False, seed=2)), 1)
    assert {c.policy_version for c in engine.generate(prompts[:5], sampling)} == {1}
    server.signal(signal.SIGKILL)
    faults = f"{server.url}: .*; {twin.url}: "
    with pytest.raises(
        ConnectionError, match=rf"found no answer before the next weight update \({faults}"
    ):
        engine.generate(prompts, sampling)
    with pytest.raises(ConnectionError, match="rollout servers: no server took the weights"):
        engine.update_weights(named_full_tensors(weights(False, seed=2)), 2)
