"""Routes, and what requests ask for."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from mlx_lm.server import CompletionRequest, LogitsProcessorArguments, ModelDescription, SamplingArguments

from . import anthropic, fields, grammar, messages, residency_page, tool_choice
from .access import Access
from .answers import Answers
from .errors import Disconnected, RequestError
from .metrics import Metrics
from .template import template_variables
from .tool_choice import ToolChoice
from .worker import POLL_SECONDS, Arguments, Worker, wait_until


@dataclass(frozen=True)
class Site:
    """What all handlers share."""

    worker: Worker
    access: Access
    metrics: Metrics
    model_name: str
    fingerprint: str
    created: int
    save_prompt_cache: Callable[[], Future] | None = None  # where there is a file for it


class Handler(Answers):
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
                "/v1/messages/count_tokens": self.post_count,
                "/prompt-cache/save": self.post_prompt_cache,
            }
        )

    def do_OPTIONS(self) -> None:
        self._guarded(lambda: self.begin("application/json", 204, {"Content-Length": "0"}), with_key=False)

    def _route(self, routes: dict) -> None:
        path = self._path
        action = routes.get(path)
        if action is None:
            self._guarded(self._unknown, endpoint="unknown")
        else:
            self._guarded(action, with_key=path != "/health", endpoint=path)

    @property
    def _path(self) -> str:
        """The request's, without its query; empty where it is none."""
        try:
            return urlsplit(self.path).path
        except ValueError:
            return ""

    def _unknown(self) -> None:
        if not self._path:
            raise RequestError(400, f"{self.path[:200]!r}: not a path")
        raise RequestError(404, f"{self.command} {self._path[:200]}: there is no such endpoint")

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
        except RecursionError:
            self._fail(RequestError(400, "the request is nested too deeply"))
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
        if error.status == 401 and self._path.startswith("/residency"):
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
        return self._path in ("/v1/messages", "/v1/messages/count_tokens")

    def _error_body(self, error: RequestError) -> bytes:
        return anthropic.error_body(error) if self._is_anthropic else error.body()

    def extra_headers(self) -> None:
        super().extra_headers()
        headers = getattr(self, "headers", None)  # none where the head was not understood
        origin = self.site.access.allowed_origin(headers.get("Origin")) if headers is not None else None
        if origin is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", _askable(headers.get("Access-Control-Request-Headers")))
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
        self.begin_stream()
        worker = self.site.worker
        while self.command != "HEAD" and self.connected() and not worker.draining:
            state = residency_page.snapshot(worker)
            self.event(state | {"tokens": self.site.metrics.tokens._value.get()})
            wait_until(lambda: worker.draining, residency_page.SECONDS)

    # Requests

    def post_chat(self) -> None:
        values = self._values(chat=True)
        request, choice = self._chat(values)
        schema = grammar.read(values.get("response_format"))
        arguments = self._arguments(values, values.get("logprobs", False), values.get("top_logprobs", 0))
        arguments.grammar = self._grammar(schema, choice, arguments)
        self.request_id = f"chatcmpl-{uuid.uuid4().hex}"
        self.object_type = "chat.completion.chunk" if self.stream else "chat.completion"
        self.complete(request, arguments, values, choice)

    def post_text(self) -> None:
        values = self._values(chat=False)
        prompt = messages.prompt(values.get("prompt"), self.site.worker.model_provider.model.args.vocab_size)
        request = CompletionRequest("text", prompt, [], None, None)
        top = values.get("logprobs")
        arguments = self._arguments(values, top is not None, top or 0)
        self.request_id = f"cmpl-{uuid.uuid4().hex}"
        self.object_type = "text_completion"
        self.complete(request, arguments, values)

    def post_message(self) -> None:
        body, begun = anthropic.as_chat(self.read_body())
        values = self._values(chat=True, body=body)
        request, choice = self._chat(values)
        arguments = self._arguments(values, False, 0)
        arguments.begin_with(begun)
        arguments.grammar = self._grammar(None, choice, arguments)
        stop = values.get("stop", [])
        with self.site.worker.place(), self.generation(request, arguments, stop, choice) as generation:
            counts = generation.prompt_tokens, generation.cached_tokens
            message = anthropic.empty_message(self.requested_model, anthropic.usage(*counts, 0))
            if not self.stream:
                self.send_json(anthropic.whole(generation.deltas, message, *counts))
                return
            self.begin_stream()
            for event in anthropic.events(generation.deltas, message, *counts):
                self.event(event, event["type"])

    def post_count(self) -> None:
        """How long the prompt of a message would be; nothing is generated."""
        body, begun = anthropic.as_chat(self.read_body(), counting=True)
        values = self._values(chat=True, body=body)
        request, _ = self._chat(values)
        arguments = self._arguments(values, False, 0)
        arguments.begin_with(begun)
        self.send_json({"input_tokens": self.site.worker.count(request, arguments)})

    def post_prompt_cache(self) -> None:
        """Saves the KV caches kept; answers when that is done."""
        if self.site.save_prompt_cache is None:
            raise RequestError(404, "there is no file to save to: start the server with --prompt-cache-file")
        if not self.site.worker.is_healthy:
            raise RequestError(503, "the server is loading or shutting down", retry_after_seconds=5)
        saving = self.site.save_prompt_cache()
        while not saving.done():
            if not self.connected():
                raise Disconnected
            if not self.site.worker.generation_available():
                raise RequestError(503, "the server is shutting down")
            time.sleep(POLL_SECONDS)
        try:
            saved = saving.result()
        except OSError as error:
            raise RequestError(500, f"the prompt cache cannot be written: {error.strerror or error}") from error
        self.send_json(asdict(saved))

    def _chat(self, values: dict) -> tuple[CompletionRequest, ToolChoice]:
        tools = messages.tools(values.get("tools"))
        choice = tool_choice.read(tools, values.get("tool_choice"), values.get("parallel_tool_calls", True))
        return CompletionRequest("chat", "", messages.messages(values.get("messages")), choice.tools, None), choice

    def _grammar(self, schema: dict | None, choice: ToolChoice, arguments: Arguments) -> grammar.Grammar | None:
        template = self.site.worker.cli_args.chat_template_args | arguments.chat_template_kwargs
        tokenizer = self.site.worker.model_provider.tokenizer
        return grammar.build(schema, choice, bool(template.get("enable_thinking")), tokenizer)

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

    def _arguments(self, values: dict, logprobs: bool, top: int) -> Arguments:
        template = self._template_arguments(values)
        limits = {name: values[name] for name in ("max_completion_tokens", "max_tokens") if name in values}
        limit = min(limits, key=limits.get, default="max_tokens")
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
        if values.get("top_p") == 0:  # to mlx-lm that is none at all; as few tokens as can be is the likeliest
            sampling["temperature"] = 0.0
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
            max_tokens=limits.get(limit, 0),
            limit_name=limit,
            num_draft_tokens=0,
            logprobs=logprobs,
            top_logprobs=top,
            seed=values.get("seed"),
            chat_template_kwargs=template,
        )

    def _template_arguments(self, values: dict) -> dict:
        """What the request sets for the chat template, which has to have such variables."""
        template = dict(values.get("chat_template_kwargs", {}))
        names = {name: f"chat_template_kwargs.{name}" for name in template}
        if "reasoning_effort" in values and "enable_thinking" not in template:
            template["enable_thinking"] = values["reasoning_effort"] != "none"
            if template["enable_thinking"]:
                names["enable_thinking"] = "thinking" if self._is_anthropic else "reasoning_effort"
        variables = template_variables(self.site.worker.model_provider.tokenizer) if names else frozenset()
        for name in names.keys() - variables:
            raise fields.refuse(names[name], "the model's chat template has no such variable")
        return template


def _askable(asked: str | None) -> str:
    """The headers that a page of an allowed origin may send: all it asks for, if they are names of headers."""
    if asked and len(asked) <= 4096 and re.fullmatch(r"[\w\-]+([ \t]*,[ \t]*[\w\-]+)*", asked, re.ASCII):
        return asked
    return "Authorization, Content-Type, x-api-key"
