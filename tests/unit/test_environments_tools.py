"""Tools from functions, environments whose turns are calls of them, and environments by name."""

import asyncio
import json
from typing import Any, Literal

import pytest
import tiny_job

from torchrft.environments import Opening, Turn
from torchrft.environments.registry import make, register
from torchrft.environments.tools import ToolEnvironment, tool_spec


def search(
    query: str,
    limit: int = 3,
    *,
    score: float | None = None,
    exact: bool = False,
    kind: Literal["page", "file"] = "page",
    tags: list[str] = [],  # noqa: B006
    extra: dict[str, Any] | None = None,
) -> list[str]:
    """Finds texts.

    It looks at all of them.

    Args:
        query: What to look for.
        limit (int): How many at most.

    Returns:
        The texts: a list.
    """
    return [query] * limit


def test_a_function_becomes_a_tool():
    function = tool_spec(search)["function"]
    assert tool_spec(search)["type"] == "function"
    assert function["name"] == "search"
    assert function["description"] == "Finds texts.\n\nIt looks at all of them."
    schema = function["parameters"]
    assert (schema["type"], schema["required"]) == ("object", ["query"])
    properties = schema["properties"]
    assert properties["query"] == {"type": "string", "description": "What to look for."}
    assert properties["limit"] == {
        "type": "integer",
        "default": 3,
        "description": "How many at most.",
    }
    assert properties["score"]["anyOf"] == [{"type": "number"}, {"type": "null"}]
    assert properties["exact"] == {"type": "boolean", "default": False}
    assert properties["kind"]["enum"] == ["page", "file"]
    assert properties["tags"]["items"] == {"type": "string"}
    json.dumps(schema)


def test_a_parameter_called_title_stays():
    def name(title: str) -> str:
        """Names a thing."""
        return title

    assert tool_spec(name)["function"]["parameters"]["properties"] == {"title": {"type": "string"}}


def test_what_makes_no_tool_is_refused():
    def silent(a: int) -> int:
        return a

    def untyped(a, b: int) -> int:
        """Adds."""
        return a + b

    def starred(*numbers: int) -> int:
        """Adds."""
        return sum(numbers)

    def odd(a: object.__class__) -> int:
        """Adds."""
        return 1

    for function, words in (
        (silent, "tool 'silent' has no docstring: say there what it does"),
        (untyped, "tool 'untyped': its parameter 'a' has no type"),
        (starred, r"tool 'starred': '\*numbers: int' has no name that a call can give"),
        (odd, "tool 'odd': JSON has no such type"),
    ):
        with pytest.raises(ValueError, match=words):
            tool_spec(function)


class Calculator:
    """In TRL's style."""

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus, self.total, self.is_closed = bonus, 0, False

    def reset(self, target: int) -> str | None:
        self.target = target
        return f" Reach {target}."

    def add(self, number: int) -> int:
        """Adds a number to the total."""
        self.total += number
        return self.total

    async def fail(self, text: str) -> str:
        """Fails."""
        raise KeyError(text)

    def look(self) -> dict[str, int]:
        """The total."""
        return {"total": self.total}

    def get_reward(self) -> float:
        return float(self.total == self.target) + self.bonus

    def close(self) -> None:
        self.is_closed = True


def call(name: str, arguments: Any, identity: str = "c1") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


def reply(*calls: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **keys}


def test_an_episode_of_a_class_in_the_style_of_trl():
    async def play() -> None:
        holder = Calculator(bonus=0.5)
        environment = ToolEnvironment.of(holder)
        opening = await environment.reset({"prompt": "Count.", "target": 5, "label": "x"}, 0)
        assert opening.messages == ({"role": "user", "content": "Count. Reach 5."},)
        assert [spec["function"]["name"] for spec in opening.tools] == ["add", "fail", "look"]
        turn = await environment.step(reply(call("add", {"number": 2}), call("look", {}, "c2")))
        assert turn == Turn(
            (
                {"role": "tool", "name": "add", "content": "2", "tool_call_id": "c1"},
                {"role": "tool", "name": "look", "content": '{"total": 2}', "tool_call_id": "c2"},
            )
        )
        # Arguments as text, and a call without the envelope of function.
        await environment.step(reply(call("add", '{"number": "2"}')))
        turn = await environment.step(reply({"name": "add", "arguments": {"number": 1}}))
        assert turn.messages == ({"role": "tool", "name": "add", "content": "5"},)
        assert await environment.step(reply()) == Turn(reward=1.5, done=True)
        assert holder.is_closed is False
        environment.close()
        assert holder.is_closed is True

    asyncio.run(play())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (call("fail", {"text": "x"}), "error: KeyError: 'x'"),
        (call("add", {"number": "two"}), "error: number: input should be a valid integer"),
        (call("add", {}), "error: number: missing required argument"),
        (call("add", {"number": 1, "more": 2}), "error: more: unexpected keyword argument"),
        (call("add", "{"), "error: JSONDecodeError: Expecting property name"),
        (call("add", [1]), "error: the arguments of add must be an object"),
        (call("_secret", {}), "error: there is no tool '_secret'; the tools are add, fail, look"),
        (call("get_reward", {}), "error: there is no tool 'get_reward'"),
    ],
)
def test_faults_of_calls_are_told_to_the_policy(made, words):
    environment = ToolEnvironment.of(Calculator())
    asyncio.run(environment.reset({"target": 1}, 0))
    turn = asyncio.run(environment.step(reply(made)))
    (message,) = turn.messages
    assert (message["role"], message["tool_call_id"], turn.done) == ("tool", "c1", False)
    assert message["content"].startswith(words)


