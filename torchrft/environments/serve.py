"""An OpenAI-compatible endpoint in front of the training engine, on loopback.

An agent's API key names its episode. What is sampled, and how, is the run's affair: a call may say
nothing else. One call gives the episode its reward.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from torchrft.environments.recording import Call, CallError, Recorder, read_message
from torchrft.tools import payload
from torchrft.types import Completion, SamplingParams

_LONGEST_BODY = 8 << 20  # bytes
_IGNORED = {"model", "user", "metadata", "store", "stream_options", "parallel_tool_calls"}
_MEANINGLESS: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "stop": (None, []),
    "seed": (None,),
    "logprobs": (None, False, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "reasoning_effort": (None,),
    "echo": (None, False),
}
"""Options that only change something with other values, which are refused."""
_PHRASES = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found"}


class Endpoint:
    """Answers the calls of agents from `recorders`, by key; `sampling` is the run's.

    >>> async with Endpoint(sampling) as endpoint:             # doctest: +SKIP
    ...     key = endpoint.open(recorder)
    ...     await agent(endpoint.url, key)
    ...     endpoint.close(key)
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling
        self.recorders: dict[str, Recorder] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.url = ""

    async def __aenter__(self) -> "Endpoint":
        self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()

    def open(self, recorder: Recorder) -> str:
        """The key of an episode."""
        key = secrets.token_urlsafe(24)
        self.recorders[key] = recorder
        return key

    def close(self, key: str) -> None:
        """From now on its calls are refused."""
        del self.recorders[key]

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            status, kind, body, answered = await self._answer(reader)
            if reader.at_eof():  # nobody hears it, so it was never said
                return
            answered()
            head = f"HTTP/1.1 {status} {_PHRASES.get(status, 'Error')}\r\nContent-Type: {kind}\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.tasks.discard(task)
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader
    ) -> tuple[int, str, bytes, Callable[[], None]]:
        """Status, content type and body; and what is to be called once they are sent."""
        status, code = 400, "invalid_request_error"
        recorder = None
        try:
            method, path, headers = await _head(reader)
            recorder = self.recorders.get(headers.get("authorization", "").removeprefix("Bearer "))
            body = await _body(reader, headers)
            if recorder is None:
                status, code = 401, "invalid_api_key"
                raise CallError("no episode has this API key, or it has ended", code)
            routes = {
                ("POST", "/v1/chat/completions"): self._chat,
                ("POST", "/v1/completions"): self._complete,
                ("POST", "/inference/v1/generate"): self._generate,
                ("POST", "/v1/inference/v1/generate"): self._generate,
                ("POST", "/v1/reward"): _reward,
                ("POST", "/v1/begin"): _begin,
                ("GET", "/v1/models"): _models,
            }
            if (method, path) not in routes:
                status, code = 404, "not_found"
                raise CallError(f"there is no {method:.10} {path:.200}; see docs/environments.md")
            answer, call = await routes[method, path](recorder, body)
            if body.get("stream") and call is not None:
                return 200, "text/event-stream", _events(answer), lambda: recorder.add(call)
            done = (lambda: recorder.add(call)) if call is not None else (lambda: None)
            return 200, "application/json", json.dumps(answer).encode(), done
        except CallError as error:
            code = error.code if status == 400 else code
            told = {"message": str(error), "type": "invalid_request_error", "code": code}
            return status, "application/json", json.dumps({"error": told}).encode(), lambda: None

    def _check(self, body: Mapping[str, Any], known: set[str]) -> None:
        """Raises CallError for an option that would have an effect which it cannot have here."""
        how = self.sampling
        for name, value in body.items():
            if name in known | _IGNORED | {"stream"}:
                continue
            fits: tuple[Any, ...] = _MEANINGLESS.get(name, ())
            if name in ("temperature", "top_p"):
                fits = (None, getattr(how, name))
            elif name in ("max_tokens", "max_completion_tokens"):
                most = how.max_new_tokens or how.max_total_tokens
                if value is None or (type(value) is int and value >= most):
                    continue
                raise CallError(
                    f"{name} = {value!r:.40}: the run samples up to {most} tokens, its "
                    "max_new_tokens; leave it out or give no less"
                )
            elif name not in _MEANINGLESS:
                raise CallError(f"unknown option {name!r:.60}")
            if value not in fits:
                raise CallError(
                    f"{name} = {value!r:.60} cannot be chosen by a call: the run says how replies "
                    "are sampled; leave it out"
                )

    async def _chat(self, recorder: Recorder, body: Mapping[str, Any]) -> tuple[Any, Call]:
        self._check(body, {"messages", "tools", "tool_choice"})
        given, tools, choice = body.get("messages"), body.get("tools"), body.get("tool_choice")
        if not isinstance(given, list) or not all(isinstance(m, dict) for m in given) or not given:
            raise CallError("messages must be a list of at least one message")
        if choice not in (None, "auto", "none"):
            raise CallError(f'tool_choice = {choice!r:.60} must be "auto" or "none"')
        if tools is not None and not isinstance(tools, list):
            raise CallError("tools must be a list")
        tools = None if choice == "none" else tools or None
        messages = [read_message(message) for message in given]
        ids = recorder.chat_prompt(messages, tools)
        reply = await recorder.sample(ids)
        parsed = recorder.parse(ids, reply, tools)
        call = Call(tuple(ids), reply, (*messages, parsed.message()), tools)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning_content is not None:
            message["reasoning_content"] = parsed.reasoning_content
        if parsed.tool_calls:
            message["tool_calls"] = [_written(each) for each in parsed.tool_calls]
        ended = "tool_calls" if parsed.tool_calls else reply.finish_reason
        choices = [{"index": 0, "message": message, "finish_reason": ended, "logprobs": None}]
        return _outer("chat.completion", ids, reply, body) | {"choices": choices}, call

    async def _complete(self, recorder: Recorder, body: Mapping[str, Any]) -> tuple[Any, Call]:
        self._check(body, {"prompt"})
        prompt = body.get("prompt")
        encode: Any = getattr(recorder.renderer, "encode", None)
        is_text = isinstance(prompt, str) and encode is not None
        ids = _ids(encode(prompt) if is_text else prompt, "prompt")
        reply = await recorder.sample(ids)
        choice = {"index": 0, "text": reply.text, "finish_reason": reply.finish_reason}
        answer = _outer("text_completion", ids, reply, body)
        return answer | {"choices": [choice | {"logprobs": None}]}, Call(tuple(ids), reply)

    async def _generate(self, recorder: Recorder, body: Mapping[str, Any]) -> tuple[Any, Call]:
        """Token ids in and out, as vLLM has it."""
        options = body.get("sampling_params") or {}
        if set(body) - {"token_ids", "sampling_params", "model"} or not isinstance(options, dict):
            raise CallError("a body holds token_ids, sampling_params and model, nothing else")
        self._check(options, set())
        ids = _ids(body.get("token_ids"), "token_ids")
        reply = await recorder.sample(ids)
        content = [{"logprob": value} for value in reply.logprobs]
        choice = {"index": 0, "token_ids": list(reply.token_ids), "logprobs": {"content": content}}
        choices = [choice | {"finish_reason": reply.finish_reason}]
        return {"choices": choices}, Call(tuple(ids), reply)


