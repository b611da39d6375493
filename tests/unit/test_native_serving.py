"""Single requests to the native engine, and sessions: what is computed once, and that it is right.

`generate`, which prefills every prompt anew, is the measure.
"""

import random
from dataclasses import replace

import pytest
import tiny
import torch
from test_native_engine import TOKENIZER, make

from torchrft.rollout.native import engine as engine_module
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, max_total_tokens=400)


def conversations(count, rng):
    return [[rng.randrange(2, 50) for _ in range(rng.randrange(3, 40))] for _ in range(count)]


def answered(serving, conversations, sessions):
    prompts = [Prompt(0, "", tuple(ids)) for ids in conversations]
    pairs = zip(prompts, sessions, strict=True)
    replies = [serving.submit(prompt, None, session) for prompt, session in pairs]
    while serving.advance():
        pass
    return prompts, [reply.result(0) for reply in replies]


def shared(old, new):
    """How many tokens both begin with; the last of `new` is always computed."""
    pairs = enumerate(zip(old, new[:-1], strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(old), len(new) - 1))


@pytest.mark.parametrize(
    ("family", "captured"),
    [("qwen2", False), ("qwen2", True), ("mistral", False), ("gemma3_text", False)],
)
def test_a_turn_of_a_session_is_one_prefilled_anew(monkeypatch, family, captured):
    """Four turns of conversations, some of which are cut or changed before the last."""
    monkeypatch.setattr(engine_module, "supports", lambda *_: captured)
    engine, _ = make(family)
    rng = random.Random(0)
    talks, serving = conversations(8, rng), engine.serve(GREEDY, 5)
    held, computed = [()] * 8, 0
    for turn in range(4):
        prompts, replies = answered(serving, talks, range(8))
        computed += sum(len(ids) - shared(old, ids) for old, ids in zip(held, talks, strict=True))
        assert serving.scheduler.prefilled == computed
        for prompt, reply in zip(prompts, replies, strict=True):
            (fresh,) = engine.generate([prompt], GREEDY)
            assert reply.token_ids == fresh.token_ids
            assert reply.logprobs == pytest.approx(fresh.logprobs, abs=1e-5)
            assert (reply.text, reply.finish_reason) == (fresh.text, fresh.finish_reason)
        held = [(*ids, *r.token_ids[:-1]) for ids, r in zip(talks, replies, strict=True)]
        talks = [
            [*ids, *r.token_ids, *range(20, 20 + turn + i % 3)]
            for i, (ids, r) in enumerate(zip(talks, replies, strict=True))
        ]
        if turn == 2:
            talks[0] = talks[0][:7]
            talks[1] = [*talks[1][:4], 3, *talks[1][5:]]
            talks[2] = [51, *talks[2]]
    assert computed < sum(map(len, talks)) * 1.2  # without sessions more than twice as much


def test_requests_come_while_others_are_decoded():
    """Tokens follow from the seed, whatever is computed beside them; log-probs differ in rounding
    alone."""
    engine, _ = make(initializer_range=0.02)
    rng = random.Random(1)
    prompts = [Prompt(i, "", tuple(ids)) for i, ids in enumerate(conversations(20, rng))]
    seeds = tuple((rng.randrange(2**60),) for _ in prompts)
    sampling = SamplingParams(max_new_tokens=30, max_total_tokens=400, top_p=0.9, seeds=seeds)
    wanted = engine.generate(prompts, sampling)
    serving, replies = engine.serve(sampling, 6), []
    for prompt, (seed,) in zip(prompts, seeds, strict=True):
        for _ in range(rng.randrange(12)):
            serving.advance()
        replies.append(serving.submit(prompt, seed))
    while serving.advance():
        pass
    for reply, other in zip(replies, wanted, strict=True):
        one = reply.result(0)
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (one.prompt_index, one.sample_index, one.policy_version) == (0, 0, 0)


def test_equal_prompts_are_prefilled_once():
    engine, _ = make()
    serving = engine.serve(GREEDY, 8)
    _, replies = answered(serving, [[7, 8, 9]] * 5 + [[7, 8]], [None] * 6)
    assert serving.scheduler.prefilled == 5
    assert len({reply.token_ids for reply in replies[:5]}) == 1


def test_the_oldest_session_is_dropped_where_room_is_short():
    engine, _ = make()
    serving = engine.serve(replace(GREEDY, max_new_tokens=1), 4)
    answered(serving, [[5] * 10] * 3, "abc")
    sessions = serving.scheduler.sessions
    assert (list(sessions.held), sessions.used) == (["a", "b", "c"], 30)
    sessions.room = 35
    answered(serving, [[6] * 10], "d")
    assert (list(sessions.held), sessions.used) == (["b", "c", "d"], 30)
    answered(serving, [[6] * 36], "e")  # more than there is: it takes no one's room
    assert (list(sessions.held), sessions.used) == (["b", "c", "d"], 30)
    serving.release("c")
    serving.release("c")
    assert (list(sessions.held), sessions.used) == (["b", "d"], 20)
    before = serving.scheduler.prefilled
    answered(serving, [[5] * 12, [6] * 12], "bd")
    assert serving.scheduler.prefilled == before + 4
    assert (list(sessions.held), sessions.used) == (["b", "d"], 24)


def test_sessions_end_with_their_weights():
    engine, _ = make()
    serving = engine.serve(GREEDY, 4)
    (prompt,), _ = answered(serving, [[7] * 20], "a")
    other = tiny.model("qwen2", "eager", seed=1)
    reply = serving.submit(prompt, None, "b")
    serving.advance()
    with pytest.raises(ValueError, match="1 requests are under way: end them first"):
        engine.update_weights(named_full_tensors(other), 1)
    while serving.advance():
        pass
    assert reply.result(0).policy_version == 0
    engine.update_weights(named_full_tensors(other), 1)
    _, (reply,) = answered(serving, [[*prompt.token_ids, 8]], "a")
    assert serving.scheduler.prefilled == 21
    fresh = NativeEngine(other.config, TOKENIZER, (1,))
    fresh.update_weights(named_full_tensors(other), 1)
    (wanted,) = fresh.generate([replace(prompt, token_ids=(*prompt.token_ids, 8))], GREEDY)
    assert reply == wanted
    engine.sleep()
    engine.wake()
    assert serving.scheduler is None
    with pytest.raises(ValueError, match="no weights"):
        serving.submit(prompt, None, "a")


def test_closing_ends_what_is_under_way():
    engine, _ = make()
    serving = engine.serve(GREEDY, 4)
    reply = serving.submit(Prompt(0, "", (7, 8)), None)
    serving.advance()
    serving.close(failed=True)
    assert reply.cancelled()
    assert engine.serving is None
    engine.sleep()  # nothing is under way


def test_requests_that_cannot_be_answered():
    engine, _ = make()
    serving = engine.serve(replace(GREEDY, max_total_tokens=600), 4)
    for ids, said in (
        ((), "prompt 0 .row 3. has no tokens"),
        ((7,) * 600, "leaves no room for a response: max_len is 600"),
        ((56,), "token id 56, but the model knows 56"),
    ):
        with pytest.raises(ValueError, match=said):
            serving.submit(Prompt(3, "", ids), None)
    assert not serving.advance()
    torch.manual_seed(0)
    draws = engine.serve(SamplingParams(max_new_tokens=20, max_total_tokens=100), 8)
    _, replies = answered(draws, [[7, 8]] * 8, [None] * 8)
    assert len({reply.token_ids for reply in replies}) > 1  # seeds of their own
