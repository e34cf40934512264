"""What each of the APIs does: it reads requests and writes answers. The service does the rest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..engine.results import Progress
from ..errors import RequestError
from .deltas import Delta
from .request import CompletionRequest
from .served_model import ServedModel

KEEP_ALIVE = b": working\n\n"  # a comment of an event stream


@dataclass(frozen=True)
class Choice:
    """One sequence of an answer, as it is generated."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    deltas: Iterator[Delta | Progress]

    def parts(self) -> Iterator[Delta]:
        """Without the prompt's progress."""
        return (delta for delta in self.deltas if isinstance(delta, Delta))


class Api(Protocol):
    """Choices come one after another: each is to be read to its end before the next is asked for."""

    def parse(self, body: dict[str, Any], served: ServedModel) -> CompletionRequest:
        """Raises RequestError naming the field at fault."""
        ...

    def whole(self, request: CompletionRequest, choices: Iterable[Choice], served: ServedModel) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def stream(self, request: CompletionRequest, choices: Iterable[Choice], served: ServedModel) -> Iterator[bytes]:
        """The answer as an event stream. The first piece, which may be empty, comes when the first choice begins."""
        ...

    def error_body(self, error: RequestError) -> bytes: ...

    def error_event(self, error: RequestError) -> bytes:
        """Ends a stream that has begun."""
        ...


def event(body: bytes, name: str | None = None) -> bytes:
    """One of an event stream."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + body + b"\n\n"
