"""Task sets of verifiers, in an environment of their own: its `mcp` clashes with OpenEnv's."""

import pytest
import word_jobs
from word_jobs import no_faults, replies

from torchrft.environments.registry import make

ROWS = [{"idx": number} for number in range(6)]


def test_a_task_set_of_verifiers(tmp_path):
    """Rewards are the task's own, weighted; one of them runs a program."""
    options = {"environment.options": {"num_tasks": 6}}
    name, words = "verifiers:digit-tasks", list("1234")
    records, episodes = word_jobs.train(tmp_path, name, words, ROWS, **options)
    no_faults(records, episodes)
    seen = set()
    for episode in episodes:
        system, task, _ = episode["messages"]
        assert (system["role"], system["content"]) == ("system", "Short.")
        high = episode["row"] % 3 + 2
        assert task["content"] == f"{high - 1} or {high}?"
        (reply,) = replies(episode)
        brief = len(reply.strip().encode()) == 1
        assert episode["reward"] == 2.0 * (str(high) in reply) + 0.25 * brief
        seen.add(episode["reward"])
    assert {0.0, 2.0} <= seen
    for record in records:
        assert record["reward/environment/replies"] == 1.0
        assert record["reward/environment/turns"] == 1.0


TASK_SET = """
import verifiers.v1 as vf
from verifiers.v1.mcp import Toolset, ToolsetConfig

class Task(vf.Task[vf.TaskData]):
    {task}

class Tasks(vf.Taskset[Task]):
    {tasks}
    def load(self):
        return [Task(vf.TaskData({data})) for _ in range(3)]

__all__ = ["Tasks"]
"""
TOOLS = """@classmethod
    def toolsets(cls, config):
        return [Toolset(ToolsetConfig())]"""


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data": ""}, "has tasks that a user opens: its own harness must play it"),
        ({"data": "prompt='?', image='box'"}, "has tasks in containers"),
        ({"data": "prompt='?'", "task": "NEEDS_CONTAINER = True"}, "has a container"),
        ({"data": "prompt='?'", "task": TOOLS}, "has tools"),
        (
            {"data": "prompt='?'", "tasks": "INFINITE = True"},
            "has no end",
        ),
    ],
)
def test_task_sets_that_need_more_are_refused(tmp_path, monkeypatch, fields, said):
    name = tmp_path.name.lower()
    text = TASK_SET.format(**{"task": "pass", "tasks": "", **fields})
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^the task set '{name}' {said}"):
        make(f"verifiers:{name}", {})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nothing", {}, "taskset 'nothing' not found"),
        ("", {}, "'verifiers:' does not say which; write verifiers:NAME"),
        ("digit-tasks", {"tasks": "all"}, "tasks = 'all': the number of tasks"),
        ("digit-tasks", {"num_tasks": 0}, "holds no tasks"),
        ("digit-tasks", {"size": 3}, "size"),
    ],
)
def test_wrong_names_and_options(name, options, said):
    with pytest.raises(ValueError, match=said):
        make(f"verifiers:{name}", options)
