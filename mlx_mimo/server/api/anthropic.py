"""Anthropic's `/v1/messages`: its fields and blocks, and answers whole or as its events."""

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..engine.request import Chat, GenerationRequest
from ..errors import RequestError
from . import tool_choice
from .deltas import Delta
from .fields import (
    MOST_TOKENS,
    Check,
    boolean,
    integer,
    known,
    label,
    number,
    only,
    read,
    refuse,
    stop,
    text,
    unchecked,
)
from .messages import MOST_MESSAGES, MOST_TOOLS, check_schema, in_order_of_calls
from .protocol import KEEP_ALIVE, Choice, event
from .request import CompletionRequest, answer_grammar, check_model, sampling, variables
from .served_model import ServedModel
from .tool_choice import ToolChoice

_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages:
    """`/v1/messages`, and the counting of their tokens."""

    def parse(self, body: dict[str, Any], served: ServedModel) -> CompletionRequest:
        """Raises RequestError naming the field at fault."""
        values = _read(body, ("max_tokens", "messages"), served)
        chat, tools = _chat(values, served)
        generation = GenerationRequest(
            prompt=chat,
            sampling=sampling(values, served),
            max_tokens=values["max_tokens"],
            grammar=answer_grammar(None, tools, chat.variables, served),
        )
        return CompletionRequest(
            model=served.name,
            generation=generation,
            tools=tools,
            stop=tuple(values.get("stop_sequences", ())),
            stream=values.get("stream", False),
        )

    def prompt_to_count(self, body: dict[str, Any], served: ServedModel) -> Chat:
        """The prompt of a message whose tokens are to be counted. Raises RequestError."""
        return _chat(_read(body, ("messages",), served), served)[0]

    def whole(self, request: CompletionRequest, choices: Iterable[Choice], served: ServedModel) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        message: dict[str, Any] = {}
        for one in _events(request, choices):
            if one is None:
                continue
            kind = one["type"]
            if kind == "message_start":
                message = one["message"]
            elif kind == "content_block_start":
                content.append(dict(one["content_block"]))
            elif kind == "content_block_delta":
                _extend(content[-1], one["delta"])
            elif kind == "message_delta":
                message |= one["delta"] | {"usage": one["usage"]}
        return message | {"content": content}

    def stream(self, request: CompletionRequest, choices: Iterable[Choice], served: ServedModel) -> Iterator[bytes]:
        for one in _events(request, choices):
            yield KEEP_ALIVE if one is None else event(json.dumps(one).encode(), one["type"])

    def error_body(self, error: RequestError) -> bytes:
        kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": str(error)}}).encode()

    def error_event(self, error: RequestError) -> bytes:
        return event(self.error_body(error), "error")


def _read(body: dict[str, Any], required: tuple[str, ...], served: ServedModel) -> dict[str, Any]:
    for name in required:
        if body.get(name) is None:
            raise refuse(name, "expected, nothing found")
    values = read(body, _FIELDS)
    check_model(values.get("model", served.name), served)
    return values


def _chat(values: dict[str, Any], served: ServedModel) -> tuple[Chat, ToolChoice]:
    """The prompt, and what tools may be called. Raises RequestError."""
    messages = _messages("messages", values["messages"])
    effort = values.get("thinking")
    continued = _continued(messages, len(values["messages"]) - 1, effort)
    if "system" in values:
        messages.insert(0, {"role": "system", "content": values["system"]})
    if not messages:
        raise refuse("messages", "a message of the user's expected")
    choice = values.get("tool_choice", _Choice())
    tools = tool_choice.read(values.get("tools") or None, choice.chosen, choice.parallel)
    chosen = variables({}, effort, "thinking", served)
    if continued:  # it comes after any thoughts
        chosen["enable_thinking"] = False
    return Chat(messages, tools.tools, chosen, continued), tools


def _continued(messages: list[dict[str, Any]], last: int, effort: str | None) -> str:
    """The text of a last message of the assistant's, number `last`, which leaves the messages."""
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    message = messages.pop()
    if message.keys() - {"role", "content"}:
        raise refuse(f"messages[{last}].content", "an answer that is to be continued may be text alone")
    if effort not in (None, "none"):
        raise refuse("thinking", "disabled expected: the last message begins the answer, after any thoughts")
    return message["content"]


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise refuse(name, "a list expected")
    if not 0 < len(value) <= MOST_MESSAGES:
        raise refuse(name, f"a list of 1 to {MOST_MESSAGES} messages expected")
    named = [pair for i, message in enumerate(value) for pair in _message(f"{name}[{i}]", message)]
    return in_order_of_calls(named, "tool_use_id")


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


def _text_block(at: str, block: dict[str, Any]) -> str:
    known(at, block, "type", "text", "cache_control", "citations")
    return text(f"{at}.text", block.get("text"))


def _message(where: str, message: Any) -> list[tuple[str, dict[str, Any]]]:
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


def _tool_use(at: str, block: dict[str, Any]) -> dict[str, Any]:
    known(at, block, "type", "id", "name", "input", "cache_control", "caller")
    arguments = {} if block.get("input") is None else block["input"]
    if not isinstance(arguments, dict):
        raise refuse(f"{at}.input", "an object expected")
    function = {"name": text(f"{at}.name", block.get("name")), "arguments": arguments}
    return {"id": text(f"{at}.id", block.get("id")), "type": "function", "function": function}


