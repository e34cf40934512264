"""OpenAI's chat and text completions: their fields, and answers whole or streamed, of one choice or several."""

import inspect
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..engine.request import Chat, GenerationRequest
from ..engine.results import Token
from ..errors import RequestError
from . import openai_messages, tool_choice
from .deltas import Delta, ToolCall
from .fields import (
    MOST_CHOICES,
    MOST_TOKENS,
    Check,
    boolean,
    found,
    integer,
    label,
    logit_bias,
    number,
    only,
    read,
    refuse,
    stop,
    text,
    unchecked,
)
from .grammar import response_schema
from .protocol import KEEP_ALIVE, Choice, event
from .request import CompletionRequest, answer_grammar, check_model, penalties, sampling, variables
from .served_model import ServedModel

_TEMPLATE_PARAMETERS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise refuse(name, "an object with include_usage expected")
    only(False)(f"{name}.include_obfuscation", value.get("include_obfuscation", False))
    return {"include_usage": boolean(f"{name}.include_usage", value.get("include_usage", False))}


def _chat_template_kwargs(name: str, value: Any) -> dict[str, Any]:
    """Variables for the template. What would change how it is applied, or replace it, is not among them."""
    if not isinstance(value, dict) or len(value) > 32:
        raise refuse(name, f"an object expected, {found(value)} found")
    for key, item in value.items():
        if key in _TEMPLATE_PARAMETERS or not key.isidentifier() or key.startswith("_"):
            raise refuse(f"{name}.{key[:40]}", "may not be set by a request")
        if not isinstance(item, (bool, int, float, str)):
            raise refuse(f"{name}.{key}", "text, a number, true or false expected")
    if "enable_thinking" in value:
        boolean(f"{name}.enable_thinking", value["enable_thinking"])
    return value


_SAMPLING: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(0, 1_000_000),
    "min_p": number(0, 1),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 0.5),
    "repetition_penalty": number(0, 10),
    "repetition_context_size": integer(1, 100_000),
    "presence_penalty": number(-2, 2),
    "presence_context_size": integer(1, 100_000),
    "frequency_penalty": number(-2, 2),
    "frequency_context_size": integer(1, 100_000),
    "logit_bias": logit_bias,
    "n": integer(1, MOST_CHOICES),
    "seed": integer(0, 2**63 - 1),
    "stop": stop,
    "max_tokens": integer(1, MOST_TOKENS),
    "stream": boolean,
    "stream_options": _stream_options,
    "user": label,
    "model": text,
}

_CHAT = _SAMPLING | {
    "messages": unchecked,
    "tools": unchecked,
    "tool_choice": unchecked,
    "parallel_tool_calls": boolean,
    "response_format": unchecked,
    "max_completion_tokens": integer(1, MOST_TOKENS),
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "chat_template_kwargs": _chat_template_kwargs,
    "reasoning_effort": only("none", "minimal", "low", "medium", "high"),
    "metadata": label,
    "safety_identifier": label,
    "prompt_cache_key": label,
    "prompt_cache_retention": label,
    "store": only(False),
    "service_tier": only("auto", "default"),
    "modalities": only(["text"]),
    "verbosity": only("medium"),
}

_TEXT = _SAMPLING | {
    "prompt": unchecked,
    "logprobs": integer(0, 20),
    "echo": only(False),
    "best_of": integer(1, MOST_CHOICES),
    "suffix": only(""),
}


def _read(body: dict[str, Any], checks: dict[str, Check], served: ServedModel) -> dict[str, Any]:
    values = read(body, checks)
    if "stream_options" in values and not values.get("stream"):
        raise refuse("stream_options", "only with stream: true")
    if values.get("best_of", 1) not in (1, values.get("n", 1)):
        raise refuse("best_of", "as many as n expected: nothing is thrown away here")
    if "top_logprobs" in values and not values.get("logprobs"):
        raise refuse("top_logprobs", "only with logprobs: true")
    check_model(values.get("model", served.name), served)
    return values


