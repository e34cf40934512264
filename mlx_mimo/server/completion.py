"""From the generation thread's tokens to what an answer consists of: content, reasoning, tool calls."""

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response

from .tool_choice import ToolChoice


@dataclass
class Delta:
    """What one token added; held back are texts that may yet become a marker or a stop word."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict] = field(default_factory=list)  # {"id", "name", "arguments": JSON text}
    token: Response | None = None
    finish_reason: str | None = None
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
    context: GenerationContext, responses: Iterable[Response], stop: list[str], choice: ToolChoice, chat: bool
) -> Iterator[Delta]:
    """One Delta a token; the last has a finish_reason. A stop word found in the content ends the generation, and so
    does the first call of a tool where one alone is wanted.

    Without `chat` text is content, whatever it contains. Without tools so is what looks like a call of one.
    """
    state = context.text_sm.make_state(context.initial_state)
    stopper, previous, call_text, called, after_call = StopText(stop), context.initial_state, "", False, False
    for response in responses:
        delta = Delta(token=response, finish_reason=response.finish_reason)
        if chat:
            state, pieces = TextStateMachine.split(state, response.text)
            if response.finish_reason:
                state, rest, name = TextStateMachine.flush(state)
                pieces.append((name, rest))
        else:
            pieces = [("normal", response.text)]
        for name, text in pieces:
            if previous == "tool" and name != "tool":
                _close_call(delta, context, call_text, choice, "</tool_call>")
                call_text, after_call = "", bool(delta.tool_calls)
                if delta.tool_calls and not choice.parallel:
                    delta.finish_reason, previous = "stop", name
                    context.stop()
                    break
            if name == "reasoning":
                delta.reasoning += text
            elif name == "tool":
                call_text += text
            elif not after_call or text.strip():  # without the line breaks between calls
                delta.content += text
                after_call = False
            previous = name
        if response.finish_reason and previous == "tool":
            _close_call(delta, context, call_text, choice, "")
        delta.content, delta.stop_word = stopper.push(delta.content)
        if delta.finish_reason and delta.stop_word is None:
            delta.content += stopper.flush()
        called = called or bool(delta.tool_calls)
        if delta.stop_word is not None:
            delta.finish_reason = "stop"
            context.stop()
        if delta.finish_reason == "stop" and called:
            delta.finish_reason = "tool_calls"
        yield delta
        if delta.finish_reason:
            return


def _close_call(delta: Delta, context: GenerationContext, text: str, choice: ToolChoice, end: str) -> None:
    """Turns the text between the markers into calls; what is none stays visible as content, with the `end` it had."""
    calls = _calls(context, text, choice.tools) if choice.tools else None
    if calls is None:
        delta.content += f"<tool_call>{text}{end}"
    else:
        delta.tool_calls += calls


def _calls(context: GenerationContext, text: str, tools: list[dict]) -> list[dict] | None:
    """None where the text is no call, or one whose arguments JSON cannot hold."""
    try:
        parsed = context.tool_parser(text, tools)
        return [_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SyntaxError, MemoryError):
        return None  # whatever a parser stumbles over: the model may write anything at all


def _call(call: dict) -> dict:
    arguments = json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False)
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "name": call["name"], "arguments": arguments}
