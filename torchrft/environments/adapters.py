"""Environments of other libraries, each imported where it is used.

A column "seed" of the row chooses the task where there is one: all samples of a prompt get the
same task then.
"""

import importlib
import json
from collections.abc import Mapping
from typing import Any

from torchrft.environments.protocol import Message, Opening, Turn


def _from_user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


class ReasoningGym:
    """ "reasoning_gym:leg_counting": a generated question, answered in one turn.

    What stands between <answer> and </answer> is judged, else the whole reply.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.library, self.name = importlib.import_module("reasoning_gym"), name
        self.options = options

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        seed = row.get("seed", seed)
        self.tasks = self.library.create_dataset(self.name, size=1, seed=seed, **self.options)
        return Opening(_from_user(self.tasks[0]["question"]))

    def step(self, reply: Message) -> Turn:
        answer = reply["content"].rpartition("<answer>")[2].partition("</answer>")[0].strip()
        return Turn(reward=self.tasks.score_answer(answer, self.tasks[0]), done=True)


class TextArena:
    """ "textarena:FrozenLake-v0": a game of one player, whose turns have only what is new."""

    def __init__(self, name: str, **options: Any) -> None:
        self.library = importlib.import_module("textarena")
        self.game = self.library.make(name.removesuffix("-raw") + "-raw", **options)

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        self.game.reset(num_players=1, seed=row.get("seed", seed))
        return Opening(self._observation())

    def step(self, reply: Message) -> Turn:
        if not self.game.step(reply["content"])[0]:
            return Turn(self._observation())
        return Turn(reward=self.game.close()[0][0], done=True)

    def _observation(self) -> tuple[Message, ...]:
        own = self.library.ObservationType.PLAYER_ACTION
        entries = self.game.get_observation()[1]
        return _from_user("\n".join(text for _, text, kind in entries if kind != own))


class SkyRLGym:
    """ "skyrl_gym:gsm8k_multi_turn", on rows with the columns that it needs."""

    def __init__(self, name: str, **options: Any) -> None:
        self.library, self.name = importlib.import_module("skyrl_gym"), name
        self.options = options

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        self.gym = self.library.make(self.name, env_config=self.options, extras=dict(row))
        return Opening(tuple(self.gym.init(row["prompt"])[0]))

    def step(self, reply: Message) -> Turn:
        output = self.gym.step(reply["content"])
        return Turn(tuple(output["observations"]), float(output["reward"]), output["done"])

    def close(self) -> None:
        self.gym.close()


class OpenEnv:
    """ "openenv:http://127.0.0.1:8000": a session with a server.

    A reply is the field `action` of an action; the policy sees the field `observation`, or all.
    """

    def __init__(self, url: str, action: str = "message", observation: str | None = None) -> None:
        library = importlib.import_module("openenv.core.generic_client")
        self.client = library.GenericEnvClient(base_url=url)
        self.action, self.field = action, observation

    async def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        result = await self.client.reset(**{"seed": seed % 2**31, **row})
        return Opening(self._observation(result))

    async def step(self, reply: Message) -> Turn:
        result = await self.client.step({self.action: reply["content"]})
        messages = () if result.done else self._observation(result)
        return Turn(messages, float(result.reward or 0.0), bool(result.done))

    async def close(self) -> None:
        await self.client.close()

    def _observation(self, result: Any) -> tuple[Message, ...]:
        seen = result.observation
        return _from_user(json.dumps(seen) if self.field is None else str(seen[self.field]))


ADAPTERS = {
    "reasoning_gym": ReasoningGym,
    "textarena": TextArena,
    "skyrl_gym": SkyRLGym,
    "openenv": OpenEnv,
}
"""By the names of their libraries, which are those of packages with "-" for "_"."""