class _Completions:
    """What chat and text completions have in common. `fingerprint` names versions and hardware."""

    ids = ""  # what the ids of answers begin with
    kind = ""  # what an answer is called, whole
    kind_of_chunks = ""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint

    def whole(self, request: CompletionRequest, choices: Iterable[Choice], served: ServedModel) -> dict[str, Any]:
        answer = self._head(request, self.kind)
        usage = _Usage()
        for choice in choices:
            parts = list(choice.parts())
            usage.add(choice, len(parts))
            body = self._choice(choice.index, parts)
            if request.logprobs:
                body["logprobs"] = self._logprobs(_tokens(parts), 0, served)
            answer["choices"].append(body)
        return answer | usage.field()

    def stream(self, request: CompletionRequest, choices: Iterable[Choice], served: ServedModel) -> Iterator[bytes]:
        head = self._head(request, self.kind_of_chunks)
        usage = _Usage()
        for choice in choices:
            if choice.index == 0:
                yield b""  # the headers may go
            count, calls, offset = 0, 0, 0
            for delta in choice.deltas:
                if not isinstance(delta, Delta):
                    yield KEEP_ALIVE
                    continue
                count += 1
                if delta.empty and not request.logprobs:
                    continue
                part = self._chunk(choice.index, delta, calls)
                calls += len(delta.tool_calls)
                if request.logprobs and delta.token is not None:
                    part["logprobs"] = self._logprobs([delta.token], offset, served)
                    offset += len(delta.token.text)
                yield event(json.dumps(head | {"choices": [part]}).encode())
            usage.add(choice, count)
        if request.include_usage:
            yield event(json.dumps(head | usage.field()).encode())
        yield event(b"[DONE]")

    def error_body(self, error: RequestError) -> bytes:
        return error.body()

    def error_event(self, error: RequestError) -> bytes:
        return event(error.body())

    def _head(self, request: CompletionRequest, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.ids}-{uuid.uuid4().hex}",
            "system_fingerprint": self.fingerprint,
            "object": kind,
            "model": request.model,
            "created": int(time.time()),
            "choices": [],
        }

    def _choice(self, index: int, parts: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, index: int, delta: Delta, calls: int) -> dict[str, Any]:
        """`calls` were called before."""
        raise NotImplementedError

    def _logprobs(self, tokens: list[Token], offset: int, served: ServedModel) -> dict[str, Any]:
        """Of tokens the first of which begins at character `offset` of the answer."""
        raise NotImplementedError


