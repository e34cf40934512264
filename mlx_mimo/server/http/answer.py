"""An answer that is generated while it is sent: whole or a stream, called off when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ..api.protocol import Api
from ..api.service import Service
from ..cancellation import Cancellation
from ..errors import Disconnected, RequestError
from .errors import as_request_error
from .thread import in_thread


class EventStream(Response):
    """Server-sent events. Errors before the first piece are raised; later ones are written by `error_event`."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], error_event: Callable[[RequestError], bytes]):
        super().__init__(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.pieces = pieces
        self.error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.pieces) as pieces:
            first = await anext(pieces, b"")
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await send(_piece(first))
                async for piece in pieces:
                    await send(_piece(piece))
            except Disconnected:
                raise
            except Exception as error:
                await send(_piece(self.error_event(as_request_error(error))))
        await send(_piece(b"", more=False))


class GeneratedAnswer:
    """An ASGI application: what the service answers to a body, in the form of an API."""

    def __init__(self, service: Service, api: Api, body: dict[str, Any]):
        self.service, self.api, self.body = service, api, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cancellation = Cancellation()

        def make() -> Generator[dict[str, Any] | bytes, None, None]:
            answer = self.service.answer(self.api, self.body, cancellation)
            if isinstance(answer, dict):
                yield answer
            else:
                yield from answer

        async with cancelled_when_left(receive, cancellation), aclosing(in_thread(make, cancellation)) as items:
            first = await anext(items, b"")
            if isinstance(first, dict):
                response: Response = JSONResponse(first)
            else:
                response = EventStream(_stream(first, items), self.api.error_event)
            await response(scope, receive, send)


@asynccontextmanager
async def cancelled_when_left(receive: Receive, cancellation: Cancellation) -> AsyncIterator[None]:
    """Watches the connection, after the body was read: any message says that the client has left."""

    async def watch() -> None:
        await receive()
        cancellation.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _stream(first: Any, rest: AsyncIterator[Any]) -> AsyncGenerator[bytes, None]:
    yield first
    async for piece in rest:
        yield piece


def _piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
