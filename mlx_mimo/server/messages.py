"""Messages, prompts and tools of a request, checked before the generation thread sees them."""

import json
from typing import Any

from .body import check_unicode
from .fields import refuse, text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_MESSAGES = 2000
MOST_TOOLS = 256


def messages(value: Any) -> list[dict]:
    """Chat messages with plain text as content. Raises RequestError naming message and field."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise refuse("messages", f"a list of 1 to {MOST_MESSAGES} messages expected")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, message: Any) -> dict:
    if not isinstance(message, dict):
        raise refuse(where, "an object expected")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refuse(f"{where}.role", f"one of {', '.join(ROLES)} expected")
    known = {"role", "content", "name"}
    result = {"role": ROLES[role]}
    if role == "assistant":
        known |= {"tool_calls", "reasoning", "reasoning_content", "refusal", "annotations", "audio", "function_call"}
        for name in ("refusal", "annotations", "audio", "function_call"):
            if message.get(name):
                raise refuse(f"{where}.{name}", "not supported")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning is not None:
            result["reasoning_content"] = result["reasoning"] = text(f"{where}.reasoning_content", reasoning)
        calls = message.get("tool_calls")
        if calls is not None:
            if not isinstance(calls, list):
                raise refuse(f"{where}.tool_calls", "a list expected")
            if calls:
                result["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    elif role == "tool":
        known |= {"tool_call_id"}
    for name in message.keys() - known:
        raise refuse(f"{where}.{name[:64]}", "this server has no such field", code="unsupported_parameter")
    content = message.get("content")
    if content is None and role != "assistant":
        raise refuse(f"{where}.content", "text expected, nothing found")
    result["content"] = _content(f"{where}.content", content)
    return result


def _content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return text(where, content)
    if not isinstance(content, list):
        raise refuse(where, "text or a list of text parts expected")
    parts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise refuse(f"{where}[{i}]", "only parts of type text are supported")
        parts.append(text(f"{where}[{i}].text", part.get("text")))
    return "".join(parts)


def _call(where: str, call: Any) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise refuse(where, "an object with function expected")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise refuse(f"{where}.function.arguments", "not JSON") from None
        check_unicode(arguments, f"{where}.function.arguments")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise refuse(f"{where}.function.arguments", "a JSON object expected")
    function = {"name": text(f"{where}.function.name", function.get("name")), "arguments": arguments}
    return {"type": "function", "id": text(f"{where}.id", call.get("id", "")), "function": function}


def tools(value: Any) -> list[dict] | None:
    """Function tools; None where there are none."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise refuse("tools", f"a list of at most {MOST_TOOLS} tools expected")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise refuse(f"tools[{i}]", "a tool of type function expected")
        if not text(f"tools[{i}].function.name", function.get("name")):
            raise refuse(f"tools[{i}].function.name", "a name expected")
        if function.get("strict"):
            raise refuse(f"tools[{i}].function.strict", "not supported")
        parameters = function.get("parameters")
        if parameters is None:
            continue
        properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(item, dict) for item in properties.values()):
            raise refuse(f"tools[{i}].function.parameters", "a JSON schema of type object expected")
    return value


def prompt(value: Any, vocab_size: int) -> str | list[int]:
    """A text completion's prompt: one text, or one list of token ids."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return text("prompt", value)
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item < vocab_size for item in value):
        return value
    raise refuse("prompt", "one text that is not empty, or one list of token ids, expected")
