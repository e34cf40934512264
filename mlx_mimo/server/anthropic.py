"""Anthropic's `/v1/messages`: its requests become chat requests, our answers become its blocks and events."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .completion import Delta
from .errors import RequestError
from .fields import Check, boolean, integer, known, label, number, only, refuse, stop, text
from .messages import check_schema, in_order_of_calls

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def as_chat(body: dict, counting: bool = False) -> tuple[dict, str]:
    """The body of the chat completion that a message request amounts to, or of one whose tokens are only to be
    counted, and the text with which the answer is to begin. Raises RequestError naming the field.
    """
    for name in ("messages",) if counting else ("max_tokens", "messages"):
        if body.get(name) is None:
            raise refuse(name, "expected, nothing found")
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in _FIELDS:
            raise refuse(name[:64], "this server has no such field", code="unsupported_parameter")
        chat |= _FIELDS[name](name, value)
    begun = _begun(chat, len(body["messages"]) - 1)
    chat["messages"] = chat.pop("system", []) + chat["messages"]
    return chat, begun


def _begun(chat: dict, last: int) -> str:
    """The text of a last message of the assistant's, which leaves the messages."""
    if not chat["messages"] or chat["messages"][-1]["role"] != "assistant":
        return ""
    message = chat["messages"].pop()
    if message.keys() - {"role", "content"}:
        raise refuse(f"messages[{last}].content", "an answer that is to be continued may be text alone")
    if chat.get("reasoning_effort", "none") != "none":
        raise refuse("thinking", "disabled expected: the last message begins the answer, after any thoughts")
    return message["content"]


def _same(check: Check) -> Callable[[str, Any], dict]:
    return lambda name, value: {name: check(name, value)}


def _nothing(check: Check) -> Callable[[str, Any], dict]:
    """A field that has no effect on the answer."""

    def checked(name: str, value: Any) -> dict:
        check(name, value)
        return {}

    return checked


def _system(name: str, value: Any) -> dict:
    return {"system": [{"role": "system", "content": _text(name, value)}]}


def _messages(name: str, value: Any) -> dict:
    if not isinstance(value, list):
        raise refuse(name, "a list expected")
    named = [pair for i, message in enumerate(value) for pair in _message(f"{name}[{i}]", message)]
    return {name: in_order_of_calls(named, "tool_use_id")}


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return text(where, content)
    if not isinstance(content, list):
        raise refuse(where, "text or a list of text blocks expected")
    parts = []
    for i, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise refuse(f"{where}[{i}]", "only blocks of type text are supported")
        parts.append(_text_block(f"{where}[{i}]", block))
    return "".join(parts)


def _text_block(at: str, block: dict) -> str:
    known(at, block, "type", "text", "cache_control", "citations")
    return text(f"{at}.text", block.get("text"))


def _message(where: str, message: Any) -> list[tuple[str, dict]]:
    """A message's chat messages, each with its place: results of tools are messages of their own there."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise refuse(f"{where}.role", "user or assistant expected")
    known(where, message, "role", "content")
    content = message.get("content")
    if isinstance(content, str):
        return [(where, {"role": role, "content": text(f"{where}.content", content)})]
    if not isinstance(content, list):
        raise refuse(f"{where}.content", "text or a list of blocks expected")
    texts, calls, thoughts, results = [], [], [], []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text_block(at, block))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_tool_use(at, block))
        elif kind == "thinking" and role == "assistant":
            known(at, block, "type", "thinking", "signature")
            thoughts.append(text(f"{at}.thinking", block.get("thinking")))
        elif kind == "tool_result" and role == "user":
            results.append((at, _tool_result(at, block)))
        else:
            raise refuse(at, f"blocks of type {str(kind)[:40]!r} are not supported here")
    result = {"role": role, "content": "".join(texts)}
    if calls:
        result["tool_calls"] = calls
    if thoughts:
        result["reasoning_content"] = "".join(thoughts)
    return results if results and not texts else [*results, (where, result)]


def _tool_use(at: str, block: dict) -> dict:
    known(at, block, "type", "id", "name", "input", "cache_control", "caller")
    arguments = {} if block.get("input") is None else block["input"]
    if not isinstance(arguments, dict):
        raise refuse(f"{at}.input", "an object expected")
    function = {"name": text(f"{at}.name", block.get("name")), "arguments": arguments}
    return {"id": text(f"{at}.id", block.get("id")), "type": "function", "function": function}


def _tool_result(at: str, block: dict) -> dict:
    known(at, block, "type", "tool_use_id", "content", "is_error", "cache_control")
    content = _text(f"{at}.content", block.get("content") or "")
    if boolean(f"{at}.is_error", block.get("is_error") or False):
        content = f"error: {content}"  # chat messages have no other way to say so
    return {"role": "tool", "tool_call_id": text(f"{at}.tool_use_id", block.get("tool_use_id")), "content": content}


def _tools(name: str, value: Any) -> dict:
    if not isinstance(value, list):
        raise refuse(name, "a list expected")
    return {name: [_tool(f"{name}[{i}]", tool) for i, tool in enumerate(value)]}


def _tool(at: str, tool: Any) -> dict:
    if not isinstance(tool, dict) or (tool.get("type") or "custom") != "custom":
        raise refuse(at, "only tools with a schema of their own are supported")
    known(at, tool, "type", "name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming")
    only(False)(f"{at}.strict", tool.get("strict") or False)
    check_schema(f"{at}.input_schema", tool.get("input_schema"))
    if not text(f"{at}.name", tool.get("name")):
        raise refuse(f"{at}.name", "a name expected")
    function = {"name": tool["name"], "parameters": tool.get("input_schema")}
    described = text(f"{at}.description", tool.get("description") or "")
    return {"type": "function", "function": function | {"description": described}}


def _tool_choice(name: str, value: Any) -> dict:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("auto", "none", "any", "tool"):
        raise refuse(name, "type auto, any, tool or none expected")
    known(name, value, "type", "disable_parallel_tool_use", *(("name",) if kind == "tool" else ()))
    alone = boolean(f"{name}.disable_parallel_tool_use", value.get("disable_parallel_tool_use") or False)
    if kind == "tool":
        named = {"name": text(f"{name}.name", value.get("name"))}
        return {"tool_choice": {"type": "function", "function": named}, "parallel_tool_calls": not alone}
    return {"tool_choice": "required" if kind == "any" else kind, "parallel_tool_calls": not alone}


def _thinking(name: str, value: Any) -> dict:
    """Its budget is checked, and no limit of its own: max_tokens bounds thoughts and answer together."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise refuse(name, "type enabled, adaptive or disabled expected")
    known(name, value, "type", *{"enabled": ("budget_tokens", "display"), "adaptive": ("display",)}.get(kind, ()))
    only("summarized")(f"{name}.display", value.get("display") or "summarized")  # thoughts are never left out
    if value.get("budget_tokens") is not None:
        integer(1, 10_000_000)(f"{name}.budget_tokens", value["budget_tokens"])
    return {"reasoning_effort": "none" if kind == "disabled" else "medium"}


