"""From the engine's tokens to what an answer consists of: content, reasoning, tool calls."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..engine.mlx_lm_private import TextStateMachine, make_text_state_machine
from ..engine.results import Progress, Result, Token
from .request import CompletionRequest
from .served_model import ServedModel

ToolParser = Callable[[str, list[dict[str, Any]]], dict[str, Any] | list[dict[str, Any]]]


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON


@dataclass
class Delta:
    """What one token added; held back are texts that may yet become a marker or a stop word."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token: Token | None = None
    finish_reason: str | None = None  # "stop", "length" or "tool_calls" with the last one
    stop_word: str | None = None  # the one that ended it

    @property
    def empty(self) -> bool:
        return not (self.content or self.reasoning or self.tool_calls or self.finish_reason)


class StopText:
    """Ends text at the first of some stop words, wherever tokens begin and end."""

    def __init__(self, words: list[str]):
        self.words = words
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be shown, the stop word that ended it)"""
        text = self.held + text
        ends = [(text.find(word), word) for word in self.words if word in text]
        if ends:
            self.held = ""
            at, word = min(ends)
            return text[:at], word
        keep = max((n for word in self.words for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


def deltas(
    results: Iterable[Result], state: str, request: CompletionRequest, served: ServedModel
) -> Iterator[Delta | Progress]:
    """One Delta a token, the last with a finish_reason; the prompt's progress passes through. `state` is the one that
    the answer begins in.

    A stop word found in the content ends the answer, and so does the first call of a tool where one alone is wanted:
    the caller cancels the generation then. Of a text completion all text is content. Without tools so is what looks
    like a call of one.
    """
    reader = _Reader(request, served, state)
    for result in results:
        if isinstance(result, Token):
            delta = reader.read(result)
            yield delta
            if delta.finish_reason:
                return
        elif isinstance(result, Progress):
            yield result


class _Reader:
    """Where an answer is: what text was held back, and whether a call has begun."""

    def __init__(self, request: CompletionRequest, served: ServedModel, state: str):
        self.request = request
        self.parser: ToolParser | None = served.tokenizer.tool_parser
        self.machine = make_text_state_machine(served.tokenizer).make_state(state)
        self.stopper = StopText(list(request.stop))
        self.part = state  # "normal", "reasoning" or "tool": what the last text was
        self.call_text = ""
        self.called = False
        self.after_call = False

    def read(self, token: Token) -> Delta:
        delta = Delta(token=token, finish_reason=token.finish_reason)
        for part, text in self._parts(token):
            if self.part == "tool" and part != "tool":
                self._end_call(delta, "</tool_call>")
                self.after_call = bool(delta.tool_calls)
                if delta.tool_calls and not self.request.tools.parallel:
                    delta.finish_reason, self.part = "stop", part
                    break
            self._add(delta, part, text)
        if token.finish_reason and self.part == "tool":
            self._end_call(delta, "")
        delta.content, delta.stop_word = self.stopper.push(delta.content)
        if delta.finish_reason and delta.stop_word is None:
            delta.content += self.stopper.flush()
        self.called = self.called or bool(delta.tool_calls)
        if delta.stop_word is not None:
            delta.finish_reason = "stop"
        if delta.finish_reason == "stop" and self.called:
            delta.finish_reason = "tool_calls"
        return delta

    def _parts(self, token: Token) -> list[tuple[str, str]]:
        """(part, text) of a token's text, without the markers between parts."""
        if not self.request.is_chat:
            return [("normal", token.text)]
        self.machine, parts = TextStateMachine.split(self.machine, token.text)
        if token.finish_reason:
            self.machine, rest, part = TextStateMachine.flush(self.machine)
            parts.append((part, rest))
        return parts

    def _add(self, delta: Delta, part: str, text: str) -> None:
        if part == "reasoning":
            delta.reasoning += text
        elif part == "tool":
            self.call_text += text
        elif not self.after_call or text.strip():  # without the line breaks between calls
            delta.content += text
            self.after_call = False
        self.part = part

    def _end_call(self, delta: Delta, end: str) -> None:
        end_call(delta, self.parser, self.call_text, self.request.tools.tools, end)
        self.call_text = ""


def end_call(delta: Delta, parser: ToolParser | None, text: str, tools: list[dict[str, Any]] | None, end: str) -> None:
    """Turns the text between a call's markers into calls. Text that is no call is added to the content, with the
    `end` that it had.
    """
    calls = _calls(parser, text, tools) if tools and parser else None
    if calls is None:
        delta.content += f"<tool_call>{text}{end}"
    else:
        delta.tool_calls += calls


def _calls(parser: ToolParser, text: str, tools: list[dict[str, Any]]) -> list[ToolCall] | None:
    """None where the text is no call, or one whose arguments JSON cannot hold."""
    try:
        parsed = parser(text, tools)
        return [_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SyntaxError, MemoryError):
        return None  # whatever a parser stumbles over: the model may write anything at all


def _call(call: dict[str, Any]) -> ToolCall:
    arguments = json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", call["name"], arguments)
