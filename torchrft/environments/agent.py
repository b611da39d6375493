"""Agents that own their loop, as environments: "agent:my_agent.py:run".

`run(row, base_url, api_key)` calls the policy as it would call any model, and returns the reward,
or None if it gave that to the endpoint.
"""

import asyncio
import inspect
import json
import threading
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torchrft.environments.protocol import EnvironmentFault, Message, Opening, Status, Turn

PREFIX = "agent:"


class Agent:
    """Where environments run: an episode is one call of `run`, which gets `options`, too."""

    def __init__(self, run: Callable[..., Any], **options: Any) -> None:
        self.run = partial(run, **options)

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        """Keeps the row; its `seed` is for what the agent draws itself."""
        self.row = {"seed": seed, **row}
        return Opening(())

    async def step(self, reply: Message) -> Turn:
        """Runs the agent. Its calls are those of this attempt alone."""
        url, key = reply["base_url"], reply["api_key"]
        await _in_thread(partial(_begin, url, key))
        run = partial(self.run, self.row, url, key)
        inner = getattr(self.run.func, "__call__", None)  # noqa: B004
        if inspect.iscoroutinefunction(self.run.func) or inspect.iscoroutinefunction(inner):
            reward = await run()
        else:
            reward = await _in_thread(run)
        if reward is not None and not isinstance(reward, int | float):
            raise TypeError(f"an agent returns its reward or None, got {reward!r:.80}")
        return Turn(reward=float(reward or 0.0), done=True)

    def close(self) -> None:
        """Nothing is held."""


def _begin(url: str, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/begin", json.dumps({}).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(request).close()


async def _in_thread(function: Callable[[], Any]) -> Any:
    """What it returns. A thread of its own, since one that never ends would block a shared one."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def tell(value: Any, error: BaseException | None) -> None:
        if not result.done():
            result.set_result(value) if error is None else result.set_exception(error)

    def work() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = function(), None
        except BaseException as error:
            # A future takes no StopIteration.
            is_stop = isinstance(error, StopIteration)
            outcome = None, RuntimeError(repr(error)) if is_stop else error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await result


async def run_agent(
    environment: Any, row: Mapping[str, Any], seed: int, url: str, key: str
) -> tuple[Status, str | None, float]:
    """Runs an agent in its process: how it ended, its fault, its reward."""
    try:
        await environment.reset(row, seed)
        turn = await environment.step(
            {"role": "user", "content": "", "base_url": url, "api_key": key}
        )
        return "done", None, turn.reward
    except EnvironmentFault as error:
        return error.status, str(error), 0.0
    finally:
        with suppress(EnvironmentFault):
            await environment.close()
