"""Single requests, sessions and episodes with real vLLM, in process and on servers."""

import os
import shutil

import pytest
import test_remote_engine as served
import tiny
import tiny_job
import torch.distributed as dist
from helpers import run_ranks
from test_vllm_engine import exact, generated, options, weights
from test_vllm_trainer import train
from tiny_job import ROOT, records, rollout

from torchrft.config.job_config import Rollout
from torchrft.rollout import build_engine
from torchrft.rollout.vllm_serving import VllmServing
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

LENGTH = 256
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=16, max_total_tokens=LENGTH)
LONG = tuple(range(2, 50)) * 3  # four blocks of the prefix cache and a half
CONVERSATION = {"name": f"{ROOT}/tests/tiny_environments.py:Sums", "environment_workers": 2}
CONVERSATION |= {"functions": None, "max_len": 48, "train_batch_size": 32, "eval_data": None}


def make(folder, **given):
    """An engine of a tiny model with weights, version 0, whose cache has blocks of 32 tokens."""
    if not (folder / "config.json").exists():
        own = options("qwen2", False), {"architectures": ["Qwen2ForCausalLM"]}
        tiny.config("qwen2", **own[0], **own[1]).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{tiny_job.MODEL}/{name}", folder)
    fields = {"rollout_batch_size": 1, "engine_type": "vllm", "max_num_seqs": 8}
    fields |= {"vllm": {"block_size": 32}, **given}
    rollout = Rollout.model_validate(fields)
    engine = build_engine(rollout, str(folder), load_weights=False, max_len=LENGTH)
    engine.update_weights(named_full_tensors(weights("qwen2", False, seed=0)), 0)
    return engine


def answers(serving, replies):
    while serving.advance() and not all(reply.done() for reply in replies):
        pass
    return [reply.result(60) for reply in replies]


@pytest.fixture
def cached(monkeypatch):
    """How many prompt tokens each finished request found in the prefix cache."""
    counts, answer = [], VllmServing._answer

    def counting(self, outputs):
        counts.extend(output.num_cached_tokens for output in outputs if output.finished)
        answer(self, outputs)

    monkeypatch.setattr(VllmServing, "_answer", counting)
    return counts


def test_single_requests_are_those_of_generate(tmp_path):
    """Whenever they come: two at once, the others while these are decoded."""
    engine = make(tmp_path)
    prompts = [Prompt(i, "", (7 + i, 8, 9)) for i in range(6)]
    seeds = tuple((100 + i,) for i in range(6))
    sampling = SamplingParams(max_new_tokens=12, max_total_tokens=LENGTH, top_p=0.9, seeds=seeds)
    wanted = engine.generate(prompts, sampling)
    serving, replies = engine.serve(sampling, 6), []
    for prompt, (seed,) in zip(prompts, seeds, strict=True):
        replies.append(serving.submit(prompt, seed))
        if prompt.row:
            serving.advance()
    found = answers(serving, replies)
    serving.close()
    for one, other in zip(found, wanted, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (one.prompt_index, one.sample_index) == (0, 0)
    assert len({one.token_ids for one in found}) == 6
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_a_conversation_is_in_the_prefix_cache_until_the_next_weights(tmp_path, cached):
    """A later turn computes its new tokens alone, up to a block; tokens are transformers' own."""
    engine = make(tmp_path)
    for version in (0, 1):
        model = weights("qwen2", False, seed=version)
        if version:
            engine.update_weights(named_full_tensors(model), version)
        serving, ids = engine.serve(GREEDY, 4), LONG
        for _ in range(3):
            prompt = Prompt(0, "", ids)
            (reply,) = answers(serving, [serving.submit(prompt, None, session="a")])
            assert list(reply.token_ids) == generated(model, prompt)
            assert reply.logprobs == pytest.approx(
                exact(model, prompt, reply, 1.0).tolist(), abs=1e-4
            )
            assert reply.policy_version == version
            ids = (*ids, *reply.token_ids, 33, 34)
        serving.close()
        assert cached[0] == 0
        assert [count > len(LONG) - 32 for count in cached] == [False, True, True]
        cached.clear()


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    engine = make(tmp_path)
    serving = engine.serve(GREEDY, 4)
    reply = serving.submit(Prompt(0, "", (7, 8)), None)
    serving.advance()
    serving.close(failed=True)
    assert reply.cancelled()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="no first_token_temperature"):
        engine.serve(SamplingParams(first_token_temperature=2.0), 1).submit(
            Prompt(0, "", (7,)), None
        )