def _tool_result(at: str, block: dict[str, Any]) -> dict[str, Any]:
    known(at, block, "type", "tool_use_id", "content", "is_error", "cache_control")
    content = _text(f"{at}.content", block.get("content") or "")
    if boolean(f"{at}.is_error", block.get("is_error") or False):
        content = f"error: {content}"  # chat messages have no other way to say so
    return {"role": "tool", "tool_call_id": text(f"{at}.tool_use_id", block.get("tool_use_id")), "content": content}


def _tools(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise refuse(name, f"a list of at most {MOST_TOOLS} tools expected")
    return [_tool(f"{name}[{i}]", tool) for i, tool in enumerate(value)]


def _tool(at: str, tool: Any) -> dict[str, Any]:
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


@dataclass(frozen=True)
class _Choice:
    """`tool_choice` in OpenAI's form, and whether calls may be parallel."""

    chosen: str | dict[str, Any] | None = None
    parallel: bool = True


def _tool_choice(name: str, value: Any) -> _Choice:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("auto", "none", "any", "tool"):
        raise refuse(name, "type auto, any, tool or none expected")
    known(name, value, "type", "disable_parallel_tool_use", *(("name",) if kind == "tool" else ()))
    alone = boolean(f"{name}.disable_parallel_tool_use", value.get("disable_parallel_tool_use") or False)
    if kind == "tool":
        named = {"name": text(f"{name}.name", value.get("name"))}
        return _Choice({"type": "function", "function": named}, not alone)
    return _Choice("required" if kind == "any" else kind, not alone)


def _thinking(name: str, value: Any) -> str:
    """An effort as OpenAI names it. The budget is checked, and is no limit of its own: max_tokens bounds thoughts and
    answer together.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise refuse(name, "type enabled, adaptive or disabled expected")
    known(name, value, "type", *{"enabled": ("budget_tokens", "display"), "adaptive": ("display",)}.get(kind, ()))
    only("summarized")(f"{name}.display", value.get("display") or "summarized")  # thoughts are never left out
    if value.get("budget_tokens") is not None:
        integer(1, 10_000_000)(f"{name}.budget_tokens", value["budget_tokens"])
    return "none" if kind == "disabled" else "medium"


_FIELDS: dict[str, Check] = {
    "model": text,
    "max_tokens": integer(1, MOST_TOKENS),
    "temperature": number(0, 1),
    "top_p": number(0, 1),
    "top_k": integer(0, 1_000_000),
    "stream": boolean,
    "stop_sequences": stop,
    "system": _text,
    "messages": unchecked,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "thinking": _thinking,
    "metadata": label,
    "cache_control": label,
    "service_tier": only("auto", "standard_only"),
}


def _usage(choice: Choice, tokens: int) -> dict[str, int]:
    """Anthropic counts what came from the cache apart from the rest of the prompt."""
    return {
        "input_tokens": choice.prompt_tokens - choice.cached_tokens,
        "cache_read_input_tokens": choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": tokens,
    }


def _ending(delta: Delta) -> dict[str, Any]:
    if delta.stop_word is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_word}
    return {"stop_reason": _REASONS.get(delta.finish_reason or "", "end_turn"), "stop_sequence": None}


def _empty_message(model: str, used: dict[str, int]) -> dict[str, Any]:
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


def _blocks(delta: Delta) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(kind, the block when it begins, what is added to it) of a token's part."""
    if delta.reasoning:
        begun: dict[str, Any] = {"type": "thinking", "thinking": "", "signature": ""}
        yield "thinking", begun, {"type": "thinking_delta", "thinking": delta.reasoning}
    if delta.content:
        yield "text", {"type": "text", "text": ""}, {"type": "text_delta", "text": delta.content}
    for call in delta.tool_calls:
        begun = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield "tool_use", begun, {"type": "input_json_delta", "partial_json": call.arguments}


def _events(request: CompletionRequest, choices: Iterable[Choice]) -> Iterator[dict[str, Any] | None]:
    """The events of a streamed message; None where only the prompt has progressed."""
    choice = next(iter(choices))  # a message has one
    yield {"type": "message_start", "message": _empty_message(request.model, _usage(choice, 0))}
    index, present, tokens, last = -1, "", 0, Delta(finish_reason="stop")
    for delta in choice.deltas:
        if not isinstance(delta, Delta):
            yield None
            continue
        tokens, last = tokens + 1, delta
        for kind, begun, added in _blocks(delta):
            if kind != present or kind == "tool_use":
                if present:
                    yield {"type": "content_block_stop", "index": index}
                index, present = index + 1, kind
                yield {"type": "content_block_start", "index": index, "content_block": begun}
            yield {"type": "content_block_delta", "index": index, "delta": added}
    if present:
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _ending(last), "usage": _usage(choice, tokens)}
    yield {"type": "message_stop"}


def _extend(block: dict[str, Any], added: dict[str, Any]) -> None:
    """Adds an event's delta to its block."""
    if added["type"] == "input_json_delta":
        block["input"] = json.loads(added["partial_json"])
    else:
        key = "text" if added["type"] == "text_delta" else "thinking"
        block[key] += added[key]
