"""An agent on the `openai` client, which knows nothing of torchrft."""

import asyncio
import json

from openai import AsyncOpenAI, OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "increment",
        "description": "Adds to the count.",
        "parameters": {
            "type": "object",
            "properties": {"by": {"type": "integer"}},
            "required": ["by"],
        },
    },
}


def run(row, base_url, api_key):
    """Answers calls of the tool, at most twice; the reward is how near the count is."""
    target = row["target"]
    client = OpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": f" Count to {target}."}]
    total = 0
    for _ in range(3):
        reply = client.chat.completions.create(model="any", messages=messages, tools=[TOOL])
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            total += json.loads(call.function.arguments)["by"]
            answer = {"role": "tool", "tool_call_id": call.id, "content": str(total)}
            messages.append(answer)
    return 1.0 if total == target else total / 10


async def faulty(row, base_url, api_key):
    """Raises on every third row, never ends on another third; else the endpoint gets the reward."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    message = {"role": "user", "content": "?"}
    reply = await client.chat.completions.create(model="any", messages=[message])
    if row["target"] == 2:
        raise RuntimeError("a bad agent")
    while row["target"] == 3:
        await asyncio.sleep(0.1)
    await client.post(
        "/reward", body={"reward": len(reply.choices[0].message.content) % 5}, cast_to=object
    )
