"""Routes, and OpenAI's form of requests and answers."""

import json
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlx_lm.server import (
    APIHandler,
    CompletionRequest,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)

from . import anthropic, fields, grammar, messages, residency_page
from .access import Access
from .completion import Delta, deltas
from .connection import JsonHandler
from .errors import Disconnected, RequestError
from .metrics import Metrics
from .worker import Arguments, Worker, wait_until

KEEP_ALIVE = b": working\n\n"


@dataclass(frozen=True)
class Site:
    """What all handlers share."""

    worker: Worker
    access: Access
    metrics: Metrics
    model_name: str
    fingerprint: str
    created: int


class Handler(JsonHandler, APIHandler):
    """mlx-lm's handler with our checks before it and our streams behind it."""

    def __init__(self, site: Site, *args):
        self.site = site
        super().__init__(site.worker, *args, system_fingerprint=site.fingerprint)

    # Routes

    def do_GET(self) -> None:
        self._route(
            {
                "/health": self.get_health,
                "/v1/models": self.get_models,
                f"/v1/models/{self.site.model_name}": self.get_model,
                "/metrics": self.get_metrics,
                "/residency": self.get_residency,
                "/residency/events": self.get_residency_events,
            }
        )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._route(
            {
                "/v1/chat/completions": self.post_chat,
                "/chat/completions": self.post_chat,
                "/v1/completions": self.post_text,
                "/v1/messages": self.post_message,
            }
        )

    def do_OPTIONS(self) -> None:
        self._guarded(lambda: self.begin("application/json", 204, {"Content-Length": "0"}), with_key=False)

    def _route(self, routes: dict) -> None:
        path = urlsplit(self.path).path
        action = routes.get(path)
        if action is None:
            self._guarded(self._unknown, endpoint="unknown")
        else:
            self._guarded(action, with_key=path != "/health", endpoint=path)

    def _unknown(self) -> None:
        raise RequestError(404, f"{self.command} {urlsplit(self.path).path[:200]}: there is no such endpoint")

    def _guarded(self, action, with_key: bool = True, endpoint: str = "") -> None:
        """Runs an action once the client may ask for it; whatever it raises becomes an answer."""
        self._status = 200
        try:
            host = self.headers.get("Host")
            self.site.access.check_host(host)
            self.site.access.check_origin(self.headers.get("Origin"), host)
            if with_key:
                self.site.access.check_key(self.headers)
            action()
        except RequestError as error:
            self._fail(error)
        except (Disconnected, ConnectionError, TimeoutError):
            self._status = 499
            self.close_connection = True
            self.site.metrics.disconnects.inc()
        except Exception as error:
            logging.exception("a request failed")
            self._fail(RequestError(500, f"this request failed: {type(error).__name__}: {error}"))
        finally:
            if endpoint:
                self.site.metrics.requests.labels(endpoint, str(self._status)).inc()

    def _fail(self, error: RequestError) -> None:
        self._status = error.status
        self.close_connection = True
        headers = error.headers
        if error.status == 401 and urlsplit(self.path).path.startswith("/residency"):
            headers = {"WWW-Authenticate": 'Basic realm="the API key as password"'}
        try:
            if self.answered:  # amid a stream
                name = b"event: error\n" if self._is_anthropic else b""
                self.wfile.write(name + b"data: " + self._error_body(error) + b"\n\n")
                self.wfile.flush()
            else:
                self.send_json(self._error_body(error), error.status, headers)
        except OSError:
            self.site.metrics.disconnects.inc()

    @property
    def _is_anthropic(self) -> bool:
        return urlsplit(self.path).path == "/v1/messages"

    def _error_body(self, error: RequestError) -> bytes:
        return anthropic.error_body(error) if self._is_anthropic else error.body()

    def extra_headers(self) -> None:
        super().extra_headers()
        origin = self.headers.get("Origin") if getattr(self, "headers", None) is not None else None
        if origin is not None and origin in self.site.access.allowed_origins:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type, x-api-key")
            self.send_header("Vary", "Origin")

    def get_health(self) -> None:
        healthy = self.site.worker.is_healthy
        self._status = 200 if healthy else 503
        self.send_json({"status": "ok" if healthy else "unavailable"}, self._status)

    def get_models(self) -> None:
        self.send_json({"object": "list", "data": [self._model()]})

    def get_model(self) -> None:
        self.send_json(self._model())

    def _model(self) -> dict:
        return {"id": self.site.model_name, "object": "model", "created": self.site.created, "owned_by": "mlx-mimo"}

    def get_metrics(self) -> None:
        self.send_body(self.site.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")

    def get_residency(self) -> None:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        self.send_body(residency_page.page(), "text/html; charset=utf-8", headers={"Content-Security-Policy": policy})

    def get_residency_events(self) -> None:
        """A snapshot a second, until the page is closed or the server stops."""
        self.begin("text/event-stream", 200, {"Cache-Control": "no-cache"})
        worker = self.site.worker
        while self.connected() and not worker.draining:
            state = residency_page.snapshot(worker)
            self._event(state | {"tokens": self.site.metrics.tokens._value.get()})
            wait_until(lambda: worker.draining, residency_page.SECONDS)

    # Requests

    def post_chat(self) -> None:
        values = self._values(chat=True)
        tools = messages.tools(values.get("tools"))
        if values.get("tool_choice") == "none":
            tools = None
        answer_format = grammar.read(values.get("response_format"))
        template = dict(values.get("chat_template_kwargs", {}))
        if "reasoning_effort" in values:
            template.setdefault("enable_thinking", values["reasoning_effort"] != "none")
        if answer_format is not None and (tools or template.get("enable_thinking")):
            raise fields.refuse("response_format", "not together with tools or thinking")
        request = CompletionRequest("chat", "", messages.messages(values.get("messages")), tools, None)
        top = values.get("top_logprobs", 0)
        arguments = self._arguments(values, values.get("logprobs", False), top, template, answer_format)
        self.request_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.object_type = "chat.completion.chunk" if self.stream else "chat.completion"
        self._complete(request, arguments, values)

    def post_text(self) -> None:
        values = self._values(chat=False)
        prompt = messages.prompt(values.get("prompt"), self.site.worker.model_provider.model.args.vocab_size)
        request = CompletionRequest("text", prompt, [], None, None)
        top = values.get("logprobs")
        arguments = self._arguments(values, top is not None, top or 0, {}, None)
        self.request_id = f"cmpl-{uuid.uuid4().hex}"
        self.object_type = "text_completion"
        self._complete(request, arguments, values)

    def post_message(self) -> None:
        values = self._values(chat=True, body=anthropic.as_chat(self.read_body()))
        tools = None if values.get("tool_choice") == "none" else messages.tools(values.get("tools"))
        request = CompletionRequest("chat", "", messages.messages(values["messages"]), tools, None)
        arguments = self._arguments(values, False, 0, values.get("chat_template_kwargs", {}), None)
        context, parts = self._deltas(request, arguments, values.get("stop", []))
        counts = (len(context.prompt), context.prompt_cache_count)
        message = anthropic.empty_message(self.requested_model, anthropic.usage(*counts, 0))
        try:
            if not self.stream:
                self.send_json(anthropic.whole(parts, message, *counts))
                return
            self.begin("text/event-stream", 200, {"Cache-Control": "no-cache"})
            for event in anthropic.events(parts, message, *counts):
                self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
        finally:
            context.stop()

    def _values(self, chat: bool, body: dict | None = None) -> dict:
        """The body's checked fields, and the model's name compared."""
        body = self.read_body() if body is None else body
        if not self.site.worker.is_healthy:
            raise RequestError(503, "the server is loading or shutting down", retry_after_seconds=5)
        values = fields.read(body, chat)
        self.requested_model = values.get("model", self.site.model_name)
        if self.requested_model != self.site.model_name:
            raise RequestError(
                404,
                f"model: this server has {self.site.model_name!r} alone",
                param="model",
                code="model_not_found",
            )
        self.stream = values.get("stream", False)
        return values

    def _arguments(
        self, values: dict, logprobs: bool, top: int, template: dict, answer_format: grammar.Grammar | None
    ) -> Arguments:
        defaults = self.site.worker.cli_args
        vocabulary = self.site.worker.model_provider.model.args.vocab_size
        if any(token >= vocabulary for token in values.get("logit_bias", ())):
            raise fields.refuse("logit_bias", f"token ids below {vocabulary} expected")
        sampling = {
            name: values.get(name, default)
            for name, default in (
                ("temperature", defaults.temp),
                ("top_p", defaults.top_p),
                ("top_k", defaults.top_k),
                ("min_p", defaults.min_p),
                ("xtc_probability", 0.0),
                ("xtc_threshold", 0.1),
            )
        }
        # Probabilities are sorted up to the k-th: more than there are would be an error deep inside.
        sampling["top_k"] = 0 if sampling["top_k"] >= vocabulary else sampling["top_k"]
        return Arguments(
            model=ModelDescription("default_model", "default_model", None),
            sampling=SamplingArguments(**sampling),
            logits=LogitsProcessorArguments(
                logit_bias=values.get("logit_bias"),
                repetition_penalty=values.get("repetition_penalty", 0.0),
                repetition_context_size=values.get("repetition_context_size", 20),
                presence_penalty=values.get("presence_penalty", 0.0),
                presence_context_size=values.get("presence_context_size", 20),
                frequency_penalty=values.get("frequency_penalty", 0.0),
                frequency_context_size=values.get("frequency_context_size", 20),
            ),
            stop_words=[],  # found in the text instead: a stop word may begin and end within a token
            max_tokens=values.get("max_completion_tokens", values.get("max_tokens", 0)),
            num_draft_tokens=0,
            logprobs=logprobs,
            top_logprobs=top,
            seed=values.get("seed"),
            chat_template_kwargs=template,
            grammar=answer_format,
        )

    # Answers

    def _deltas(self, request: CompletionRequest, arguments: Arguments, stop: list[str]) -> tuple:
        """(context, iterator of Delta) of a running generation."""
        began = time.perf_counter()
        metrics = self.site.metrics
        context, responses = self.site.worker.generate(request, arguments, self._progress, self.connected)
        metrics.prompt_tokens.inc(len(context.prompt))
        metrics.cached_tokens.inc(max(0, context.prompt_cache_count))
        timed = metrics.timed(responses, began)
        return context, deltas(context, timed, stop, request.tools, request.request_type == "chat")

    def _progress(self, done: int, total: int) -> None:
        """Shows a streaming client, and whatever is between, that its prompt is being read."""
        if self.answered:
            self.wfile.write(KEEP_ALIVE)
            self.wfile.flush()

    def _complete(self, request: CompletionRequest, arguments: Arguments, values: dict) -> None:
        self.created = int(time.time())
        context, parts = self._deltas(request, arguments, values.get("stop", []))
        try:
            if self.stream:
                self._stream(context, parts, arguments, values.get("stream_options", {}).get("include_usage", False))
            else:
                self._whole(context, parts, arguments)
        finally:
            context.stop()

    def _stream(self, context, parts: Iterator[Delta], arguments: Arguments, with_usage: bool) -> None:
        self.begin("text/event-stream", 200, {"Cache-Control": "no-cache"})
        count, calls, offset = 0, 0, 0
        for delta in parts:
            count += 1
            if delta.empty and not arguments.logprobs:
                continue
            tool_calls = [_call(call) | {"index": calls + i} for i, call in enumerate(delta.tool_calls)]
            calls += len(tool_calls)
            body = self._body(delta.content, delta.reasoning, tool_calls, delta.finish_reason)
            if arguments.logprobs:
                body["choices"][0]["logprobs"] = self._logprobs([delta.token], arguments, offset)
                offset += len(delta.token.text)
            self._event(body)
        if with_usage:
            usage = self.completion_usage_response(len(context.prompt), count, context.prompt_cache_count)
            self._event(usage | {"object": self.object_type})
        self.wfile.write(b"data: [DONE]\n\n")
        self.wfile.flush()

    def _event(self, body: dict) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()

    def _whole(self, context, parts: Iterator[Delta], arguments: Arguments) -> None:
        all_parts = list(parts)
        content = "".join(delta.content for delta in all_parts)
        reasoning = "".join(delta.reasoning for delta in all_parts)
        calls = [_call(call) for delta in all_parts for call in delta.tool_calls]
        reason = all_parts[-1].finish_reason if all_parts else "stop"
        counts = (len(context.prompt), len(all_parts), context.prompt_cache_count)
        body = self._body(content, reasoning, calls, reason, counts)
        if arguments.logprobs:
            body["choices"][0]["logprobs"] = self._logprobs([delta.token for delta in all_parts], arguments, 0)
        self.send_json(body)

    def _body(self, content: str, reasoning: str, calls: list[dict], reason: str | None, counts=(None,) * 3) -> dict:
        """mlx-lm's response, with the reasoning under the name that other clients look for, too."""
        body = self.generate_response(content, reason, *counts, tool_calls=calls, reasoning_text=reasoning)
        message = body["choices"][0].get("delta") or body["choices"][0].get("message")
        if reasoning and message is not None:
            message["reasoning_content"] = reasoning
        return body

    def _logprobs(self, tokens: list, arguments: Arguments, offset: int) -> dict:
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