_FIELDS: dict[str, Callable[[str, Any], dict]] = {
    "model": _same(text),
    "max_tokens": _same(integer(1, 10_000_000)),
    "temperature": _same(number(0, 1)),
    "top_p": _same(number(0, 1)),
    "top_k": _same(integer(0, 1_000_000)),
    "stream": _same(boolean),
    "stop_sequences": lambda name, value: {"stop": stop(name, value)},
    "system": _system,
    "messages": _messages,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "thinking": _thinking,
    "metadata": _nothing(label),
    "cache_control": _nothing(label),
    "service_tier": _nothing(only("auto", "standard_only")),
}


def usage(prompt_tokens: int, cached_tokens: int, tokens: int) -> dict:
    """Anthropic counts what came from the cache apart from the rest of the prompt."""
    return {
        "input_tokens": prompt_tokens - max(0, cached_tokens),
        "cache_read_input_tokens": max(0, cached_tokens),
        "cache_creation_input_tokens": 0,
        "output_tokens": tokens,
    }


def ending(delta: Delta) -> dict:
    if delta.stop_word is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_word}
    return {"stop_reason": _REASONS[delta.finish_reason], "stop_sequence": None}


def empty_message(model: str, used: dict) -> dict:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": used,
    }


def _blocks(delta: Delta) -> Iterator[tuple[str, dict, dict]]:
    """(kind, the block when it begins, what is added to it) of a token's part."""
    if delta.reasoning:
        begun = {"type": "thinking", "thinking": "", "signature": ""}
        yield "thinking", begun, {"type": "thinking_delta", "thinking": delta.reasoning}
    if delta.content:
        yield "text", {"type": "text", "text": ""}, {"type": "text_delta", "text": delta.content}
    for call in delta.tool_calls:
        begun = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}
        yield "tool_use", begun, {"type": "input_json_delta", "partial_json": call["arguments"]}


def events(parts: Iterable[Delta], message: dict, prompt_tokens: int, cached_tokens: int) -> Iterator[dict]:
    """The events of a streamed message."""
    yield {"type": "message_start", "message": message}
    index, present, tokens, last = -1, None, 0, None
    for last in parts:
        tokens += 1
        for kind, begun, added in _blocks(last):
            if kind != present or kind == "tool_use":
                if present is not None:
                    yield {"type": "content_block_stop", "index": index}
                index, present = index + 1, kind
                yield {"type": "content_block_start", "index": index, "content_block": begun}
            yield {"type": "content_block_delta", "index": index, "delta": added}
    if present is not None:
        yield {"type": "content_block_stop", "index": index}
    used = usage(prompt_tokens, cached_tokens, tokens)
    yield {"type": "message_delta", "delta": ending(last or Delta(finish_reason="stop")), "usage": used}
    yield {"type": "message_stop"}


def whole(parts: Iterable[Delta], message: dict, prompt_tokens: int, cached_tokens: int) -> dict:
    """The same message in one piece."""
    content: list[dict] = []
    for event in events(parts, message, prompt_tokens, cached_tokens):
        if event["type"] == "content_block_start":
            content.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            added, block = event["delta"], content[-1]
            if added["type"] == "input_json_delta":
                block["input"] = json.loads(added["partial_json"])
            else:
                key = "text" if added["type"] == "text_delta" else "thinking"
                block[key] += added[key]
        elif event["type"] == "message_delta":
            message = message | event["delta"] | {"usage": event["usage"]}
    return message | {"content": content}


def error_body(error: RequestError) -> bytes:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    kind = "overloaded_error" if error.status == 503 else kind
    return json.dumps({"type": "error", "error": {"type": kind, "message": str(error)}}).encode()
