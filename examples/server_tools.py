"""Lets the served model call a Python function: `python examples/server_tools.py "What is 17 times 4?"`."""

import json
import os
import sys

import openai

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "the product of two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
FUNCTIONS = {"multiply": lambda a, b: a * b}
MOST_ROUNDS = 5

client = openai.OpenAI(
    base_url=os.environ.get("MLX_MIMO_URL", "http://127.0.0.1:8080/v1"),
    api_key=os.environ.get("MLX_MIMO_API_KEY", "none"),
)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": " ".join(sys.argv[1:]) or "What is 17 times 4?"}]
for _ in range(MOST_ROUNDS):
    answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=512)
    message = answer.choices[0].message
    if not message.tool_calls:
        print(message.content)
        break
    messages.append(message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
    for call in message.tool_calls:
        try:
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
        except (KeyError, TypeError) as error:
            result = f"error: {error!r}"
        print(f"[{call.function.name}({call.function.arguments}) = {result}]", file=sys.stderr)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
