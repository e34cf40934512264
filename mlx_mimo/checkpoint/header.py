"""Safetensors headers, checked when they are read.

A safetensors file is 8 bytes of little-endian header length, that many bytes of JSON (name → dtype, shape,
data_offsets), then the data, which the tensors must cover without gap or overlap
(https://github.com/huggingface/safetensors#format).
"""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


class TensorEntry(NamedTuple):  # of which the released model has 109,000
    """One tensor of a file; `offset` is its first byte counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file."""

    path: Path
    data_offset: int  # first byte of the data, counted from the start of the file
    file_bytes: int  # what the header says the file's size is
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of a local file.

    Raises FormatError, beginning with the file's name, for anything that is not a whole safetensors file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise FormatError(f"{path.name}: {size} bytes, too short for a safetensors file; fetch it again")
            length = check_length(path, prefix, size)
            text = file.read(length)
    except FileNotFoundError:
        raise FormatError(f"{path.name}: no such file in {path.parent}; fetch it again") from None
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if len(text) < length:
        raise FormatError(f"{path.name}: header cut short, {length:,} bytes expected, {len(text):,} found")
    return parse_header(path, text, size)


def check_length(path: Path, prefix: bytes, file_bytes: int | None) -> int:
    """The header's length in bytes, from the file's first 8 bytes. Raises FormatError for an impossible length."""
    length = int.from_bytes(prefix[:8], "little")
    limit = MAX_HEADER_BYTES if file_bytes is None else min(MAX_HEADER_BYTES, file_bytes - 8)
    if not 2 <= length <= limit:
        raise FormatError(
            f"{path.name}: header of {length:,} bytes, at most {limit:,} expected; not a safetensors file or cut short"
        )
    return length


def parse_header(path: str | os.PathLike[str], text: bytes, file_bytes: int | None) -> Header:
    """The checked header in its JSON bytes. `file_bytes`, where known, must be what the offsets add up to.

    Raises FormatError, beginning with the file's name.
    """
    path = Path(path)
    with _collector_paused():
        return _parse(path, text, file_bytes)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without Python's garbage collector: thousands of new objects, none of them garbage, would start it again and
    again, for half of the time that a released model's headers take."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parse(path: Path, text: bytes, file_bytes: int | None) -> Header:
    try:
        fields = _fields(path, text)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: header is not JSON ({error}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{path.name}: header is a JSON {type(fields).__name__}, an object expected")
    metadata = fields.pop("__metadata__", None) or {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path.name}: __metadata__ must map strings to strings")
    start = 8 + len(text)
    tensors = {name: _entry(path, name, field, start) for name, field in fields.items()}
    end = _check_cover(path, tensors, start)
    if file_bytes is not None and file_bytes != end:
        raise FormatError(
            f"{path.name}: {end:,} bytes expected from its header, {file_bytes:,} found; fetch or convert it again"
        )
    return Header(path, start, end, tensors, metadata)


def _fields(path: Path, text: bytes) -> object:
    """The parsed JSON of a header. Raises FormatError where a key stands twice, and ValueError for what is not JSON.

    json's own hook for duplicate keys costs a call for each tensor. Counting is faster: a duplicate key is in the text
    more often than among the parsed keys. Where the counts differ for another reason, the hook decides.
    """
    fields = json.loads(text.decode("utf-8"))
    if isinstance(fields, dict) and b"\\" not in text:  # which could spell a key in another way
        metadata = fields.get("__metadata__")
        tensors = len(fields) - ("__metadata__" in fields)
        keys = ["__metadata__", *(metadata if isinstance(metadata, dict) else ())]
        often = [text.count(name) for name in (b'"dtype"', b'"shape"', b'"data_offsets"')]
        total = 4 * tensors + len(keys) - ("__metadata__" not in fields)
        if (
            often == [tensors] * 3
            and text.count(b'":') == total
            and all(text.count(f'"{key}"'.encode()) <= 1 for key in keys)
        ):
            return fields
    return json.loads(text.decode("utf-8"), object_pairs_hook=partial(_unique, path))


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{path.name}: {twice!r} stands twice in the header")
    return fields


def _are_sizes(values: object) -> bool:
    """Whether it is a list of ints from 0; bools do not count. Fast, since the released model has 109,000 tensors."""
    if type(values) is not list:
        return False
    return not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 1 << 63)


def _entry(path: Path, name: str, field: object, start: int) -> TensorEntry:
    if not isinstance(field, dict):
        raise FormatError(f"{path.name}: {name}: a JSON object with dtype, shape, data_offsets expected")
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"{path.name}: {name}: unknown dtype {dtype!r}")
    # One call for both, which is faster; which of them is wrong is asked only when one is.
    if not (type(shape) is type(offsets) is list and len(offsets) == 2 and _are_sizes(shape + offsets)):
        if not _are_sizes(shape):
            raise FormatError(f"{path.name}: {name}: shape {shape!r} is not a list of sizes")
        raise FormatError(f"{path.name}: {name}: data_offsets {offsets!r} are not [begin, end]")
    nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(
            f"{path.name}: {name}: {dtype} {shape} takes {nbytes:,} bytes, "
            f"data_offsets span {offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _check_cover(path: Path, tensors: dict[str, TensorEntry], start: int) -> int:
    """Where the data end. Raises FormatError where the tensors leave a gap or overlap."""
    end = start
    for entry in sorted(tensors.values(), key=itemgetter(3, 4)):  # offset, nbytes
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise FormatError(
                f"{path.name}: {entry.name} {fault}: begins at byte {entry.offset - start:,} of the data, "
                f"{end - start:,} expected"
            )
        end += entry.nbytes
    return end
