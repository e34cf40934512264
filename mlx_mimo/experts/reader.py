"""Parallel positional reads of expert records into given buffers, by a bounded number of threads.

One record is one contiguous range of its layer's file; `preadv` scatters it over the tensors of a slot in one system
call. The caller decides which expert is read, and where to.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..checkpoint.record import ExpertFile
from ..errors import MimoError

INLINE_BYTES = 256 * 1024  # smaller batches are read by the calling thread: waking another costs more than the read
MEMORY = 1 / 8  # weight of the latest batch in `ExpertReader.waiting`


@dataclass(frozen=True)
class ReadRequest:
    """Expert `expert` of layer `layer`, to be read into `buffers`, which together hold one record."""

    layer: int
    expert: int
    buffers: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class ReadBatch:
    """Reads that have been started. Until `wait` returns, their buffers may be written.

    `ended`, where given, is called once with the seconds that the batch took, and with its seconds of processor time.
    """

    def __init__(self, requests: Sequence[ReadRequest], ended: Callable[[float, float], None] | None = None):
        self.requests = requests
        self.errors: list[MimoError | None] = [None] * len(requests)
        self._ended = ended
        self._began = time.perf_counter()
        self._processor_seconds = 0.0
        self._open = len(requests)
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not requests:
            self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> list[MimoError | None]:
        """Blocks until every request has been read or has failed; returns an error or None for each, in order."""
        self._done.wait()
        return self.errors

    def _finish(self, index: int, error: MimoError | None, processor_seconds: float) -> None:
        self.errors[index] = error
        with self._lock:
            self._processor_seconds += processor_seconds
            self._open -= 1
            last = self._open == 0
        if last:
            if self._ended is not None:
                self._ended(time.perf_counter() - self._began, self._processor_seconds)
            self._done.set()


class ExpertReader:
    """Reads records of the given files, at most `threads` at a time.

    The files stay open until `close`. `bytes_read`, `calls` (system calls that returned data) and `seconds` (wall time
    during which at least one read was running) only grow. `waiting`, 0 to 1, is the share of the latest batches' time
    in which their threads waited for the disk and left the processor free. Tests replace `preadv` to inject faults.

    Raises MimoError for a file that cannot be opened or is too short.
    """

    def __init__(
        self,
        files: dict[int, ExpertFile],
        threads: int = 8,
        preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv,
    ):
        if threads < 1:
            raise ValueError(f"{threads} reader threads, at least one expected")
        self.files = files
        self.threads = threads
        self.bytes_read = 0
        self.calls = 0
        self.waiting = 0.0
        self._preadv = preadv
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._running = 0
        self._since = 0.0
        self._queue: queue.SimpleQueue[tuple[ReadBatch, int] | threading.Barrier | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._fds: dict[int, int] = {}
        try:
            for layer, file in files.items():
                self._fds[layer] = _open(file)
        except BaseException:
            self.close()
            raise

    def read(self, requests: Iterable[ReadRequest]) -> None:
        """Reads all of `requests`; raises the first MimoError once every request has been read or has failed."""
        for error in self.submit(requests).wait():
            if error is not None:
                raise error

    def submit(self, requests: Iterable[ReadRequest], background: bool = False) -> ReadBatch:
        """Starts the reads, largest first, and returns at once.

        A small batch is read by the calling thread before this returns, unless it is for the `background`.
        """
        requests = list(requests)
        sizes = [request.nbytes for request in requests]
        order = sorted(range(len(requests)), key=sizes.__getitem__, reverse=True)
        if sum(sizes) < INLINE_BYTES and not background:
            batch = ReadBatch(requests)
            for index in order:
                interrupt = self._serve(batch, index)
                if interrupt is not None:
                    raise interrupt
            self.waiting -= self.waiting * MEMORY  # this thread was busy throughout
            return batch
        lanes = min(self.threads, len(requests), os.cpu_count() or 1)
        batch = ReadBatch(requests, lambda seconds, busy: self._note_waiting(1.0 - busy / (seconds * lanes)))
        self._start_workers(len(requests))
        for index in order:
            self._queue.put((batch, index))
        return batch

    @property
    def seconds(self) -> float:
        with self._lock:
            running = time.perf_counter() - self._since if self._running else 0.0
            return self._seconds + running

    def drain(self) -> None:
        """Blocks until everything submitted has been read or has failed, also batches that no caller holds any more."""
        readers = self._alive()
        meeting = threading.Barrier(len(readers) + 1)
        for _ in readers:
            self._queue.put(meeting)
        try:
            meeting.wait()
        except BaseException:
            meeting.abort()  # otherwise the threads would wait for this one, which was interrupted
            raise

    @property
    def idle(self) -> bool:
        return self._running == 0 and self._queue.empty()

    def close(self) -> None:
        """Ends the threads once they have read what is queued, then closes the files."""
        readers = self._alive()
        for _ in readers:
            self._queue.put(None)
        for worker in readers:
            worker.join()
        self._workers.clear()
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _note_waiting(self, share: float) -> None:
        with self._lock:
            self.waiting += (min(1.0, max(0.0, share)) - self.waiting) * MEMORY

    def _alive(self) -> list[threading.Thread]:
        """The threads that were started."""
        return [worker for worker in self._workers if worker.is_alive()]

    def _start_workers(self, wanted: int) -> None:
        if len(self._workers) < min(self.threads, wanted):
            self._workers = self._alive()
        while len(self._workers) < min(self.threads, wanted):
            worker = threading.Thread(target=self._work, name=f"expert-reader-{len(self._workers)}", daemon=True)
            self._workers.append(worker)  # before it starts: `close` could not end a thread that is not in the list
            worker.start()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            if isinstance(task, threading.Barrier):
                with suppress(threading.BrokenBarrierError):
                    task.wait()
            else:
                self._serve(*task)

    def _serve(self, batch: ReadBatch, index: int) -> BaseException | None:
        """Reads one request and finishes it, in any thread; returns an interrupt that came meanwhile."""
        error: MimoError | None = None
        interrupt: BaseException | None = None
        busy = time.thread_time()
        with self._lock:
            if self._running == 0:
                self._since = time.perf_counter()
            self._running += 1
        try:
            self._read_record(batch.requests[index])
        except MimoError as known:
            error = known
        except BaseException as unknown:  # a thread must not end and leave the caller waiting
            request = batch.requests[index]
            error = MimoError(self._where(request) + f"cannot be read: {unknown!r}")
            error.__cause__ = unknown
            interrupt = None if isinstance(unknown, Exception) else unknown
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._seconds += time.perf_counter() - self._since
            batch._finish(index, error, time.thread_time() - busy)
        return interrupt

    def _where(self, request: ReadRequest) -> str:
        file = self.files.get(request.layer)
        name = file.path.name if file else "no file"
        return f"{name}: layer {request.layer} expert {request.expert} "

    def _read_record(self, request: ReadRequest) -> None:
        file, fd = self.files[request.layer], self._fds.get(request.layer)
        if fd is None:
            raise MimoError(self._where(request) + "wanted after the reader was closed")
        size = request.nbytes
        if size != file.layout.nbytes:
            raise MimoError(self._where(request) + f"is {file.layout.nbytes:,} bytes, the buffers hold {size:,}")
        offset, views, missing = file.offset(request.expert), list(request.buffers), size
        while missing:
            try:
                count = self._preadv(fd, views, offset)
            except InterruptedError:
                continue
            except OSError as error:
                reason = error.strerror or str(error)
                raise MimoError(
                    self._where(request) + f"cannot be read at byte {offset:,}: {reason}; check the disk"
                ) from error
            if count == 0:
                raise MimoError(
                    self._where(request) + f"ends {missing:,} bytes early, at byte {offset:,}: the file was cut short "
                    "while in use; run the same mlx_mimo convert again to mend it"
                )
            with self._lock:
                self.bytes_read += count
                self.calls += 1
            offset, missing = offset + count, missing - count
            if missing:
                views = _after(views, count)


def _open(file: ExpertFile) -> int:
    try:
        fd = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise MimoError(f"{file.path.name}: cannot be opened: {error.strerror} ({file.path})") from error
    expected, found = file.data_offset + file.num_experts * file.layout.nbytes, os.fstat(fd).st_size
    if found < expected:
        os.close(fd)
        raise MimoError(
            f"{file.path.name}: {expected:,} bytes expected, {found:,} found; "
            "run the same mlx_mimo convert again to mend it"
        )
    return fd


def _after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The views, or parts of them, that remain to be filled after their first `count` bytes."""
    left = []
    for view in views:
        if count >= view.nbytes:
            count -= view.nbytes
        else:
            left.append(view.cast("B")[count:] if count else view)
            count = 0
    return left
