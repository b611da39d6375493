"""The endpoint of agents, with the real `openai` client: replies, tokens, errors."""

import asyncio
import json

import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError
from test_environments_play import STOP, Numbers

from torchrft.environments.protocol import Limits
from torchrft.environments.recording import Recorder
from torchrft.environments.serve import Endpoint
from torchrft.types import Completion, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=3, temperature=0.5)


def served(agent, limits=None, sampling=SAMPLING):
    """Runs agent(client, endpoint, key); returns the recorder and the prompts that the engine saw.

    Reply k is the token 20 + k and STOP.
    """
    prompts = []

    async def generate(ids, turn):
        await asyncio.sleep(0)
        prompts.append(tuple(ids))
        tokens = (20 + turn, STOP)
        return Completion(0, 0, tokens, (-0.5, -0.25), str(20 + turn), "stop", 7)

    async def main():
        recorder = Recorder(generate, Numbers(), limits or Limits(8, 64))
        async with Endpoint(sampling) as endpoint:
            key = endpoint.open(recorder)
            async with AsyncOpenAI(base_url=endpoint.url, api_key=key, max_retries=0) as client:
                await agent(client, endpoint, key)
        return recorder

    return asyncio.run(main()), prompts


def user(text):
    return {"role": "user", "content": text}


def test_turns_of_a_conversation_are_one_row():
    async def agent(client, endpoint, key):
        talk = [user("3 4")]
        for number in range(3):
            reply = await client.chat.completions.create(model="m", messages=talk)
            message = reply.choices[0].message
            assert message.content == str(20 + number)
            assert reply.choices[0].finish_reason == "stop"
            talk += [message.model_dump(exclude_none=True), user("5")]
        assert reply.usage.completion_tokens == 2

    recorder, prompts = served(agent)
    episode = recorder.episode("done", None, 0.75)
    (branch,) = episode.branches
    assert branch.prompt == (3, 4, STOP, 9)
    assert branch.token_ids == (20, STOP, 5, STOP, 9, 21, STOP, 5, STOP, 9, 22, STOP)
    assert [t for t, s in zip(branch.token_ids, branch.sampled, strict=True) if s] == [
        *(20, STOP),
        *(21, STOP),
        *(22, STOP),
    ]
    assert branch.logprobs[:3] == (-0.5, -0.25, 0.0)
    assert branch.turn_ends == (2, 7, 12)
    assert branch.turn_rewards == (0.0, 0.0, 0.75)
    assert branch.versions == (7, 7, 7)
    assert (episode.reward, episode.status, episode.text) == (0.75, "done", "22")
    whole = branch.prompt + branch.token_ids
    assert all(whole[: len(prompt)] == prompt for prompt in prompts)


def test_other_conversations_and_several_at_once_are_branches():
    """Each reply is trained on once, behind the tokens that it was sampled behind."""

    async def agent(client, endpoint, key):
        first = await client.chat.completions.create(model="m", messages=[user("3")])
        talk = [user("3"), first.choices[0].message.model_dump(exclude_none=True)]
        ask = client.chat.completions.create
        await asyncio.gather(*(ask(model="m", messages=[*talk, user(n)]) for n in ("5", "6")))
        await ask(model="m", messages=[user("3")])  # a retry, for all that is known

    recorder, prompts = served(agent)
    branches = recorder.episode("done", None, 0.0).branches
    replies = [
        t for b in branches for t, s in zip(b.token_ids, b.sampled, strict=True) if s and t != STOP
    ]
    assert sorted(replies) == [20, 21, 22, 23]
    assert sorted(len(b.turn_ends) for b in branches) == [1, 1, 2]
    wholes = [b.prompt + b.token_ids for b in branches]
    for prompt in prompts:
        assert any(whole[: len(prompt)] == prompt for whole in wholes)


