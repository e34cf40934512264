"""From a generator that blocks to the event loop: it runs in a thread of its own, so that none starves another."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from typing import Generic, TypeVar

from ..cancellation import Cancellation
from ..errors import Disconnected, RequestError

ROOM = 64  # items on the way at most: a client that reads slowly slows the generator down
RETRY_SECONDS = 5

T = TypeVar("T")


class _End:
    """What comes last: the generator's exception, or none."""

    def __init__(self, error: BaseException | None):
        self.error = error


class _Handoff(Generic[T]):
    """Items from a thread to the event loop of the thread that makes this object."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._room = threading.Semaphore(ROOM)
        self._closed = False

    def put(self, item: T) -> None:
        """Waits for room. Raises Disconnected once the reader has closed the handoff."""
        self._room.acquire()
        if self._closed:
            raise Disconnected
        self._send(item)

    def end(self, error: BaseException | None) -> None:
        if not self._closed:
            self._send(_End(error))

    async def get(self) -> T | _End:
        item = await self._items.get()
        self._room.release()
        return item

    def close(self) -> None:
        """Ends the thread's next `put`, and one that waits."""
        self._closed = True
        self._room.release()

    def _send(self, item: "T | _End") -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop has ended, and its readers with it
            raise Disconnected from None


async def in_thread(
    make: Callable[[], Generator[T, None, None]], cancellation: Cancellation
) -> AsyncGenerator[T, None]:
    """The items of the generator that `make` returns, which is made, run and closed in one thread.

    Cancels on exit, and leaves the thread to end by itself. Raises what the generator raises, and RequestError where
    the system has no thread left.
    """
    handoff: _Handoff[T] = _Handoff()

    def run() -> None:
        error: BaseException | None = None
        try:
            with closing(make()) as items:
                for item in items:
                    handoff.put(item)
        except BaseException as raised:
            error = raised
        try:
            handoff.end(error)
        except Disconnected:
            return

    try:
        threading.Thread(target=run, name="request", daemon=True).start()
    except RuntimeError as error:
        raise RequestError(503, f"this machine is too busy: {error}", retry_after_seconds=RETRY_SECONDS) from None
    try:
        while not isinstance(item := await handoff.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        cancellation.cancel()
        handoff.close()
