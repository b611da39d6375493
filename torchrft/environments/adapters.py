"""Environments of other libraries, unchanged; each library is imported where it is used.

A column "seed" of the row chooses the task where there is one, else the episode's seed does: all
samples of a prompt get the same task.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torchrft.environments.adapting import from_user, known, task_seed
from torchrft.environments.openenv import OpenEnv
from torchrft.environments.protocol import Message, Opening, Turn
from torchrft.environments.tools import call_with
from torchrft.environments.verifiers import Verifiers


class ReasoningGym:
    """ "reasoning_gym:leg_counting": a generated question, answered in one turn.

    What stands between <answer> and </answer> is judged, else the whole reply.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.library = importlib.import_module("reasoning_gym")
        datasets = importlib.import_module("reasoning_gym.factory").DATASETS
        self.name, self.options = known("reasoning_gym", name, datasets), options
        config = datasets[name][1](size=1, seed=0, **options)
        call_with(getattr(config, "validate", lambda: None))

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        seed = task_seed(row, seed)
        self.tasks = self.library.create_dataset(self.name, size=1, seed=seed, **self.options)
        return Opening(from_user(self.tasks[0]["question"]))

    def step(self, reply: Message) -> Turn:
        answer = reply["content"].rpartition("<answer>")[2].partition("</answer>")[0].strip()
        return Turn(reward=float(self.tasks.score_answer(answer, self.tasks[0])), done=True)

    def close(self) -> None:
        """Nothing is held."""


class TextArena:
    """ "textarena:FrozenLake-v0": a game of one player, whose turns have only what is new."""

    def __init__(self, name: str, **options: Any) -> None:
        self.library = importlib.import_module("textarena")
        games = importlib.import_module("textarena.envs.registration").ENV_REGISTRY
        plain = (game.removesuffix("-raw") for game in games if game.endswith("-raw"))
        name = known("textarena", name, plain) + "-raw"
        _open_once(name, json.dumps(options))
        self.game = self.library.make(name, **options)

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        self.game.reset(num_players=1, seed=task_seed(row, seed))
        return Opening(self._observation())

    def step(self, reply: Message) -> Turn:
        if not self.game.step(reply["content"])[0]:
            return Turn(self._observation())
        return Turn(reward=float(self.game.close()[0][0]), done=True)

    def close(self) -> None:
        """Nothing is held; the game's own close gives out its rewards."""

    def _observation(self) -> tuple[Message, ...]:
        own = self.library.ObservationType.PLAYER_ACTION
        entries = self.game.get_observation()[1]
        return from_user("\n".join(str(text) for _, text, kind in entries if kind != own))


@cache
def _open_once(name: str, options: str) -> None:
    """Raises what a game of textarena raises that one player cannot play, before any episode."""
    game = importlib.import_module("textarena").make(name, **json.loads(options))
    game.reset(num_players=1, seed=0)


class SkyRLGym:
    """ "skyrl_gym:gsm8k_multi_turn", on rows with the columns that it needs."""

    def __init__(self, name: str, **options: Any) -> None:
        self.library = importlib.import_module("skyrl_gym")
        self.name, self.options = known("skyrl_gym", name, self.library.registry), options

    def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        extras, prompt = {"extra_info": {}, **row, **self.options}, row["prompt"]
        self.gym = self.library.make(self.name, env_config=self.options, extras=extras)
        messages = from_user(prompt) if isinstance(prompt, str) else prompt
        return Opening(tuple(self.gym.init(list(messages))[0]))

    def step(self, reply: Message) -> Turn:
        output = self.gym.step(reply["content"])
        return Turn(tuple(output["observations"]), float(output["reward"]), bool(output["done"]))

    def close(self) -> None:
        self.gym.close()


ADAPTERS: dict[str, Callable[..., Any]] = {
    "reasoning_gym": ReasoningGym,
    "textarena": TextArena,
    "skyrl_gym": SkyRLGym,
    "openenv": OpenEnv,
    "verifiers": Verifiers,
}
"""By the names of their libraries, which are those of packages with "-" for "_"."""

COLUMNS: dict[str, tuple[str, ...]] = {
    f"skyrl_gym:{name}": ("reward_spec",) for name in ("gsm8k", "gsm8k_multi_turn", "lcb")
}
COLUMNS |= {"skyrl_gym:search": ("reward_spec",), "skyrl_gym:searchcode": ("reward_spec",)}
COLUMNS |= {"skyrl_gym:aime": ("reward_model",)}
COLUMNS |= {"skyrl_gym:text2sql": ("data", "db_id", "reward_spec")}
"""What an environment needs of each row beside the prompt, by its name."""


def library_of(name: str) -> str | None:
    """The module of another library that an environment of this name needs, if it needs one."""
    library, _, rest = name.partition(":")
    if library == "openenv" and "://" in rest:
        return "websockets"  # a server is spoken to without OpenEnv itself
    return library if library in ADAPTERS else None
