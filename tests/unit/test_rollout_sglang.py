"""SGLang's wire format, against a server that speaks it: the protocol as documented, on the CPU.

The server generates with the native engine. Real SGLang needs a GPU: tests/gpu.
"""

import base64
import dataclasses
import json
import os
import pickle
import sys
import threading
import types
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from tiny_job import MODEL

from torchrft.config.job_config import Rollout
from torchrft.models.loader import load_tokenizer
from torchrft.rollout import sglang_loader
from torchrft.rollout.canary import WeightSyncError
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.sglang import HttpSglang, SglangEngine, join_sglang, start_sglang
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

PROMPTS = [Prompt(0, "", (7, 8, 9)), Prompt(1, "", (20,)), Prompt(2, "", (5, 6) * 7)]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=9)


class Model(torch.nn.Module):
    """What the loader is given: a model of SGLang's, which loads by name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config
        self.fault = None

    def get_submodule(self, path):
        return self.inner.get_submodule(path)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            if self.fault is not None and name == self.fault[0]:
                tensor = self.fault[1](tensor)
                if tensor is None:
                    continue
            self.inner.get_parameter(name).data.copy_(tensor)


class Server:
    """The endpoints that the engine calls, and a record of the calls."""

    def __init__(self):
        self.native = NativeEngine(tiny.config("qwen2"), load_tokenizer(MODEL), ())
        self.native.version = 0
        self.model = Model(self.native.model)
        self.calls = []
        handler = type("Handler", (BaseHTTPRequestHandler,), {"do_POST": self.post(self)})
        handler.log_message = lambda *_: None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.status = 200

    @staticmethod
    def post(server):
        def do_post(handler):
            body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
            server.calls.append((handler.path, body))
            if server.status != 200:
                answer = {"error": {"message": "no such thing"}}
            else:
                answer = getattr(server, handler.path[1:], lambda body: None)(body)
            text = json.dumps(answer).encode()
            handler.send_response(server.status)
            handler.end_headers()
            handler.wfile.write(text)

        return do_post

    def update_weights_from_tensor(self, body):
        assert body["load_format"] == "torchrft.rollout.sglang_loader.load"
        assert body["flush_cache"] is False
        (raw,) = body["serialized_named_tensors"]
        sglang_loader.load(self.model, pickle.loads(base64.b64decode(raw)))
        return {"success": True, "message": "Success"}

    def flush_cache(self, body):
        return "Cache flushed."

    def generate(self, body):
        assert (body["return_logprob"], body["logprob_start_len"]) == (True, -1)
        answers = []
        for ids, options in zip(body["input_ids"], body["sampling_params"], strict=True):
            assert "ignore_eos" not in options  # SGLang would ignore the stop ids as well
            assert options.pop("skip_special_tokens") is False  # stop strings may be such
            assert options.pop("spaces_between_special_tokens") is False
            options["top_k"] = max(options["top_k"], 0)
            options["min_new_tokens"] = options.pop("min_new_tokens")
            options["stop"] = tuple(options.pop("stop") or ())
            options["stop_token_ids"] = tuple(options["stop_token_ids"])
            sampling = SamplingParams(**options)
            for c in self.native.generate([Prompt(0, "", tuple(ids))], sampling):
                rows = [[lp, t, None] for lp, t in zip(c.logprobs, c.token_ids, strict=True)]
                reason = {"type": c.finish_reason, "matched": c.token_ids[-1]}
                meta = {"output_token_logprobs": rows, "finish_reason": reason}
                answers.append({"output_ids": list(c.token_ids), "meta_info": meta})
        return answers


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()


def make(server, **options):
    return SglangEngine(
        HttpSglang(server.url, timeout=20.0),
        tiny.config("qwen2"),
        load_tokenizer(MODEL),
        (1,),
        dtype=torch.float32,
        device="cpu",
        **options,
    )


def test_rollouts_are_those_of_the_model_that_was_sent(server, monkeypatch):
    monkeypatch.setattr("torchrft.rollout.sglang._BUCKET", 5000)  # several buckets
    engine = make(server)
    native = NativeEngine(tiny.config("qwen2"), load_tokenizer(MODEL), (1,))
    cases = [
        GREEDY,
        dataclasses.replace(GREEDY, n=3, max_new_tokens=None, max_total_tokens=18),
        dataclasses.replace(GREEDY, stop_token_ids=tuple(range(2, 30)), min_new_tokens=3),
        dataclasses.replace(GREEDY, temperature=0.0, stop=("5",)),
    ]
    for version in range(3):
        model = tiny.model("qwen2", seed=version)
        for one in (engine, native):
            one.update_weights(named_full_tensors(model), version)
        for sampling in cases:
            mine, other = engine.generate(PROMPTS, sampling), native.generate(PROMPTS, sampling)
            for a, b in zip(mine, other, strict=True):
                assert dataclasses.replace(a, logprobs=()) == dataclasses.replace(b, logprobs=())
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    sent = [body for path, body in server.calls if path == "/update_weights_from_tensor"]
    assert len(sent) > 3 * 3
    flushes = [path for path, _ in server.calls].count("/flush_cache")
    assert flushes == 3


def test_the_order_of_sleep_and_wake(server, monkeypatch):
    """The KV cache goes first and comes last: the weights arrive in between. Torch gives its
    reserve back before either is taken again."""
    engine = make(server)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: server.calls.append(("torch", {})))
    pairs = list(named_full_tensors(tiny.model("qwen2")))
    engine.update_weights(pairs, 0)
    server.calls.clear()
    engine.sleep()
    engine.sleep()
    with pytest.raises(ValueError, match="the engine sleeps: call wake before"):
        engine.update_weights(pairs, 1)
    engine.wake()
    with pytest.raises(ValueError, match="the engine has no weights"):
        engine.generate(PROMPTS, GREEDY)
    engine.update_weights(pairs, 1)
    calls = [(path, body.get("tags")) for path, body in server.calls]
    assert calls == [
        ("/release_memory_occupation", ["kv_cache", "cuda_graph"]),
        ("/release_memory_occupation", ["weights"]),
        ("torch", None),
        ("/resume_memory_occupation", ["weights"]),
        ("/update_weights_from_tensor", None),
        ("torch", None),
        ("/resume_memory_occupation", ["kv_cache", "cuda_graph"]),
        ("/flush_cache", None),
    ]
    assert {c.policy_version for c in engine.generate(PROMPTS, GREEDY)} == {1}


@pytest.mark.parametrize(
    "change",
    [lambda t: t.flip(0), lambda t: t + 1e-6, lambda t: None],
    ids=["permuted", "stale", "dropped"],
)
def test_a_fault_in_the_model_is_named(server, change):
    engine = make(server)
    sent = tiny.model("qwen2", seed=1)
    for parameter in sent.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    for name in dict(sent.named_parameters()):
        with torch.no_grad():
            sent.get_parameter(name).add_(1.0)
        server.model.fault = (name, change)
        with pytest.raises(WeightSyncError, match=f'SGLang does not hold "{name}" as the trainer'):
            engine.update_weights(named_full_tensors(sent), 1)


@pytest.mark.parametrize("faulty", [0, 2, -1])
def test_after_a_fault_all_is_gathered_and_the_next_update_works(server, monkeypatch, faulty):
    """Gathering is collective: other ranks would wait for this one."""
    monkeypatch.setattr("torchrft.rollout.sglang._BUCKET", 5000)
    engine, model = make(server), tiny.model("qwen2", seed=1)
    pairs, taken = list(named_full_tensors(model)), []
    server.model.fault = (pairs[faulty][0], lambda t: t + 1)
    with pytest.raises(WeightSyncError, match=f'does not hold "{pairs[faulty][0]}"'):
        engine.update_weights((taken.append(pair) or pair for pair in pairs), 3)
    assert len(taken) == len(pairs)
    with pytest.raises(ValueError, match="the engine has no weights"):
        engine.generate(PROMPTS, GREEDY)
    server.model.fault = ("", None)
    engine.update_weights(pairs, 4)
    assert {c.policy_version for c in engine.generate(PROMPTS, GREEDY)} == {4}


def test_no_bucket_is_held_when_the_cache_wakes(server, monkeypatch):
    engine, pairs = make(server), list(named_full_tensors(tiny.model("qwen2")))
    pack, held, seen = sglang_loader.pack, [], []

    def spy(bucket, verdict):
        packed = pack(bucket, verdict)
        held.append(weakref.ref(packed[0][1]))
        return packed

    monkeypatch.setattr(sglang_loader, "pack", spy)
    monkeypatch.setattr("torchrft.rollout.sglang._BUCKET", 5000)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: seen.append([each() is None for each in held])
    )
    engine.update_weights(pairs, 0)
    engine.sleep()
    engine.wake()
    engine.update_weights(pairs, 1)
    assert len(held) > 6
    assert seen[-1] == [True] * len(held)


def test_a_fault_on_the_way_is_named(server, monkeypatch):
    engine = make(server)
    pack = sglang_loader.pack

    def damaged(bucket, verdict):
        packed = pack(bucket, verdict)
        packed[0][1][5000] ^= 1  # one bit
        return packed

    monkeypatch.setattr(sglang_loader, "pack", damaged)
    with pytest.raises(WeightSyncError, match=r'SGLang does not hold "model\.embed_tokens'):
        engine.update_weights(named_full_tensors(tiny.model("qwen2")), 0)


def test_errors_are_one_sentence(server):
    engine = make(server)
    pairs = list(named_full_tensors(tiny.model("qwen2")))
    with pytest.raises(ValueError, match="no value came for"):
        engine.update_weights(pairs[:-1], 0)
    engine.update_weights(pairs, 0)
    with pytest.raises(ValueError, match="SGLang has no first_token_temperature"):
        engine.generate(PROMPTS, dataclasses.replace(GREEDY, first_token_temperature=2.0))
    with pytest.raises(ValueError, match=r"prompt 0 \(row 4\) has 99 tokens"):
        engine.generate([Prompt(4, "", (3,) * 99)], dataclasses.replace(GREEDY, max_total_tokens=9))
    server.status = 500
    with pytest.raises(ConnectionError, match=r"SGLang at .*/generate: HTTP 500: no such thing"):
        engine.generate(PROMPTS, GREEDY)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConnectionError, match=r"SGLang at .*/generate: .*refused"):
        engine.generate(PROMPTS, GREEDY)


def test_options_reach_sglang(monkeypatch):
    """`sglang.Engine` is stood in for: what counts is what it is called with."""
    called = {}

    class Engine:
        def __init__(self, **arguments):
            called.update(arguments)
            if arguments["model_path"] == "broken":
                raise ValueError("no\n  memory")

    monkeypatch.setitem(sys.modules, "sglang", types.SimpleNamespace(Engine=Engine))
    monkeypatch.delenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", raising=False)

    def start(pretrain="folder", **options):
        rollout = Rollout(rollout_batch_size=1, max_num_seqs=7, engine_mem_util=0.4, sglang=options)
        return start_sglang(rollout, pretrain, 99, torch.bfloat16)

    assert start(attention_backend="triton", log_level="info") is not None
    expected = {
        "model_path": "folder",
        "dtype": "bfloat16",
        "context_length": 99,
        "max_running_requests": 7,
        "mem_fraction_static": 0.4,
        "enable_memory_saver": True,
        "skip_tokenizer_init": True,
        "attention_backend": "triton",
        "log_level": "info",
        "custom_weight_loader": ["torchrft.rollout.sglang_loader.load"],
    }
    assert {name: called[name] for name in expected} == expected
    assert os.environ["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "1"
    with pytest.raises(
        ValueError, match=r"SGLang did not start: no memory; .*engine_mem_util = 0\.4"
    ):
        start("broken")


def test_running_servers(server):
    transport = join_sglang([server.url], timeout=9.0)
    assert server.calls == [("/flush_cache", {})]
    assert transport.timeout == 9.0
    with pytest.raises(ValueError, match="server_urls names 2 SGLang servers for 1 ranks"):
        join_sglang([server.url, server.url], timeout=9.0)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ValueError, match=r"server_urls: SGLang at .*refused"):
        join_sglang([server.url], timeout=9.0)
