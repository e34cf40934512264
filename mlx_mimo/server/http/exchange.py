"""One request and its answer on the wire: the headers that every answer has, deadlines, what has happened so far."""

import asyncio
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from ..errors import Disconnected
from .access import Access

WRITE_SECONDS = 60.0  # a client that reads nothing for so long has gone


class Exchange:
    """Stands between uvicorn and the routes: `receive` and `send` are theirs to use."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, access: Access):
        self.headers = Headers(scope=scope)
        self.status = 500  # until the answer begins
        self.begun = False
        self._receive, self._send = receive, send
        self._access = access
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        self._body_is_read = length in (None, "0") and coding is None

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._body_is_read = True
        return message

    async def send(self, message: Message) -> None:
        """Raises Disconnected where the client does not read."""
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            self._add_headers(MutableHeaders(scope=message))
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._send(message)
        except TimeoutError:
            raise Disconnected from None

    def _add_headers(self, headers: MutableHeaders) -> None:
        headers["X-Content-Type-Options"] = "nosniff"
        if not self._body_is_read:  # what is left of it would be taken for the next request
            headers["Connection"] = "close"
        origin = self._access.allowed_origin(self.headers.get("origin"))
        if origin is not None:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            asked = self.headers.get("access-control-request-headers")
            headers["Access-Control-Allow-Headers"] = _headers_that_may_be_sent(asked)
            headers["Vary"] = "Origin"


def _headers_that_may_be_sent(asked: str | None) -> str:
    """By a page of an allowed origin: all it asks for, if they are names of headers."""
    if asked and len(asked) <= 4096 and re.fullmatch(r"[\w\-]+([ \t]*,[ \t]*[\w\-]+)*", asked, re.ASCII):
        return asked
    return "Authorization, Content-Type, x-api-key"