def test_streams_completions_models_and_token_ids():
    async def agent(client, endpoint, key):
        stream = await client.chat.completions.create(
            model="m", messages=[user("3")], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "20"
        assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, "stop"]
        assert chunks[-1].usage.total_tokens == 5
        done = await client.completions.create(model="m", prompt=[3, STOP, 9, 20, STOP, 8])
        assert done.choices[0].text == "21"
        assert [model.id async for model in client.models.list()] == ["policy"]
        body = {"token_ids": [4, 5], "sampling_params": {"max_tokens": 3}}
        answer = await client.post("/inference/v1/generate", body=body, cast_to=object)
        assert answer["choices"][0]["token_ids"] == [22, STOP]
        rows = answer["choices"][0]["logprobs"]["content"]
        assert [row["logprob"] for row in rows] == [-0.5, -0.25]
        for value in (0.5, 0.25):
            answer = await client.post("/reward", body={"reward": value}, cast_to=object)
        assert answer == {"reward": 0.75}

    recorder, _ = served(agent)
    episode = recorder.episode("done", None, 0.0)
    first, second = episode.branches
    assert first.token_ids == (20, STOP, 8, 21, STOP)
    assert (second.prompt, second.token_ids) == ((4, 5), (22, STOP))
    assert second.turn_rewards == (0.75,)
    assert episode.reward == 0.75


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 1.0}, "temperature = 1.0 cannot be chosen by a call"),
        ({"n": 2}, "n = 2 cannot be chosen"),
        ({"max_tokens": 2}, "samples up to 3 tokens"),
        ({"max_tokens": True}, "samples up to 3 tokens"),
        ({"seed": 4}, "seed = 4 cannot be chosen"),
        ({"stop": ["x"]}, "stop = ['x'] cannot be chosen"),
        ({"tool_choice": "required"}, 'must be "auto" or "none"'),
        ({"extra_body": {"best_of": 2}}, "unknown option 'best_of'"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "robot", "content": "1"}]}, "the role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the type text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "do not fit the chat template"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "tool_calls cannot be read",
        ),
    ],
)
def test_what_has_no_effect_here_is_refused(options, said):
    async def agent(client, endpoint, key):
        given = {"model": "m", "messages": [user("3")], **options}
        with pytest.raises(BadRequestError) as caught:
            await client.chat.completions.create(**given)
        assert said in caught.value.body["message"]

    recorder, prompts = served(agent)
    assert prompts == []
    assert recorder.episode("done", None, 0.0).branches == ()


def test_what_changes_nothing_is_taken():
    async def agent(client, endpoint, key):
        same = {"temperature": 0.5, "top_p": SAMPLING.top_p, "n": 1, "max_completion_tokens": 3}
        await client.chat.completions.create(model="m", messages=[user("3")], user="u", **same)

    assert len(served(agent)[1]) == 1


def test_keys_paths_and_limits():
    async def agent(client, endpoint, key):
        ask = client.chat.completions.create
        with pytest.raises(AuthenticationError, match="no episode has this API key"):
            await client.with_options(api_key="other").models.list()
        with pytest.raises(NotFoundError, match="there is no POST /v1/embeddings"):
            await client.embeddings.create(model="m", input="x")
        with pytest.raises(BadRequestError) as caught:
            await ask(model="m", messages=[user("3 " * 70)])
        assert caught.value.code == "context_length_exceeded"
        endpoint.recorders[key].begin()
        await ask(model="m", messages=[user("3")])
        await ask(model="m", messages=[user("4")])
        with pytest.raises(BadRequestError) as caught:
            await ask(model="m", messages=[user("5")])
        assert caught.value.code == "max_turns"
        endpoint.close(key)
        with pytest.raises(AuthenticationError):
            await ask(model="m", messages=[user("3")])

    recorder, _ = served(agent, Limits(2, 64))
    episode = recorder.episode("error", "the agent raised what it was told", 0.0)
    assert (episode.status, episode.fault, episode.turns) == ("turns", None, 2)


REWARD = b"POST /v1/reward HTTP/1.1\r\nAuthorization: Bearer KEY\r\nContent-Length: "
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n"
RAW = [
    b"nonsense\r\n\r\n",
    CHAT + b"Content-Length: x\r\n\r\n",
    CHAT + b"Transfer-Encoding: chunked\r\n\r\n",
    CHAT + b"Content-Length: 10000000\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    REWARD + b"4\r\n\r\n[[[[",
    REWARD + b"2\r\n\r\n[]",
    REWARD + b'14\r\n\r\n{"reward":"1"}',
    REWARD + b'14\r\n\r\n{"reward":NaN}',
]


@pytest.mark.parametrize("request_bytes", RAW)
def test_bad_requests_are_answered_with_a_sentence(request_bytes):
    async def agent(client, endpoint, key):
        port = int(endpoint.url.rpartition(":")[2].partition("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes.replace(b"KEY", key.encode()))
        head, _, body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert json.loads(body)["error"]["message"]
        writer.close()

    recorder, _ = served(agent)
    assert recorder.reward == 0.0


def test_a_reply_that_nobody_heard_was_never_said():
    async def agent(client, endpoint, key):
        port = int(endpoint.url.rpartition(":")[2].partition("/")[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"messages": [user("3")]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer {key}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()
        while endpoint.recorders[key].asked == 0 or endpoint.tasks:
            await asyncio.sleep(0.01)

    recorder, prompts = served(agent)
    assert len(prompts) == 1
    assert recorder.episode("done", None, 0.0).branches == ()
