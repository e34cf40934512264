"""Routes, and what comes before each: host, page and key are checked, and whatever is raised becomes an answer."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from ..api.anthropic import Messages
from ..api.openai import ChatCompletions, TextCompletions
from ..api.protocol import event
from ..api.service import Service
from ..engine.worker import RETRY_SECONDS, Worker
from ..errors import Disconnected, RequestError
from ..watch import residency_page
from ..watch.metrics import Metrics
from .access import Access
from .answer import EventStream, GeneratedAnswer
from .body import BodyLimits, read_json
from .errors import as_request_error
from .exchange import Exchange

METHODS = ("GET", "HEAD", "POST", "OPTIONS")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
DRAIN_SECONDS = 0.1  # between two looks of an endless stream at whether the server is leaving

Endpoint = Callable[[Request], Awaitable[Any]]  # of an ASGI application that answers, such as a Response


@dataclass(frozen=True)
class Site:
    """What is served."""

    service: Service
    worker: Worker
    metrics: Metrics
    model_name: str
    fingerprint: str  # of versions and hardware
    created: int  # seconds since 1970
    save_prompt_cache: Callable[[], Future] | None = None  # where there is a file for it


class App:
    """The ASGI application. `access` and `limits` may be replaced while it runs."""

    def __init__(self, site: Site, access: Access, limits: BodyLimits):
        self.site = site
        self.access = access
        self.limits = limits
        chat, text, messages = ChatCompletions(site.fingerprint), TextCompletions(site.fingerprint), Messages()
        self.messages = messages
        posts: dict[str, Endpoint] = {
            "/v1/chat/completions": self._generated(chat),
            "/chat/completions": self._generated(chat),
            "/v1/completions": self._generated(text),
            "/v1/messages": self._generated(messages),
            "/v1/messages/count_tokens": self._count_tokens,
            "/prompt-cache/save": self._save_prompt_cache,
        }
        gets: dict[str, Endpoint] = {
            "/health": self._health,
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/metrics": self._metrics,
            "/residency": self._residency,
            "/residency/events": self._residency_events,
        }
        self._paths = posts.keys() | gets.keys() | {f"/v1/models/{site.model_name}"}
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
        self._router = Router(routes, redirect_slashes=False, default=_unknown)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.access)
        scope["app"] = self  # so that the router raises where a path or method is not served
        try:
            scope["path"] = _path(scope)
            if await self._is_allowed(scope, exchange):
                await self._router(scope, exchange.receive, exchange.send)
        except Disconnected:
            exchange.status = 499
            self.site.metrics.disconnects.inc()
            scope["state"]["hang_up"]()
        except HTTPException as error:
            method, path = scope["method"], scope["path"][:200]
            message = f"{method} {path}: there is no such endpoint"
            if error.status_code == 405:
                message = f"{path}: {method} is not allowed here"
            await self._fail(scope, exchange, RequestError(error.status_code, message), dict(error.headers or {}))
        except Exception as error:
            await self._fail(scope, exchange, as_request_error(error))
        finally:
            self._note(scope, exchange)

    async def _is_allowed(self, scope: Scope, exchange: Exchange) -> bool:
        """Whether the routes are asked. Answers a browser's question about access itself, and raises RequestError
        where the client may not ask.
        """
        headers = exchange.headers
        if scope["method"] not in METHODS:
            raise RequestError(501, f"Unsupported method ({scope['method'][:40]!r})")
        host = headers.get("host")
        self.access.check_host(host)
        self.access.check_origin(headers.get("origin"), host)
        if scope["method"] == "OPTIONS":
            await Response(status_code=204)(scope, exchange.receive, exchange.send)
            return False
        if scope["path"] != "/health":
            self.access.check_key(headers)
        return True

    async def _fail(
        self, scope: Scope, exchange: Exchange, error: RequestError, headers: dict[str, str] | None = None
    ) -> None:
        if exchange.begun:  # with another answer, which breaks off
            exchange.status = error.status
            scope["state"]["hang_up"]()
            return
        path = scope["path"]
        headers = error.headers | (headers or {})
        if error.status == 401 and path.startswith("/residency"):
            headers["WWW-Authenticate"] = 'Basic realm="the API key as password"'
        body = self.messages.error_body(error) if path.startswith("/v1/messages") else error.body()
        response = Response(body, error.status, headers, media_type="application/json")
        try:
            await response(scope, exchange.receive, exchange.send)
        except Disconnected:
            self.site.metrics.disconnects.inc()
            scope["state"]["hang_up"]()

    def _note(self, scope: Scope, exchange: Exchange) -> None:
        method, path = scope["method"], scope["path"]
        client = scope["client"][0] if scope.get("client") else "?"
        logging.info('%s "%s %s" %d', client, method, path[:200], exchange.status)
        if method != "OPTIONS":
            endpoint = path if path in self._paths else "unknown"
            self.site.metrics.requests.labels(endpoint, str(exchange.status)).inc()

    # Endpoints

    def _generated(self, api: Any) -> Endpoint:
        async def answer(request: Request) -> GeneratedAnswer:
            return GeneratedAnswer(self.site.service, api, await read_json(request, self.limits))

        return answer

    async def _count_tokens(self, request: Request) -> Response:
        body = await read_json(request, self.limits)
        return JSONResponse(await asyncio.to_thread(self.site.service.count_tokens, self.messages, body))

    async def _save_prompt_cache(self, request: Request) -> Response:
        """Saves the KV caches kept; answers when that is done."""
        if self.site.save_prompt_cache is None:
            raise RequestError(404, "there is no file to save to: start the server with --prompt-cache-file")
        if not self.site.worker.is_healthy:
            raise RequestError(503, "the server is loading or shutting down", retry_after_seconds=RETRY_SECONDS)
        try:
            saved = await asyncio.wrap_future(self.site.save_prompt_cache())
        except OSError as error:
            raise RequestError(500, f"the prompt cache cannot be written: {error.strerror or error}") from error
        return JSONResponse(asdict(saved))

    async def _health(self, request: Request) -> Response:
        healthy = self.site.worker.is_healthy
        return JSONResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.site.model_name:
            raise HTTPException(404)
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.site.model_name, "object": "model", "created": self.site.created, "owned_by": "mlx-mimo"}

    async def _metrics(self, request: Request) -> Response:
        text = await asyncio.to_thread(self.site.metrics.text)
        return Response(text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _residency(self, request: Request) -> Response:
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": PAGE_POLICY}
        return Response(residency_page.page(), headers=headers)

    async def _residency_events(self, request: Request) -> Response:
        states = _nothing() if request.method == "HEAD" else self._states(request)
        return EventStream(states, lambda error: event(error.body()))

    async def _states(self, request: Request) -> AsyncGenerator[bytes, None]:
        """A snapshot a second, until the page is closed or the server stops."""
        worker = self.site.worker
        loop = asyncio.get_running_loop()
        while not worker.draining:
            state = await asyncio.to_thread(residency_page.snapshot, worker)
            yield event(json.dumps(state | {"tokens": self.site.metrics.generated_tokens}).encode())
            until = loop.time() + residency_page.SECONDS
            while loop.time() < until and not worker.draining:
                if await request.is_disconnected():
                    return
                await asyncio.sleep(DRAIN_SECONDS)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield b""


def _path(scope: Scope) -> str:
    """Without the query; of a target that is a whole URL, its path. Raises RequestError where the target is no URL."""
    try:
        return urlsplit(scope["path"]).path
    except ValueError:
        scope["path"] = ""
        raise RequestError(400, f"{scope['raw_path'][:200].decode('latin-1')!r}: not a path") from None
