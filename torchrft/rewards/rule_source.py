"""Rewards by functions: in worker processes, or here where nothing can go wrong."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.rewards.registry import (
    GRACE,
    LabelError,
    MissingPackage,
    Rule,
    RuleFault,
    make_rule,
)
from torchrft.rewards.rules import BUILT_IN, BuiltIn
from torchrft.rewards.source import RewardError, RewardRequest, RewardResult, SampleError
from torchrft.tools.logging import logger

if TYPE_CHECKING:
    from torchrft.rewards.sandbox import Isolation
    from torchrft.rewards.workers import WorkerPool
    from torchrft.types import Prompt

_GETTERS: dict[str, Callable[[RewardRequest], Any]] = {
    "prompt": lambda request: request.prompt.text,
    "response": lambda request: request.completion.text,
    # A function may change what it is given; nobody else must see that.
    "label": lambda request: copy.deepcopy(request.prompt.label),
    "token_ids": lambda request: request.completion.token_ids,
    "images": lambda request: request.prompt.images,
    "metadata": lambda request: copy.deepcopy(request.prompt.metadata),
    "finish_reason": lambda request: request.completion.finish_reason,
}


class RuleSource:
    """A reward function as a source; with a `pool`, the function is its task number `task`."""

    collective = False

    def __init__(
        self, name: str, rule: Rule, timeout: float, pool: WorkerPool | None = None, task: int = 0
    ) -> None:
        self.name, self.rule, self.timeout, self.pool, self.task = name, rule, timeout, pool, task
        self.arguments = tuple(dict.fromkeys(rule.parameters.values()))

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Raises RewardError for a bug in the function, with its place and the prompt's row."""
        getters = [(name, _GETTERS[name]) for name in self.arguments]
        rows = [{name: get(request) for name, get in getters} for request in requests]
        rule, seconds = self.rule, self.timeout
        if rule.is_batch:
            seconds *= len(rows)
        try:
            if self.pool is None:
                return rule(rows, self.timeout)
            if rule.is_async:  # ends by itself, unless it blocks
                seconds += GRACE
            together = rule.is_batch or rule.is_async
            return self.pool.run(self.task, rows, together, seconds)
        except RuleFault as fault:
            row = requests[fault.index].prompt.row
            text = f"reward function {self.name!r}, prompt row {row}: {fault.text}"
            raise (SampleError if fault.of_data else RewardError)(text) from fault.__cause__

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first row whose label a rule of torchrft's can never judge."""
        built_in = BUILT_IN.get(self.rule.name, BuiltIn())
        for prompt in prompts:
            try:
                built_in.label(prompt.label, **self.rule.options)
            except LabelError as error:
                raise ValueError(
                    f"reward function {self.name!r}, prompt row {prompt.row}: {error}"
                ) from error

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


def rule_sources(reward: Reward) -> list[RuleSource]:
    """The sources of `[reward] functions`.

    Raises ValueError, before anything has been generated, for a name that is unknown, a file that
    does not load, a parameter that nobody can fill, and options that do not fit.
    """
    rules = [checked_rule(entry) for entry in reward.functions]
    isolation = check_isolation(reward)
    if isolation and isolation.is_safe:
        logger.info(f"[reward] programs run in a sandbox: {isolation.name}")
    elif isolation:
        logger.warning(
            "[reward] allow_unsafe_code = true: programs run without isolation, with the files, "
            "network and processes of this machine in their reach"
        )
    isolated = [entry for entry in reward.functions if _is_isolated(entry)]
    timeout, pool = reward.reward_timeout, None
    if isolated:
        from torchrft.rewards.workers import Task, WorkerPool  # which other jobs do without

        tasks = [Task(e.name, e.options, e.name in BUILT_IN, isolation) for e in isolated]
        count = reward.reward_workers or _share_of_cores()
        memory, most = int(reward.reward_memory * 2**30), reward.max_reward_failures
        pool = WorkerPool(tasks, count, timeout, memory, most)
    sources = []
    for entry, rule in zip(reward.functions, rules, strict=True):
        name = entry.alias or entry.name
        if entry in isolated:
            sources.append(RuleSource(name, rule, timeout, pool, isolated.index(entry)))
        else:
            sources.append(RuleSource(name, rule, timeout))
    return sources


def check_isolation(reward: Reward) -> Isolation | None:
    """Return the isolation of programs, None if there are none to run; ValueError if none works."""
    if not any(entry.name == "code" for entry in reward.functions):
        return None
    from torchrft.rewards import sandbox  # which jobs without programs do without

    isolation = sandbox.isolation()
    if not isolation.is_safe and not reward.allow_unsafe_code:
        raise ValueError(
            "reward function 'code': this machine lets nobody isolate a program: neither bwrap nor "
            "nsjail nor unshare works; install bubblewrap and allow user namespaces, or set "
            "allow_unsafe_code = true, with which programs may do all that this user may"
        )
    return isolation


def checked_rule(entry: RewardFunction) -> Rule:
    """The function of an entry; ValueError for one that cannot be used, as in `rule_sources`."""
    rule = make_rule(entry.name, entry.options)
    built_in = BUILT_IN.get(entry.name)
    if built_in is not None:
        try:
            built_in.check(**entry.options)
        except (ValueError, ImportError) as error:
            kind = MissingPackage if isinstance(error, MissingPackage) else ValueError
            raise kind(f"reward function {entry.name!r}: {error}") from error
    if not entry.isolate and ".py:" not in entry.name:
        raise ValueError(
            f"reward function {entry.name!r}: isolate = false is for functions of a file; leave it "
            "out"
        )
    return rule


def _is_isolated(entry: RewardFunction) -> bool:
    """What is registered in Python only, a worker would not find."""
    built_in = BUILT_IN.get(entry.name)
    return not built_in.bounded if built_in else entry.isolate and ".py:" in entry.name


def _share_of_cores() -> int:
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores, 1), 8)
