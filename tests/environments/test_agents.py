"""Jobs with agents that own their loop, on the `openai` client."""

from pathlib import Path

import counter_agent
import pytest
import word_jobs

HERE = Path(__file__).parent
CALL = '<tool_call>\n{"name": "increment", "arguments": {"by": %d}}\n</tool_call>'
ROWS = [{"target": number % 3 + 1} for number in range(20)]
WORDS = [CALL % number for number in (1, 2)]


def test_an_agent_with_a_tool(tmp_path):
    """Its calls are one row, token by token, and its reward is what it returned."""
    name = f"agent:{HERE / 'counter_agent.py'}:run"
    records, episodes = word_jobs.train(tmp_path, name, WORDS, ROWS, tools=[counter_agent.TOOL])
    word_jobs.no_faults(records, episodes)
    called = 0
    for episode in episodes:
        assert len(episode["branches"]) == 1
        answers = [int(m["content"]) for m in episode["messages"] if m["role"] == "tool"]
        target = int(episode["messages"][0]["content"][-2])
        called += len(answers)
        if len(word_jobs.replies(episode)) < 3:  # it saw its last call's answer
            total = answers[-1] if answers else 0
            assert episode["reward"] == pytest.approx(1.0 if total == target else total / 10)
    assert called > 0


def test_agents_that_fail_or_never_end_cost_their_own_episode(tmp_path):
    name = f"agent:{HERE / 'counter_agent.py'}:faulty"
    records, episodes = word_jobs.train(
        tmp_path, name, WORDS, ROWS, environment_timeout=5, max_turns=2, max_reward_failures=1.0
    )
    kinds = set()
    for episode in episodes:
        fault, (said,) = episode["fault"], word_jobs.replies(episode)
        if fault is None:
            assert episode["reward"] == len(said) % 5
            kinds.add("none")
        else:
            assert episode["reward"] == 0.0
            [kind] = [
                text for text in ("RuntimeError: a bad agent", "more than 15 s") if text in fault
            ]
            kinds.add(kind)
    assert kinds == {"none", "RuntimeError: a bad agent", "more than 15 s"}
    for record in records:
        shares = [record[f"reward/environment/status/{s}"] for s in ("done", "error", "timeout")]
        assert sum(shares) == pytest.approx(1.0)