def _shared(rank, folder):
    """Each rank asks for other requests, at other times, and for another number of them."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}  # as torchrun does
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in told.items()})
    engine = make(folder, engine_tp_size=2)
    prompts = [Prompt(i, "", (7 + i, 8, 9 + 10 * rank)) for i in range(2 + 3 * rank)]
    wanted = engine.generate(prompts, GREEDY)
    serving, replies = engine.serve(GREEDY, 4), []
    for prompt in prompts:
        for _ in range(rank):
            serving.advance()
        replies.append(serving.submit(prompt, None))
    found = answers(serving, replies)
    serving.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    dist.barrier()
    # A rank that fails is a failure of the other.
    serving = engine.serve(GREEDY, 4)
    serving.submit(prompts[0], None)
    if rank == 0:
        serving.close(failed=True)
    else:
        with pytest.raises(ConnectionError, match="the engine's rank 0 has failed"):
            answers(serving, [serving.submit(prompts[0], None)])
        serving.close(failed=True)
    return [(a.token_ids, b.token_ids) for a, b in zip(found, wanted, strict=True)]


def test_ranks_of_one_engine_ask_as_they_like(tmp_path):
    make(tmp_path)
    results = run_ranks(_shared, 2, tmp_path)
    assert [len(of_rank) for of_rank in results] == [2, 5]
    for of_rank in results:
        for found, wanted in of_rank:
            assert found == wanted


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three steps of episodes in one process."""
    folder = tmp_path_factory.mktemp("alone")
    episodes(folder)
    return folder


def episodes(folder, ngpu=1, **given):
    flags = tiny_job.FLAGS | CONVERSATION | {"engine_type": "vllm", "max_steps": 3} | given
    flags = {name: value for name, value in flags.items() if value is not None}
    (folder / "empty.toml").touch()
    train(folder, ngpu, config=folder / "empty.toml", **flags)


def responses(folder):
    return [
        [branch["token_ids"] for branch in row["branches"]]
        for step in (1, 2, 3)
        for row in rollout(folder, step)
    ]


@pytest.mark.parametrize(("ngpu", "tp", "schedule"), [(1, 1, "free"), (2, 2, None), (2, 2, "free")])
def test_episodes_of_a_job(alone, tmp_path, ngpu, tp, schedule):
    """The same episodes, in rounds or freely, on one rank or two that share an engine."""
    episodes(tmp_path, ngpu, engine_tp_size=tp, episode_schedule=schedule)
    assert responses(tmp_path) == responses(alone)
    for mine, other in zip(records(tmp_path), records(alone), strict=True):
        assert mine["reward/environment/turns"] == 3.0
        assert mine["reward/mean"] == pytest.approx(other["reward/mean"])
        if mine["update/optimizer_steps"]:
            assert mine["mismatch/logprob_abs_max"] < 1e-4
    assert any(record["update/optimizer_steps"] for record in records(tmp_path))


servers, twins = served.servers, served.twins


def test_the_turns_of_a_session_go_to_one_server(twins, tmp_path):
    """And are those of `generate`, on either server; a server that is gone is replaced."""
    folder = served.folder_of(tmp_path, False)
    engine = served.remote(folder, *twins)
    engine.update_weights(named_full_tensors(served.weights(False, seed=0)), 5)
    asked = note_servers(engine)
    serving = engine.serve(GREEDY, 8)
    talks = {key: (7, 8, 9 + key) for key in range(6)}
    for _ in range(3):
        prompts = [Prompt(0, "", ids) for ids in talks.values()]
        futures = [
            serving.submit(prompt, None, session=key)
            for key, prompt in zip(talks, prompts, strict=True)
        ]
        replies = [future.result(60) for future in futures]
        wanted = engine.generate(prompts, GREEDY)
        assert [r.token_ids for r in replies] == [w.token_ids for w in wanted]
        assert {r.policy_version for r in replies} == {5}
        for key, reply in zip(list(talks), replies, strict=True):
            talks[key] = (*talks[key], *reply.token_ids, 33)
    assert len(serving.servers) == 6
    assert {server.url for server in serving.servers.values()} == {s.url for s in twins}
    by_url = {key: server.url for key, server in serving.servers.items()}
    for key, ids in list(talks.items()):
        del asked[:]
        serving.submit(Prompt(0, "", ids), None, session=key).result(60)
        assert asked == [by_url[key]]
    serving.release(0)
    assert len(serving.servers) == 5
    engine.group.rest(engine.group.servers[0], "gone")
    left = engine.group.servers[1].url
    for key, ids in list(talks.items()):
        del asked[:]
        serving.submit(Prompt(0, "", ids), None, session=key).result(60)
        assert asked == [left]
    serving.close()
    engine.close()


def note_servers(engine):
    """The URL of each server that is asked for tokens, from now on."""
    asked = []
    for server in engine.group.servers:

        async def noting(url, *rest, server=server, exchange=server.exchange, **options):
            if url.endswith("/generate"):
                asked.append(server.url)
            return await exchange(url, *rest, **options)

        server.exchange = noting
    return asked


def test_episodes_of_a_job_on_servers(alone, tmp_path):
    """Freely, without a word; the same episodes as in process."""
    server = served.VllmServer(tiny_job.MODEL, tmp_path / "server.log")
    try:
        server.wait()
        episodes(tmp_path, server_urls=server.url)
    finally:
        server.end()
    assert responses(tmp_path) == responses(alone)
