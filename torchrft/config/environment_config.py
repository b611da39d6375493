"""The `[environment]` section."""

from typing import Literal

from torchrft.config.field_types import Count, Number, PositiveInt, Seconds, Section, Text


class Environment(Section):
    """Episodes of several turns in place of single responses."""

    name: Text | None = None
    """my_env.py:Class, package.module:Class or library:name; left out, responses are single."""
    options: dict[str, bool | int | float | str | list[str]] = {}
    """Keyword arguments of the environment."""
    max_turns: PositiveInt = 8
    """Replies of the policy after which an episode ends."""
    episode_schedule: Literal["rounds", "free"] | None = None
    """Episodes wait for each other (rounds), or ask the engine as they come (free); by default
    rounds where a run is bit-identical: on a CPU or with deterministic, without server_urls."""
    environment_timeout: Seconds = 30.0
    """Seconds that a call of the environment may take; then its episode has no reward."""
    environment_workers: Count | None = None
    """Processes of each rank that run environments; by default one per core, at most 16."""
    environment_weight: Number = 1.0
    """Weight of the environment's rewards beside those of `[reward]`."""