def test_a_call_that_cannot_be_read_is_told_to_the_policy():
    environment = ToolEnvironment.of(Calculator())
    asyncio.run(environment.reset({"target": 1}, 0))
    turn = asyncio.run(environment.step(reply(call("look", {}), fault="no JSON: {")))
    assert [message["role"] for message in turn.messages] == ["tool", "user"]
    assert turn.messages[1]["content"] == "error: no JSON: {"
    assert not turn.done
    assert asyncio.run(environment.step(reply(fault="no JSON: {"))).messages == turn.messages[1:]


def test_functions_with_a_reward_of_the_conversation():
    def reward(row, messages):
        return float(messages[-1]["content"] == row["label"]) + len(messages) / 10

    environment = ToolEnvironment([search], reward)
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    opening = asyncio.run(environment.reset({"prompt": prompt, "label": "a"}, 0))
    assert opening.messages == tuple(prompt)
    turn = asyncio.run(environment.step(reply(call("search", {"query": "q", "limit": 2}))))
    assert turn.messages[0]["content"] == '["q", "q"]'
    turn = asyncio.run(environment.step({"role": "assistant", "content": "a"}))
    assert turn == Turn(reward=1.5, done=True)


def test_an_episode_without_a_first_message_is_refused():
    environment = ToolEnvironment([search], lambda row, messages: 0.0)
    with pytest.raises(ValueError, match='neither a column "prompt" nor from reset'):
        asyncio.run(environment.reset({"label": "a"}, 0))


FILE = """
from torchrft.environments import Opening, Turn

class Echo:
    def __init__(self, times=1):
        self.times = times
    def reset(self, row, seed):
        return Opening(({"role": "user", "content": row["text"]},))
    def step(self, reply):
        return Turn(reward=float(self.times), done=True)

class Trl:
    def reset(self, **row):
        return str(sorted(row))
    def get_reward(self, messages):
        return len(messages)

def chosen(times):
    return Echo(times) if times else Trl()
"""


def test_environments_by_name(tmp_path, monkeypatch):
    path = tmp_path / "own_environments.py"
    path.write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    assert make(f"{path}:Echo", {"times": 3}).step({}) == Turn(reward=3.0, done=True)
    assert make("own_environments:Echo", {"times": 4}).step({}).reward == 4.0
    assert make(f"{path}:chosen", {"times": 5}).step({}).reward == 5.0
    tools = make(f"{path}:chosen", {"times": 0})
    opening = asyncio.run(tools.reset({"function": 1, "a": 2}, 0))
    assert opening == Opening(({"role": "user", "content": "['a', 'function']"},))
    assert asyncio.run(tools.step({"content": ""})) == Turn(reward=2, done=True)

    @register("echo of tests")
    def echo():
        return make(f"{path}:Echo", {})

    assert make("echo of tests", {}).step({}).reward == 1.0
    for name, words in (
        ("ehco of tests", 'unknown environment "ehco of tests"; did you mean "echo of tests"'),
        (f"{path}:Ecco", "has no function 'Ecco'"),
        ("own_environments:Ecco", "own_environments has no class or function 'Ecco'"),
        (
            "no_such_module:Echo",
            "No module named 'no_such_module'; a name is path/to/file.py:Class",
        ),
        ("json:dumps", "missing 1 required positional argument"),
        ("builtins:dict", "dict is no environment; write a class with reset"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            make(name, {})


CALCULATOR = f"{tiny_job.ROOT}/train_configs/calculator.py:Calculator"


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("(12 + 3) * 4", "60"),
        ("1,200 / 8 - -2", "152.0"),
        ("7 // 2 % 2", "1"),
        ("1 / 0", "error: ZeroDivisionError: division by zero"),
        ("2 ** 9", "error: ValueError: 2 ** 9 is no arithmetic; use numbers and + - * / // %"),
        ("exit()", "error: ValueError: exit() is no arithmetic; use numbers and + - * / // %"),
        ("1" * 201, "error: ValueError: the expression has more than 200 characters"),
    ],
)
def test_the_recipes_calculator(expression, answer):
    environment = make(CALCULATOR, {})
    row = {"prompt": "How many?", "label": "It is 6 * 10 = 60.\n#### 1,060", "unused": 1}

    async def episode():
        opening = await environment.reset(row, 0)
        assert opening.tools[0]["function"]["parameters"]["required"] == ["expression"]
        call = {"function": {"name": "calculate", "arguments": {"expression": expression}}}
        turn = await environment.step({"content": "", "tool_calls": [call]})
        assert turn.messages[0]["content"] == answer
        said = [{"content": text} for text in ("So $1,060.", "It is 60", "none")]
        return [(await environment.step(reply)).reward for reply in said]

    assert asyncio.run(episode()) == [1.0, 0.0, 0.0]
