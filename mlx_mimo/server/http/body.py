"""A request's body, within limits of size and time."""

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ..api.body import parse
from ..errors import Disconnected, RequestError


@dataclass(frozen=True)
class BodyLimits:
    bytes: int = 32 * 10**6
    seconds: float = 60.0


async def read_json(request: Request, limits: BodyLimits) -> dict[str, Any]:
    """The JSON object that a request's body is. Raises RequestError and Disconnected."""
    try:
        async with asyncio.timeout(limits.seconds):
            raw = await _read(request, limits.bytes)
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {limits.seconds:g} s") from None
    except ClientDisconnect:
        raise Disconnected from None
    return await asyncio.to_thread(parse, raw) if len(raw) > 100_000 else parse(raw)


async def _read(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length")
    if length is not None and int(length) > most:  # a number: h11 has looked
        raise RequestError(413, f"the body may have {most:,} bytes, {int(length):,} announced")
    if length is None and "transfer-encoding" not in request.headers:
        raise RequestError(411, "Content-Length: expected")
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > most:
            raise RequestError(413, f"the body may have {most:,} bytes, more came")
    return bytes(raw)
