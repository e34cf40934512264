"""A tool call and its result: the model asks for a function, we run it, the model answers.

`python examples/chat_with_tools.py [DIR_OR_REPO]`. A small model may answer without a call.
"""

import json
import operator
import re
import sys

from mlx_mimo import load, stream_generate


def calculate(expression: str) -> int:
    """One operation on two whole numbers; never `eval` what a model writes."""
    left, sign, right = expression.split()
    return {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](int(left), int(right))


def tool(name: str, description: str, parameter: str, what: str) -> dict:
    properties = {parameter: {"type": "string", "description": what}}
    schema = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


FUNCTIONS = {"calculate": calculate, "get_time": lambda city: "12:30"}
TOOLS = [
    tool("calculate", "Exact arithmetic", "expression", "Expression"),
    tool("get_time", "Current time in a city", "city", "Name of the city"),
]
CALL = re.compile(r"<tool_call>\s*<function=(\w+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=(\w+)>\s*(.*?)\s*</parameter>", re.DOTALL)

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else None)


def answer(messages: list[dict]) -> str:
    prompt = tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, enable_thinking=False)
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=96))


messages = [{"role": "user", "content": "What is 4218 - 4176?"}]
text = answer(messages)
calls = CALL.findall(text)
if not calls:
    print("no tool call:", text)
for name, body in calls:
    arguments = dict(PARAMETER.findall(body))
    print(f"the model calls {name}({arguments})")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    try:
        result = FUNCTIONS[name](**arguments)
    except (KeyError, TypeError, ValueError) as error:
        result = f"error: {error!r}"  # the model is told, and may try again
    messages.append({"role": "tool", "content": json.dumps(result)})
if calls:
    print("answer:", answer(messages))
if model.residency:
    model.residency.close()