class ChatCompletions(_Completions):
    """`/v1/chat/completions`"""

    ids, kind, kind_of_chunks = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def parse(self, body: dict[str, Any], served: ServedModel) -> CompletionRequest:
        values = _read(body, _CHAT, served)
        tools = tool_choice.read(
            openai_messages.tools(values.get("tools")),
            values.get("tool_choice"),
            values.get("parallel_tool_calls", True),
        )
        messages = openai_messages.messages(values.get("messages"))
        schema = response_schema(values.get("response_format"))
        asked = values.get("chat_template_kwargs", {})
        chosen = variables(asked, values.get("reasoning_effort"), "reasoning_effort", served)
        limits: dict[str, int] = {
            name: values[name] for name in ("max_completion_tokens", "max_tokens") if name in values
        }
        limit = min(limits, key=limits.__getitem__, default="max_tokens")
        generation = GenerationRequest(
            prompt=Chat(messages, tools.tools, chosen),
            sampling=sampling(values, served),
            penalties=penalties(values, served),
            max_tokens=limits.get(limit),
            limit_name=limit,
            seed=values.get("seed"),
            top_logprobs=values.get("top_logprobs", 0),
            grammar=answer_grammar(schema, tools, chosen, served),
        )
        return _request(values, generation, served, tools, values.get("logprobs", False))

    def _choice(self, index: int, parts: Sequence[Delta]) -> dict[str, Any]:
        content = "".join(delta.content for delta in parts)
        calls = [_call(call) for delta in parts for call in delta.tool_calls]
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        message |= _reasoning("".join(delta.reasoning for delta in parts))
        if calls:
            message["tool_calls"] = calls
        return {"index": index, "finish_reason": _finish_reason(parts), "message": message}

    def _chunk(self, index: int, delta: Delta, calls: int) -> dict[str, Any]:
        part: dict[str, Any] = {"role": "assistant"}
        if delta.content:
            part["content"] = delta.content
        part |= _reasoning(delta.reasoning)
        if delta.tool_calls:
            part["tool_calls"] = [_call(call) | {"index": calls + i} for i, call in enumerate(delta.tool_calls)]
        return {"index": index, "finish_reason": delta.finish_reason, "delta": part}

    def _logprobs(self, tokens: list[Token], offset: int, served: ServedModel) -> dict[str, Any]:
        content = []
        for token in tokens:
            top = [_named(one.id, one.logprob, served) for one in token.top]
            content.append(_named(token.id, token.logprob, served) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


class TextCompletions(_Completions):
    """`/v1/completions`"""

    ids, kind, kind_of_chunks = "cmpl", "text_completion", "text_completion"

    def parse(self, body: dict[str, Any], served: ServedModel) -> CompletionRequest:
        values = _read(body, _TEXT, served)
        generation = GenerationRequest(
            prompt=openai_messages.prompt(values.get("prompt"), served.vocab_size),
            sampling=sampling(values, served),
            penalties=penalties(values, served),
            max_tokens=values.get("max_tokens"),
            seed=values.get("seed"),
            top_logprobs=values.get("logprobs", 0),
        )
        return _request(values, generation, served, tool_choice.NO_TOOLS, "logprobs" in values)

    def _choice(self, index: int, parts: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.content for delta in parts)
        return {"index": index, "finish_reason": _finish_reason(parts), "text": text}

    def _chunk(self, index: int, delta: Delta, calls: int) -> dict[str, Any]:
        return {"index": index, "finish_reason": delta.finish_reason, "text": delta.content}

    def _logprobs(self, tokens: list[Token], offset: int, served: ServedModel) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [served.decode(token.id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{served.decode(one.id): _finite(one.logprob) for one in token.top} for token in tokens],
            "text_offset": offsets,
        }


class _Usage:
    """Tokens of an answer. The prompt of its choices is one."""

    def __init__(self) -> None:
        self.prompt_tokens, self.cached_tokens, self.tokens = 0, 0, 0

    def add(self, choice: Choice, tokens: int) -> None:
        if choice.index == 0:
            self.prompt_tokens, self.cached_tokens = choice.prompt_tokens, choice.cached_tokens
        self.tokens += tokens

    def field(self) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        return {"usage": usage}


def _request(
    values: dict[str, Any],
    generation: GenerationRequest,
    served: ServedModel,
    tools: tool_choice.ToolChoice,
    logprobs: bool,
) -> CompletionRequest:
    return CompletionRequest(
        model=served.name,
        generation=generation,
        tools=tools,
        stop=tuple(values.get("stop", ())),
        choices=values.get("n", 1),
        stream=values.get("stream", False),
        include_usage=values.get("stream_options", {}).get("include_usage", False),
        logprobs=logprobs,
    )


def _tokens(parts: Sequence[Delta]) -> list[Token]:
    return [delta.token for delta in parts if delta.token is not None]


def _finish_reason(parts: Sequence[Delta]) -> str | None:
    return parts[-1].finish_reason if parts else "stop"


def _reasoning(text: str) -> dict[str, str]:
    """Under both of the names that clients look for."""
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finite(logprob: float) -> float:
    """JSON has no infinity: a masked token's probability is one that never happens."""
    return max(logprob, -9999.0)


def _named(token: int, logprob: float, served: ServedModel) -> dict[str, Any]:
    text = served.decode(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}
