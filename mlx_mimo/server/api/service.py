"""Answers requests of every API with one engine. What it returns is ready for the wire; it knows no sockets."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from typing import Any, Protocol

from ..cancellation import Cancellation
from ..engine.request import Chat, GenerationRequest
from ..engine.results import Generation
from ..errors import RequestError
from .anthropic import Messages
from .deltas import deltas
from .protocol import Api, Choice
from .request import CompletionRequest
from .served_model import ServedModel

RETRY_SECONDS = 5

Choices = Generator[Choice, None, None]
Answer = dict[str, Any] | Generator[bytes, None, None]


class Engine(Protocol):
    """What the service needs of the engine; see `engine.worker.Worker`."""

    @property
    def is_healthy(self) -> bool: ...

    def place(self) -> AbstractContextManager[None]: ...

    def generate(
        self, request: GenerationRequest, cancellation: Cancellation
    ) -> AbstractContextManager[Generation]: ...

    def count_tokens(self, prompt: Chat) -> int: ...


class Service:
    """`served` describes the model, and is asked only once the engine is healthy."""

    def __init__(self, engine: Engine, served: Callable[[], ServedModel]):
        self.engine = engine
        self._served = served

    def answer(self, api: Api, body: dict[str, Any], cancellation: Cancellation) -> Answer:
        """The whole answer, or the pieces of a stream where the request asks for one.

        Blocks until there is something to say, here or in the iterator, which the caller must close. Raises
        RequestError, and Disconnected once it is cancelled.
        """
        served = self.served()
        request = api.parse(body, served)
        if request.stream:
            return self._stream(api, request, served, cancellation)
        with closing(self._choices(request, served, cancellation)) as choices:
            return api.whole(request, choices, served)

    def count_tokens(self, api: Messages, body: dict[str, Any]) -> dict[str, int]:
        """How long the prompt of a message would be; nothing is generated. Raises RequestError."""
        return {"input_tokens": self.engine.count_tokens(api.prompt_to_count(body, self.served()))}

    def served(self) -> ServedModel:
        """Raises RequestError while there is no model."""
        if not self.engine.is_healthy:
            raise RequestError(503, "the server is loading or shutting down", retry_after_seconds=RETRY_SECONDS)
        return self._served()

    def _stream(
        self, api: Api, request: CompletionRequest, served: ServedModel, cancellation: Cancellation
    ) -> Generator[bytes, None, None]:
        with closing(self._choices(request, served, cancellation)) as choices:
            yield from api.stream(request, choices, served)

    def _choices(self, request: CompletionRequest, served: ServedModel, cancellation: Cancellation) -> Choices:
        """One after another; a choice's generation ends when the next is asked for."""
        with self.engine.place():
            for index in range(request.choices):
                with self.engine.generate(request.choice(index), cancellation) as generation:
                    started = generation.started
                    parts = deltas(generation.results, started.state, request, served)
                    yield Choice(index, started.prompt_tokens, started.cached_tokens, parts)
