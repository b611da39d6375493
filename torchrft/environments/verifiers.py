"""Task sets of verifiers that a single reply answers."""

import importlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from torchrft.environments.adapting import task_seed
from torchrft.environments.protocol import Message, Opening, Turn
from torchrft.environments.tools import call_with


class Verifiers:
    """ "verifiers:my-taskset": a task of an installed task set, judged by its own rewards.

    The policy replies once, as under the library's `null` harness. A column "idx" chooses the task.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.vf = importlib.import_module("verifiers.v1")
        self.tasks = _tasks(name, json.dumps(options))

    async def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        index, vf = row.get("idx", task_seed(row, seed) % len(self.tasks)), self.vf
        if index not in range(len(self.tasks)):
            raise ValueError(f"the column idx is {index!r}; there are {len(self.tasks)} tasks")
        self.task = task = self.tasks[index]
        kind, config = vf.TraceTask, vf.AgentConfig(runtime=vf.SubprocessConfig())
        about = kind(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        state = importlib.import_module("verifiers.v1.state").state_cls(type(task))()
        self.trace = vf.Trace(task=about, state=state, agent=vf.AgentInfo(config=config))
        make_runtime = importlib.import_module("verifiers.v1.runtimes").make_runtime
        self.runtime = make_runtime(config.runtime)
        self.runtime.env = dict(task.runtime_env())
        await self.runtime.start()
        await call_with(task.setup, trace=self.trace, runtime=self.runtime)
        for message in _opening(vf, task.data):
            self._add(message)
        sent = (node.message.model_dump(exclude_none=True) for node in self.trace.nodes)
        return Opening(tuple(sent))

    async def step(self, reply: Message) -> Turn:
        thinking = reply.get("reasoning_content")
        said = self.vf.AssistantMessage(content=reply["content"], reasoning_content=thinking)
        self._add(said, sampled=True)
        self.trace.stop("agent_completed")
        await call_with(self.task.finalize, trace=self.trace, runtime=self.runtime)
        await self.task.score(self.trace, self.runtime)
        return Turn(reward=self.trace.reward, done=True, metrics=self.trace.metrics)

    async def close(self) -> None:
        await self.runtime.stop()

    def _add(self, message: Any, sampled: bool = False) -> None:
        parent = len(self.trace.nodes) - 1 if self.trace.nodes else None
        node = self.vf.MessageNode(parent=parent, message=message, sampled=sampled)
        self.trace.nodes.append(node)


def _opening(vf: Any, data: Any) -> list[Any]:
    """The first messages of a task of verifiers."""
    system = [] if data.system_prompt is None else [vf.SystemMessage(content=data.system_prompt)]
    prompt = data.prompt
    return system + ([vf.UserMessage(content=prompt)] if isinstance(prompt, str) else [*prompt])


@cache
def _tasks(name: str, options: str) -> tuple[Any, ...]:
    """The tasks of a task set of verifiers. Raises ValueError for one that needs its own loop."""
    vf = importlib.import_module("verifiers.v1")
    given = json.loads(options)
    first = given.pop("tasks", None)
    config = vf.taskset_config_type(name).model_validate({"id": name, **given})
    taskset, kind = vf.load_taskset(config), vf.task_type(name)
    decorated = importlib.import_module("verifiers.v1.utils.decorators").discover_decorated
    needs = {
        "an environment of its own": vf.environment_class(name) is not vf.SingleAgentEnv,
        "tools": taskset.toolsets(config) or kind.toolsets(config.task),
        "a container": kind.NEEDS_CONTAINER,
        "no end: say how many, options = { tasks = 1000 }": taskset.INFINITE and not first,
    }
    tasks = () if any(needs.values()) else tuple(taskset if first is None else taskset.take(first))
    needs["@vf.intercept"] = any(decorated(task, "intercept") for task in tasks[:1])
    needs["tasks without a prompt"] = any(task.data.prompt is None for task in tasks)
    for what, is_needed in needs.items():
        if is_needed:
            raise ValueError(f"the task set {name!r} has {what}; a task is a prompt and one reply")
    if not tasks:
        raise ValueError(f"the task set {name!r} has no tasks")
    return tasks
