"""Tools from plain functions, and an environment whose turns are calls of them."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from pydantic import PydanticUserError, TypeAdapter, ValidationError, validate_call

from torchrft.environments.protocol import Message, Opening, ToolSpec, Turn
from torchrft.tools import payload

Tool = Callable[..., Any]
_SECTION = re.compile(
    r"^\s*(?:Args|Arguments|Parameters|Returns|Raises|Yields|Examples?):\s*$", re.M
)
_LONGEST_FAULT = 400  # characters that the policy sees of an exception


def tool_spec(function: Tool) -> ToolSpec:
    """A tool as chat templates take it: from a function's signature and docstring.

    The docstring's lines under "Args:" describe the parameters. Raises ValueError for a function
    without docstring, and for a parameter without type or of a type that JSON has not.

    >>> def add(a: int, b: int = 1) -> int:
    ...     '''Adds two numbers.'''
    >>> tool_spec(add)["function"]["parameters"]["required"]
    ['a']
    """
    name = getattr(function, "__name__", repr(function))
    text = inspect.getdoc(function)
    if not text:
        raise ValueError(f"tool {name!r} has no docstring: say there what it does, for the policy")
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name!r}: {str(parameter)!r} has no name that a call can give")
        if parameter.annotation is parameter.empty:
            raise ValueError(f"tool {name!r}: its parameter {parameter.name!r} has no type")
    try:
        schema = TypeAdapter(cast(Any, function)).json_schema()
    except (PydanticUserError, NameError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"tool {name!r}: JSON has no such type: {why}") from None
    description, *sections = _SECTION.split(text)
    words = dict(re.findall(r"^\s*(\w+)[^:\n]*:\s*(.+)$", "\n".join(sections[::-1]), re.M))
    for key, entry in schema["properties"].items():
        entry.pop("title", None)  # pydantic's, which repeats the name
        entry |= {"description": words[key].strip()} if key in words else {}
    function_spec = {"name": name, "description": description.strip(), "parameters": schema}
    return {"type": "function", "function": function_spec}


class ToolEnvironment:
    """Executes the calls of each reply; done when the policy replies without one.

    `begin(row)` may return text for the first user message, `reward(row, messages)` judges the
    whole conversation at its end, and `end()` gives back what the episode holds. The errors of a
    tool, and calls that cannot be read, are told to the policy. Functions may be async.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        reward: Callable[..., Any],
        begin: Callable[[Mapping[str, Any]], Any] = lambda row: None,
        end: Callable[[], Any] = lambda: None,
    ) -> None:
        self.specs = tuple(tool_spec(tool) for tool in tools)
        self.tools = {tool.__name__: validate_call(tool) for tool in tools}
        self.reward, self.begin, self.close = reward, begin, end
        self.row: Mapping[str, Any] = {}
        self.messages: list[Message] = []

    @classmethod
    def of(cls, holder: Any) -> "ToolEnvironment":
        """From an object in TRL's style: reset(**row), get_reward(), public methods as tools.

        `get_reward` may have the parameters `row` and `messages`, and `reset` some columns only.
        """
        methods = {"reset", "get_reward", "close"}
        names = [name for name in dir(type(holder)) if name[0] != "_" and name not in methods]
        tools = [getattr(holder, name) for name in names if callable(getattr(type(holder), name))]
        return cls(
            tools,
            reward=partial(call_with, holder.get_reward),
            begin=lambda row: call_with(holder.reset, **row),
            end=getattr(holder, "close", lambda: None),
        )

    async def reset(self, row: Mapping[str, Any], seed: int) -> Opening:
        """The row's prompt, messages or text, with what `begin` adds to it."""
        self.row = row
        observation = await resolved(self.begin(row))
        prompt = row.get("prompt") or []
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if observation and messages and messages[-1]["role"] == "user":
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + str(observation)}
        elif observation:
            messages.append({"role": "user", "content": str(observation)})
        if not messages:
            raise ValueError('there is no first message: neither a column "prompt" nor from reset')
        self.messages = [*messages]
        return Opening(tuple(messages), self.specs)

    async def step(self, reply: Message) -> Turn:
        """What the called tools return, as messages of the role tool; else the reward."""
        self.messages.append(reply)
        answers = [await self._answer(call) for call in reply.get("tool_calls") or ()]
        if fault := reply.get("fault"):
            # It belongs to no call, and templates take tool messages only for calls.
            answers.append({"role": "user", "content": f"error: {fault}"})
        if not answers:
            return Turn(
                reward=await resolved(self.reward(row=self.row, messages=self.messages)), done=True
            )
        self.messages += answers
        return Turn(tuple(answers))

    async def _answer(self, call: Mapping[str, Any]) -> Message:
        function = call.get("function", call)
        name = str(function.get("name"))
        message = {"role": "tool", "name": name, "content": await self._call(name, function)}
        return message | ({"tool_call_id": call["id"]} if "id" in call else {})

    async def _call(self, name: str, function: Mapping[str, Any]) -> str:
        if name not in self.tools:
            return f"error: there is no tool {name!r}; the tools are {', '.join(self.tools)}"
        arguments = function.get("arguments") or {}
        try:
            if isinstance(arguments, str):
                arguments = payload.parse(arguments.encode())
            if not isinstance(arguments, Mapping):
                return f"error: the arguments of {name} must be an object"
            value = await resolved(self.tools[name](**arguments))
            return value if isinstance(value, str) else json.dumps(value, default=str)
        except ValidationError as error:
            wrong = error.errors()[0]
            return f"error: {'.'.join(map(str, wrong['loc']))}: {wrong['msg'].lower()}"
        except MemoryError:
            raise
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"[:_LONGEST_FAULT]


async def resolved(value: Any) -> Any:
    """The value, awaited where it must be."""
    return await value if inspect.isawaitable(value) else value


def call_with(function: Tool, /, *positional: Any, **values: Any) -> Any:
    """Calls a function with those of the named values that it has parameters for."""
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        values = {name: value for name, value in values.items() if name in parameters}
    return function(*positional, **values)