async def _reward(recorder: Recorder, body: Mapping[str, Any]) -> tuple[Any, None]:
    value = body.get("reward")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise CallError(f"reward must be a number, got {value!r:.60}")
    recorder.reward += value
    return {"reward": recorder.reward}, None


async def _begin(recorder: Recorder, body: Mapping[str, Any]) -> tuple[Any, None]:
    recorder.begin()
    return {}, None


async def _models(recorder: Recorder, body: Mapping[str, Any]) -> tuple[Any, None]:
    model = {"id": "policy", "object": "model", "created": 0, "owned_by": "torchrft"}
    return {"object": "list", "data": [model]}, None


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.strip().split("\r\n")
        method, path, _ = first.split(" ")
        pairs = (line.split(":", 1) for line in lines)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise CallError("this is no HTTP/1.1 request") from error
    return method, path.partition("?")[0], headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> dict[str, Any]:
    size = headers.get("content-length", "0")
    if not size.isdecimal() or "transfer-encoding" in headers:
        raise CallError("a request needs a Content-Length")
    if int(size) > _LONGEST_BODY:
        raise CallError(f"the body has {size} bytes, the limit is {_LONGEST_BODY}")
    content = await reader.readexactly(int(size))
    try:
        body = payload.parse(content) if content else {}
    except (ValueError, RecursionError) as error:
        raise CallError(f"the body is no JSON: {error!s:.200}") from None
    if not isinstance(body, dict):
        raise CallError("the body must be a JSON object")
    return body


def _ids(ids: Any, name: str) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
        raise CallError(f"{name} must be a list of token ids, at least one")
    return ids


def _outer(kind: str, ids: Any, reply: Completion, body: Mapping[str, Any]) -> dict[str, Any]:
    count, total = len(reply.token_ids), len(ids) + len(reply.token_ids)
    usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": total}
    outer = {"id": f"torchrft-{secrets.token_hex(8)}", "object": kind, "created": int(time.time())}
    return outer | {"model": str(body.get("model", "policy")), "usage": usage}


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call in OpenAI's form."""
    arguments = json.dumps(call["function"]["arguments"])
    function = {"name": call["function"]["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": function}


def _events(answer: dict[str, Any]) -> bytes:
    """The answer as server-sent events: all of it in one, its end in another."""
    [choice] = answer.pop("choices")
    usage, ended = answer.pop("usage"), choice.pop("finish_reason")
    first, last = dict(choice), {"index": 0, "finish_reason": ended}
    if "message" in choice:
        answer["object"] += ".chunk"
        delta = first.pop("message")
        for index, call in enumerate(delta.get("tool_calls", ())):
            call["index"] = index
        first["delta"], last["delta"] = delta, {}
    else:
        last["text"] = ""
    parts = [answer | {"choices": [part]} for part in (first | {"finish_reason": None}, last)]
    parts.append(answer | {"choices": [], "usage": usage})
    lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
    return ("".join(lines) + "data: [DONE]\n\n").encode()
