"""Writes one output file: threads read and compute its pieces, which are written in order under a temporary name.

The file gets its own name when it is whole and flushed to the disk.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mimo.checkpoint import shapes
from mlx_mimo.checkpoint.layout import Item, OutputFile
from mlx_mimo.errors import MimoError

from .quantize import Encoded

PART = ".part"
STAGED = "fetched-"  # prefix of a fetched file's name, so that mlx-lm does not load it
FLUSH_BYTES = 1 << 26  # after so many bytes a flush begins, so that little is left when the file is whole
PIECE_ELEMENTS = 1 << 21  # of a matrix, at most: what one thread holds as float32 is 8 MiB


@dataclass
class Report:
    """What the journal, and later the manifest, records of a finished file."""

    name: str
    nbytes: int
    sha256: str
    errors: dict[str, list[float]] = field(default_factory=dict)  # kind → [squared error, squared weight]
    cells: dict[str, list[int]] = field(default_factory=dict)  # kind → [scales, scales without a ±448 code]
    sources: dict[str, list] = field(default_factory=dict)  # source file → identity


@dataclass(frozen=True)
class Piece:
    """Rows [begin, end) of an item, ready to be written."""

    encoded: Encoded
    full_scale: object = None  # (scale rows, scale columns) bool: the cells that own a ±448 code


def row_ranges(item: Item) -> list[tuple[int, int]]:
    rows = item.source.shape[0]
    columns = item.source.shape[1] if len(item.source.shape) == 2 else 1
    step = max(1, PIECE_ELEMENTS // max(columns, 1))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def in_order(pool: ThreadPoolExecutor, calls: Iterator[Callable], ahead: int) -> Iterator:
    """Yields the results of the calls in their order; at most `ahead` of them run or wait in the pool."""
    waiting: deque[Future] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class FileWriter:
    """Writes `directory/name.part`, counts and hashes its bytes, and renames it when it is finished."""

    def __init__(self, directory: Path, name: str):
        self.path = directory / name
        self.part = directory / (name + PART)
        self.nbytes = 0
        self._hash = hashlib.sha256()
        self._file = open(self.part, "wb", buffering=0)  # noqa: SIM115 - closed by finish or abandon
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future | None = None
        self._flushed = 0

    def write(self, data) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while view:
            written = self._file.write(view)
            self.nbytes += written
            view = view[written:]
        if self.nbytes - self._flushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._wait()
            self._flushed = self.nbytes
            self._flush = self._flusher.submit(os.fsync, self._file.fileno())

    def _wait(self) -> None:
        """Waits for the flush under way. Raises what it raised."""
        if self._flush is not None:
            self._flush.result()

    def finish(self) -> str:
        """Flushes to the disk, gives the file its name, and returns its sha256."""
        self._wait()
        self._flusher.shutdown()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.part, self.path)
        flush_directory(self.path.parent)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._flusher.shutdown()
        self._file.close()
        self.part.unlink(missing_ok=True)


def flush_directory(directory: Path) -> None:
    """Makes the renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file, which other processes see either whole or not at all."""
    writer = FileWriter(path.parent, path.name)
    try:
        writer.write(data)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def write_file(
    directory: Path,
    output: OutputFile,
    compute: Callable[[Item, int, int], Piece],
    pool: ThreadPoolExecutor,
    ahead: int,
    advance: Callable[[int], None] = lambda written_bytes: None,
) -> Report:
    """Writes `output` into `directory` and returns its Report. `compute(item, begin, end)` runs in the pool's threads.

    Raises what `compute` raises, and MimoError where the disk is full; the partial file is removed then.
    """
    errors: dict[str, list[float]] = {}
    cells: dict[str, list[int]] = {}
    writer: FileWriter | None = None
    try:
        writer = FileWriter(directory, output.name)
        writer.write(output.header)
        work = [(item, begin, end) for item in output.items for begin, end in row_ranges(item)]
        pieces = in_order(pool, ((lambda w=w: compute(*w)) for w in work), ahead)
        rest: list[list[bytes]] = []  # scales and biases follow the whole weight, and are small
        found = None
        for (item, _, end), piece in zip(work, pieces):
            parts = piece.encoded.parts
            writer.write(parts["weight"])
            rest.append([parts[name].tobytes() for name in ("scales", "biases") if name in parts])
            if item.quantization or item.source.dtype == "F8_E4M3":
                total = errors.setdefault(item.source.kind, [0.0, 0.0])
                total[0] += piece.encoded.squared_error
                total[1] += piece.encoded.squared_weight
            if piece.full_scale is not None:
                found = piece.full_scale if found is None else found | piece.full_scale
            if end == item.source.shape[0]:
                for column in zip(*rest):
                    for data in column:
                        writer.write(data)
                if found is not None:
                    count = cells.setdefault(item.source.kind, [0, 0])
                    count[0] += found.size
                    count[1] += found.size - int(found.sum())
                rest, found = [], None
            advance(sum(part.nbytes for part in parts.values()))
        if writer.nbytes != len(output.header) + output.data_bytes:
            raise MimoError(f"{output.name}: {writer.nbytes:,} bytes written, other than planned; please report this")
        return Report(output.name, writer.nbytes, writer.finish(), errors, cells)
    except OSError as error:
        if writer:
            writer.abandon()
        raise MimoError(
            f"{output.name}: {error.strerror}: {directory} cannot be written; make room and run the same command again"
        ) from error
    except BaseException:
        if writer:
            writer.abandon()
        raise


def source_names(output: OutputFile, weight_map: dict[str, str]) -> set[str]:
    """The names of the source files that an output file is made from."""
    files = set()
    for item in output.items:
        files.add(weight_map[item.source.name])
        if item.source.name + shapes.SCALE in weight_map:
            files.add(weight_map[item.source.name + shapes.SCALE])
    return files
