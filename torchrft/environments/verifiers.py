"""Task sets of verifiers whose tasks are a prompt and one reply."""

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

    It goes as under the library's harness `null`, with its runtime `subprocess`. A column "idx"
    chooses the task, else the seed does.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.tasks = _tasks(name, json.dumps(options))

    async def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        index = row.get("idx", task_seed(row, seed) % len(self.tasks))
        if index not in range(len(self.tasks)):
            raise ValueError(f'the column "idx" holds {index!r}; there are {len(self.tasks)} tasks')
        self.task = self.tasks[index]
        self.trace, self.runtime = _trace(self.task)
        await self.runtime.start()
        await call_with(self.task.setup, trace=self.trace, runtime=self.runtime)
        sent = (node.message.model_dump(exclude_none=True) for node in self.trace.nodes)
        return Opening(tuple(sent))

    async def step(self, reply: Message) -> Turn:
        fields = {key: reply.get(key) for key in ("content", "reasoning_content")}
        _add(self.trace, _library().AssistantMessage(**fields), sampled=True)
        self.trace.stop("agent_completed")
        await call_with(self.task.finalize, trace=self.trace, runtime=self.runtime)
        await self.task.score(self.trace, self.runtime)
        return Turn(reward=self.trace.reward, done=True, metrics=self.trace.metrics)

    async def close(self) -> None:
        await self.runtime.stop()


def _library(part: str = "") -> Any:
    return importlib.import_module("verifiers.v1" + part)


@cache
def _tasks(name: str, options: str) -> tuple[Any, ...]:
    """The tasks of a task set. Raises ValueError for one whose tasks take more than a reply."""
    vf, fields = _library(), json.loads(options)
    first = fields.pop("tasks", None)
    if not isinstance(first, int | None):
        raise ValueError(f"tasks = {first!r}: the number of tasks that are taken")
    config = vf.taskset_config_type(name).model_validate({"id": name, **fields})
    taskset, kind = vf.load_taskset(config), vf.task_type(name)
    if taskset.INFINITE and first is None:
        raise ValueError(
            f"the task set {name!r} has no end; options = {{ tasks = 1000 }} takes 1000"
        )
    needs = {
        "an environment of its own": vf.environment_class(name) is not vf.SingleAgentEnv,
        "tools": taskset.toolsets(config) or kind.toolsets(config.task),
        "a container": kind.NEEDS_CONTAINER,
    }
    tasks = () if any(needs.values()) else tuple(taskset if first is None else taskset.take(first))
    hooks = _library(".utils.decorators").discover_decorated
    needs["interceptors"] = tasks and hooks(tasks[0], "intercept")
    needs["tasks that a user opens"] = any(task.data.prompt is None for task in tasks)
    needs["tasks in containers"] = any(task.data.image is not None for task in tasks)
    if owned := [what for what, is_needed in needs.items() if is_needed]:
        raise ValueError(
            f"the task set {name!r} has {' and '.join(owned)}: its own harness must play it, which "
            "is not possible here; take one whose tasks are a prompt and one reply"
        )
    if not tasks:
        raise ValueError(f"the task set {name!r} holds no tasks")
    return tasks


def _trace(task: Any) -> tuple[Any, Any]:
    """The library's record of an episode that begins, and its runtime, which is not started."""
    vf, data = _library(), task.data
    config = vf.AgentConfig(runtime=vf.SubprocessConfig())
    about = vf.TraceTask(type=type(task).__name__, data=data, key=task.key, hash=task.hash)
    state = _library(".state").state_cls(type(task))()
    trace = vf.Trace(task=about, state=state, agent=vf.AgentInfo(config=config))
    if data.system_prompt is not None:
        _add(trace, vf.SystemMessage(content=data.system_prompt))
    is_text = isinstance(data.prompt, str)
    for message in [vf.UserMessage(content=data.prompt)] if is_text else data.prompt:
        _add(trace, message)
    runtime = _library(".runtimes").make_runtime(config.runtime)
    runtime.env = dict(task.runtime_env())
    return trace, runtime


def _add(trace: Any, message: Any, sampled: bool = False) -> None:
    parent = len(trace.nodes) - 1 if trace.nodes else None
    node = _library().MessageNode(parent=parent, message=message, sampled=sampled)
    trace.nodes.append(node)
