"""OpenAI's form of answers: whole or streamed, one choice or several."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlx_lm.server import APIHandler, CompletionRequest

from .completion import Delta, deltas
from .connection import JsonHandler
from .tool_choice import NO_TOOLS, ToolChoice
from .worker import Arguments

KEEP_ALIVE = b": working\n\n"


@dataclass
class Generation:
    """One sequence on its way: choice number `index` of an answer."""

    index: int
    context: object  # mlx-lm's GenerationContext
    deltas: Iterator[Delta]
    arguments: Arguments

    @property
    def prompt_tokens(self) -> int:
        return len(self.context.prompt)

    @property
    def cached_tokens(self) -> int:
        return self.context.prompt_cache_count


class Answers(JsonHandler, APIHandler):
    """What a handler says once it knows the question: mlx-lm's bodies. Its `site` is the subclass's to set."""

    def begin_stream(self) -> None:
        self.begin("text/event-stream", 200, {"Cache-Control": "no-cache"})

    @contextlib.contextmanager
    def generation(
        self, request: CompletionRequest, arguments: Arguments, stop: list[str], choice: ToolChoice, index: int = 0
    ) -> Iterator[Generation]:
        """Begun, and stopped when it is left; whoever asks for it holds a place."""
        began = time.perf_counter()
        metrics = self.site.metrics
        if index:
            seed = None if arguments.seed is None else (arguments.seed + index) % 2**63
            arguments = replace(arguments, seed=seed)
        begun = self.site.worker.generate(request, arguments, self._progress, self.connected)
        with begun as (context, responses):
            metrics.prompt_tokens.inc(len(context.prompt))
            metrics.cached_tokens.inc(max(0, context.prompt_cache_count))
            timed = metrics.timed(responses, began)
            parts = deltas(context, timed, stop, choice, request.request_type == "chat")
            yield Generation(index, context, parts, arguments)

    def _progress(self, done: int, total: int) -> None:
        """Shows a streaming client, and whatever is between, that its prompt is being read."""
        if self.answered:
            self.wfile.write(KEEP_ALIVE)
            self.wfile.flush()

    def complete(
        self, request: CompletionRequest, arguments: Arguments, values: dict, choice: ToolChoice = NO_TOOLS
    ) -> None:
        """The answer's choices one after another: each is a sequence with a seed of its own."""
        self.created = int(time.time())
        choices, tokens = [], 0
        with self.site.worker.place():
            for index in range(values.get("n", 1)):
                with self.generation(request, arguments, values.get("stop", []), choice, index) as generation:
                    if index == 0:
                        counts = generation.prompt_tokens, generation.cached_tokens
                    if self.stream:
                        if index == 0:
                            self.begin_stream()
                        tokens += self._stream(generation)
                    else:
                        count, body = self._whole(generation)
                        tokens += count
                        choices.append(body)
            usage = self.completion_usage_response(counts[0], tokens, counts[1])
            if not self.stream:
                self.send_json(usage | {"object": self.object_type, "choices": choices})
                return
            if values.get("stream_options", {}).get("include_usage", False):
                self.event(usage | {"object": self.object_type})
            self.wfile.write(b"data: [DONE]\n\n")
            self.wfile.flush()

    def event(self, body: dict, name: str | None = None) -> None:
        """One of a stream's."""
        head = "" if name is None else f"event: {name}\n"
        self.wfile.write(f"{head}data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()

    def _stream(self, generation: Generation) -> int:
        """Sends a choice's chunks; the number of its tokens."""
        count, calls, offset = 0, 0, 0
        with_logprobs = generation.arguments.logprobs
        for delta in generation.deltas:
            count += 1
            if delta.empty and not with_logprobs:
                continue
            tool_calls = [_call(call) | {"index": calls + i} for i, call in enumerate(delta.tool_calls)]
            calls += len(tool_calls)
            body = self._body(generation.index, delta.content, delta.reasoning, tool_calls, delta.finish_reason)
            if with_logprobs:
                body["choices"][0]["logprobs"] = self._logprobs([delta.token], offset)
                offset += len(delta.token.text)
            self.event(body)
        return count

    def _whole(self, generation: Generation) -> tuple[int, dict]:
        """(number of tokens, the choice)"""
        parts = list(generation.deltas)
        content = "".join(delta.content for delta in parts)
        reasoning = "".join(delta.reasoning for delta in parts)
        calls = [_call(call) for delta in parts for call in delta.tool_calls]
        reason = parts[-1].finish_reason if parts else "stop"
        (choice,) = self._body(generation.index, content, reasoning, calls, reason)["choices"]
        if generation.arguments.logprobs:
            choice["logprobs"] = self._logprobs([delta.token for delta in parts], 0)
        return len(parts), choice

    def _body(self, index: int, content: str, reasoning: str, calls: list[dict], reason: str | None) -> dict:
        """mlx-lm's response, with the reasoning under the name that other clients look for, too."""
        body = self.generate_response(content, reason, 0, 0, tool_calls=calls, reasoning_text=reasoning)
        (choice,) = body["choices"]
        choice["index"] = index
        message = choice.get("delta") or choice.get("message")
        if reasoning and message is not None:
            message["reasoning_content"] = reasoning
        return body

    def _logprobs(self, tokens: list, offset: int) -> dict:
        entries = []
        for response in tokens:
            top = sorted(response.top_tokens, key=lambda item: -item["logprob"])
            entry = self._named(response.token, response.logprob)
            entries.append(entry | {"top_logprobs": [self._named(item["id"], item["logprob"]) for item in top]})
        if self.object_type != "text_completion":
            return {"content": entries, "refusal": None}
        offsets = []
        for response in tokens:
            offsets.append(offset)
            offset += len(response.text)
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{item["token"]: item["logprob"] for item in e["top_logprobs"]} for e in entries],
            "text_offset": offsets,
        }

    def _named(self, token: int, logprob: float) -> dict:
        text = self.site.worker.model_provider.tokenizer.decode([token])
        # JSON has no infinity: a masked token's probability is one that never happens.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _call(call: dict) -> dict:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}
