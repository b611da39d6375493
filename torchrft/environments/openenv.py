"""Environments of OpenEnv: on a server, or in this process."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast, get_type_hints

from torchrft.environments.adapting import from_user, known, task_seed
from torchrft.environments.protocol import Message, Opening, Turn
from torchrft.environments.tools import call_with, resolved


class OpenEnv:
    """ "openenv:http://127.0.0.1:8000": a session with a server; "openenv:my_env.py:Class": here.

    A reply is the field `action` of an action; the policy sees the field `observation`, or all.
    The environment gets the row and the seed as arguments of its reset.
    """

    def __init__(
        self,
        source: str | Callable[..., Any],
        action: str = "message",
        observation: str | None = None,
        **options: Any,
    ) -> None:
        self.field, self.action = observation, action
        place: Callable[..., Any] = _Server if isinstance(source, str) else _Here
        self.session = place(source, **options)
        known("the environment's action", action, self.session.fields)

    async def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        return Opening(self._seen(await self.session.reset({**row, "seed": task_seed(row, seed)})))

    async def step(self, reply: Message) -> Turn:
        result = await self.session.step({self.action: reply["content"]})
        messages = () if result["done"] else self._seen(result)
        return Turn(messages, float(result["reward"] or 0.0), bool(result["done"]))

    async def close(self) -> None:
        await self.session.close()

    def _seen(self, result: Mapping[str, Any]) -> tuple[Message, ...]:
        seen = result["observation"]
        if self.field is None:
            return from_user(json.dumps(seen))
        return from_user(str(seen[known("the observation", self.field, seen)]))


class _Server:
    """A session on a server. OpenEnv's own client would begin a new one where this one was lost.

    The server's `ws` endpoint takes {"type": "reset" or "step", "data": ...} as JSON.
    """

    def __init__(self, url: str) -> None:
        self.websockets = importlib.import_module("websockets")
        self.url = url.rstrip("/")
        self.fields, self.socket = _action_fields(self.url), cast(Any, None)

    async def reset(self, arguments: Mapping[str, Any]) -> Any:
        options = {"max_size": 2**26, "proxy": None}
        connect = self.websockets.connect
        self.socket = await connect(f"ws{self.url.removeprefix('http')}/ws", **options)
        return await self._ask("reset", arguments)

    async def step(self, action: Mapping[str, Any]) -> Any:
        return await self._ask("step", action)

    async def close(self) -> None:
        if self.socket is not None:
            await self.socket.close()

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> Any:
        try:
            await self.socket.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(await self.socket.recv())
        except self.websockets.ConnectionClosed as error:
            raise ConnectionError(f"the server has ended the session ({error})") from None
        if answer["type"] == "error":
            raise RuntimeError(f"the server says: {answer['data'].get('message')}")
        return {"done": False, "reward": None, **answer["data"]}


@cache  # a server that is lost later costs the episodes of that time alone
def _action_fields(url: str) -> tuple[str, ...]:
    """The fields of an action of a server. Raises ValueError if it is away or another one."""
    httpx = importlib.import_module("httpx")
    try:
        answer = httpx.get(f"{url}/schema", trust_env=False).raise_for_status()
        return tuple(answer.json()["action"]["properties"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        why = f"no server of OpenEnv answers there ({error!s:.200})"
        raise ValueError(f"{why}; start it, or write its URL as http://host:port") from None


class _Here:
    """What a server does with an environment, in this process."""

    def __init__(
        self, make: Callable[..., Any], action_class: str | None = None, **options: Any
    ) -> None:
        self.library = importlib.import_module("openenv.core.env_server")
        self.environment = make(**options)
        if not isinstance(self.environment, self.library.Environment):
            name = getattr(make, "__name__", make)
            raise ValueError(f"{name} makes no Environment of openenv.core.env_server")
        step = type(self.environment).step
        self.action = get_type_hints(step).get([*inspect.signature(step).parameters][1])
        if action_class is not None:
            module = sys.modules[type(self.environment).__module__]
            self.action = getattr(module, known(module.__name__, action_class, vars(module)))
        self.fields = tuple(getattr(self.action, "model_fields", ()))
        if not self.fields:
            raise ValueError(
                f"{step.__qualname__} has no type hint for its action; name the class, of the same "
                'module, by options = { action_class = "..." }'
            )

    async def reset(self, arguments: Mapping[str, Any]) -> Any:
        return await self._answer("reset", **arguments)

    async def step(self, fields: Mapping[str, Any]) -> Any:
        return await self._answer("step", self.library.deserialize_action(fields, self.action))

    async def close(self) -> None:
        await resolved(self.environment.close())

    async def _answer(self, method: str, *positional: Any, **arguments: Any) -> Any:
        overridden = getattr(type(self.environment), f"{method}_async")
        is_sync = overridden is getattr(self.library.Environment, f"{method}_async")
        function = getattr(self.environment, method if is_sync else f"{method}_async")
        observation = await resolved(call_with(function, *positional, **arguments))
        return self.library.serialize_observation(observation)
