"""OpenAI's messages, tools and prompts, checked before the engine sees them."""

import json
from typing import Any

from .body import check_unicode
from .fields import known, refuse, text
from .messages import MOST_MESSAGES, MOST_TOOLS, check_schema, in_order_of_calls

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def messages(value: Any) -> list[dict[str, Any]]:
    """Chat messages with plain text as content, results of tools in the order of their calls. Raises RequestError
    naming message and field.
    """
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise refuse("messages", f"a list of 1 to {MOST_MESSAGES} messages expected")
    return in_order_of_calls([(f"messages[{i}]", _message(f"messages[{i}]", item)) for i, item in enumerate(value)])


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refuse(where, "an object expected")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise refuse(f"{where}.role", f"one of {', '.join(ROLES)} expected")
    content = message.get("content")
    if content is None and role != "assistant":
        raise refuse(f"{where}.content", "text expected, nothing found")
    result = {"role": ROLES[role], "content": _content(f"{where}.content", content)}
    if role == "assistant":
        return result | _answer(where, message)
    if role == "tool":
        known(where, message, "role", "content", "tool_call_id", "name")
        for name in ("tool_call_id", "name"):
            if message.get(name) is not None or name == "tool_call_id":
                result[name] = text(f"{where}.{name}", message.get(name))
    else:
        known(where, message, "role", "content")
    return result


def _answer(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """What an assistant's message has beside its content."""
    unsupported = ("refusal", "annotations", "audio", "function_call")
    known(where, message, "role", "content", "tool_calls", "reasoning", "reasoning_content", *unsupported)
    for name in unsupported:
        if message.get(name):  # clients send back what they got: an empty list, for one
            raise refuse(f"{where}.{name}", "not supported")
    result: dict[str, Any] = {}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning is not None:
        result["reasoning_content"] = result["reasoning"] = text(f"{where}.reasoning_content", reasoning)
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise refuse(f"{where}.tool_calls", "a list expected")
    if calls:
        result["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
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
        known(f"{where}[{i}]", part, "type", "text", "cache_control")
        parts.append(text(f"{where}[{i}].text", part.get("text")))
    return "".join(parts)


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise refuse(where, "an object with function expected")
    known(where, call, "id", "type", "function", "index")
    known(f"{where}.function", function, "name", "arguments")
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


def tools(value: Any) -> list[dict[str, Any]] | None:
    """Function tools; None where there are none."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise refuse("tools", f"a list of at most {MOST_TOOLS} tools expected")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise refuse(f"tools[{i}]", "a tool of type function expected")
        known(f"tools[{i}]", tool, "type", "function", "cache_control")
        _function(f"tools[{i}].function", function)
    return value


def _function(where: str, function: dict[str, Any]) -> None:
    known(where, function, "name", "description", "parameters", "strict")
    if not text(f"{where}.name", function.get("name")):
        raise refuse(f"{where}.name", "a name expected")
    text(f"{where}.description", function.get("description") or "")
    if function.get("strict") not in (None, False):
        raise refuse(f"{where}.strict", "not supported")
    check_schema(f"{where}.parameters", function.get("parameters"))


def prompt(value: Any, vocab_size: int) -> str | list[int]:
    """A text completion's prompt: one text, or one list of token ids."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return text("prompt", value)
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item < vocab_size for item in value):
        return value
    raise refuse("prompt", "one text that is not empty, or one list of token ids, expected")
