"""Task sets of verifiers, in an environment of their own: its `mcp` clashes with OpenEnv's."""

import json

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
        (reply,) = replies(episode)
        right = task["content"][5] in reply
        brief = len(reply.strip().encode()) == 1
        assert episode["reward"] == 2.0 * right + 0.25 * brief
        seen.add(episode["reward"])
    assert {0.0, 2.0} <= seen
    assert {record["reward/environment/turns"] for record in records} == {1.0}
