"""What the engine answers a request with, and the queue on which it comes."""

from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue


@dataclass(frozen=True)
class TopToken:
    id: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """One token of an answer. `text` is what it adds, which may be empty while a character is incomplete."""

    text: str
    id: int
    logprob: float
    finish_reason: str | None = None  # "stop" or "length" with the last one
    top: tuple[TopToken, ...] = ()  # the most likely tokens in its place, the likeliest first


@dataclass(frozen=True)
class Progress:
    """Tokens of the prompt that have been computed."""

    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """The prompt is known, and computing it begins."""

    prompt_tokens: int
    cached_tokens: int  # that need not be computed again
    state: str  # "reasoning" where the prompt ends within thoughts, else "normal"


Result = Started | Progress | Token


class Results:
    """Queue of one request's results; cancelling stops generation.

    The generation thread calls `put`, `end` and `fail`, and looks at `cancelled`. One other thread reads.
    """

    def __init__(self) -> None:
        self._queue: Queue[Result | BaseException | None] = Queue()
        self._reason: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        return self._reason is not None

    def put(self, result: Result) -> None:
        self._queue.put(result)

    def end(self) -> None:
        """The answer is complete."""
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """The reader gets what was put before, then this error."""
        self._queue.put(error)

    def cancel(self, reason: BaseException) -> None:
        """Stops generation. A reader gets `reason` at once, whatever was put before."""
        if self._reason is None:
            self._reason = reason
            self._queue.put(reason)

    def get(self) -> Result | None:
        """The next result, None at the end. Waits for it. Raises what `fail` or `cancel` was given."""
        result = self._queue.get()
        if self._reason is not None:
            raise self._reason
        if isinstance(result, BaseException):
            raise result
        return result

    def __iter__(self) -> Iterator[Result]:
        while (result := self.get()) is not None:
            yield result


@dataclass
class Generation:
    """An answer that is being generated: iterate over `results` for its tokens, with the prompt's progress between."""

    started: Started
    results: Iterator[Result]
