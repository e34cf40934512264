"""Anthropic's `/v1/messages`: its requests become chat requests, our answers become its blocks and events."""

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from .completion import Delta
from .errors import RequestError
from .fields import boolean, integer, number, refuse, stop, text

_PLAIN = {
    "model": text,
    "max_tokens": integer(1, 10_000_000),
    "temperature": number(0, 1),
    "top_p": number(0, 1),
    "top_k": integer(0, 1_000_000),
    "stream": boolean,
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def as_chat(body: dict, counting: bool = False) -> dict:
    """The body of the chat completion that a message request amounts to, or of one whose tokens are only to be
    counted. Raises RequestError naming the field.
    """
    chat: dict[str, Any] = {}
    for name in ("messages",) if counting else ("max_tokens", "messages"):
        if body.get(name) is None:
            raise refuse(name, "expected, nothing found")
    messages = [] if body.get("system") is None else [{"role": "system", "content": _text("system", body["system"])}]
    for name, value in body.items():
        if value is None or name == "system":
            continue
        if name in _PLAIN:
            chat[name] = _PLAIN[name](name, value)
        elif name == "messages":
            if not isinstance(value, list):
                raise refuse(name, "a list expected")
            for i, message in enumerate(value):
                messages += _message(f"messages[{i}]", message)
        elif name == "stop_sequences":
            chat["stop"] = stop(name, value)
        elif name == "tools":
            chat["tools"] = _tools(value)
        elif name == "tool_choice":
            chat |= _tool_choice(value)
        elif name == "thinking":
            kind = value.get("type") if isinstance(value, dict) else None
            if kind not in ("enabled", "disabled", "adaptive"):
                raise refuse(name, "type enabled or disabled expected")
            chat["chat_template_kwargs"] = {"enable_thinking": kind != "disabled"}
        elif name == "metadata":
            chat["metadata"] = value
        else:
            raise refuse(name[:64], "this server has no such field", code="unsupported_parameter")
    return chat | {"messages": messages}


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return text(where, content)
    if not isinstance(content, list):
        raise refuse(where, "text or a list of text blocks expected")
    parts = []
    for i, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise refuse(f"{where}[{i}]", "only blocks of type text are supported")
        parts.append(text(f"{where}[{i}].text", block.get("text")))
    return "".join(parts)


def _message(where: str, message: Any) -> list[dict]:
    """A message's chat messages: results of tools are messages of their own there."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise refuse(f"{where}.role", "user or assistant expected")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": text(f"{where}.content", content)}]
    if not isinstance(content, list):
        raise refuse(f"{where}.content", "text or a list of blocks expected")
    texts, calls, thoughts, results = [], [], [], []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(text(f"{at}.text", block.get("text")))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": text(f"{at}.id", block.get("id")), "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(text(f"{at}.thinking", block.get("thinking")))
        elif kind == "tool_result" and role == "user":
            results.append({"role": "tool", "content": _text(f"{at}.content", block.get("content") or "")})
        else:
            raise refuse(at, f"blocks of type {str(kind)[:40]!r} are not supported here")
    result = {"role": role, "content": "".join(texts)}
    if calls:
        result["tool_calls"] = calls
    if thoughts:
        result["reasoning_content"] = "".join(thoughts)
    return results if results and not texts else [*results, result]


def _tools(value: Any) -> list[dict]:
    if not isinstance(value, list):
        raise refuse("tools", "a list expected")
    tools = []
    for i, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
            raise refuse(f"tools[{i}]", "only tools with a schema of their own are supported")
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        tools.append({"type": "function", "function": function | {"description": tool.get("description") or ""}})
    return tools


def _tool_choice(value: Any) -> dict:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("auto", "none", "any", "tool"):
        raise refuse("tool_choice", "type auto, any, tool or none expected")
    alone = boolean("tool_choice.disable_parallel_tool_use", value.get("disable_parallel_tool_use", False))
    if kind == "tool":
        named = {"name": text("tool_choice.name", value.get("name"))}
        return {"tool_choice": {"type": "function", "function": named}, "parallel_tool_calls": not alone}
    return {"tool_choice": "required" if kind == "any" else kind, "parallel_tool_calls": not alone}


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
