"""The prompt cache on disk: a safetensors file that the next server of the same model begins with."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from ...errors import FormatError
from ...models.cache import SlidingKVCache
from .prompt_cache import Checkpoint, Entry, PromptCache

FORMAT = "mlx_mimo prompt cache 1"
DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.int32: "I32"}
BLOCK_BYTES = 16 * 2**20
MOST_HEADER_BYTES = 100_000_000  # as safetensors' own readers have it
_UNKNOWN_SUM = "0" * 64


@dataclass(frozen=True)
class Saved:
    entries: int
    tokens: int
    bytes: int


class PromptCacheFile:
    """`save` replaces the file as a whole or not at all; `load` takes it only if its sum and fingerprint are right.

    Call both in the thread that owns the caches. The file holds conversations: only its owner can read it.
    """

    def __init__(self, path: Path):
        self.path = path

    def save(self, cache: PromptCache, fingerprint: str) -> Saved:
        """Raises OSError, and then leaves what was there."""
        entries = [entry for entry in cache.entries if _storable(entry)]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.unlink(missing_ok=True)  # of a server that was killed
        try:
            with open(partial, "wb", opener=_new) as file:
                _write(file, entries, fingerprint)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        return Saved(len(entries), sum(len(entry.tokens) for entry in entries), size)

    def load(self, cache: PromptCache, model, fingerprint: str) -> int:
        """Gives the cache as many of the latest entries as it may hold; their number, 0 where there is no file.

        Raises FormatError where the file is damaged, of another model, or something else altogether.
        """
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            header = Header.read(file, self.path.name)
            if header.metadata.get("fingerprint") != fingerprint:
                raise FormatError(f"{self.path.name}: the prompt cache of another model, adapter, window or version")
            if header.metadata.get("sha256") != header.sum_of(file):
                raise FormatError(f"{self.path.name}: damaged: its bytes are not those that were written")
            entries = _read(file, header, model, cache.max_entries, cache.max_bytes)
        for entry in entries:
            cache.give(entry)
        return len(entries)

    def restore(self, cache: PromptCache, model, fingerprint: str) -> None:
        """Loads at the start: what cannot be used is told of, and begun anew."""
        try:
            count = self.load(cache, model, fingerprint)
        except (FormatError, OSError) as error:
            logging.warning("--prompt-cache-file: %s; the cache begins empty, and will replace it", error)
        else:
            logging.info("%d KV caches from %s", count, self.path)


def _new(name: str, flags: int) -> int:
    """A file of its own, the owner's alone: never what somebody else has put there, nor what a link points to."""
    return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _storable(entry: Entry) -> bool:
    """Whether it is made of what `_read` makes again."""
    kinds = all(type(cache) in (KVCache, SlidingKVCache) and cache.keys is not None for cache in entry.caches)
    return kinds and all(cache.offset == len(entry.tokens) for cache in entry.caches)


def _arrays(entry: Entry) -> Iterator[tuple[str, mx.array]]:
    """An entry's arrays by name, without the room that caches keep for more."""
    yield "tokens", mx.array(entry.tokens, mx.int32)
    for layer, cache in enumerate(entry.caches):
        held = cache.held if isinstance(cache, SlidingKVCache) else cache.offset
        yield f"{layer}.keys", cache.keys[..., :held, :]
        yield f"{layer}.values", cache.values[..., :held, :]
    for point in entry.checkpoints:
        for layer, (keys, values) in point.windows.items():
            yield f"at{point.length}.{layer}.keys", keys
            yield f"at{point.length}.{layer}.values", values


def _write(file, entries: list[Entry], fingerprint: str) -> None:
    """Header and data, one array at a time: a second copy of all caches may not fit."""
    fields: dict[str, dict] = {}
    end = 0
    for number, entry in enumerate(entries):
        for name, array in _arrays(entry):
            begin, end = end, end + array.nbytes
            field = {"dtype": DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
            fields[f"{number}.{name}"] = field
    described = [{"checkpoints": [point.length for point in entry.checkpoints]} for entry in entries]
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "entries": json.dumps(described), "sha256": _UNKNOWN_SUM}
    header = json.dumps({"__metadata__": metadata} | fields).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    file.write(head)
    digest = hashlib.sha256(head)
    for entry in entries:
        for _, array in _arrays(entry):
            data = np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data
            digest.update(data)
            file.write(data)
    # The sum stands in what it is the sum of: it is as long as the zeros that hold its place meanwhile.
    file.seek(0)
    file.write(head.replace(_UNKNOWN_SUM.encode(), digest.hexdigest().encode(), 1))
    file.seek(0, os.SEEK_END)


@dataclass(frozen=True)
class Header:
    """What stands before the data. Nothing in it may be relied on before the sum has been compared."""

    raw: bytes
    metadata: dict[str, str]
    fields: dict[str, dict]

    @classmethod
    def read(cls, file, name: str) -> "Header":
        """Raises FormatError where this is no prompt cache."""
        start = file.read(8)
        raw = start + file.read(min(int.from_bytes(start, "little"), MOST_HEADER_BYTES))
        try:
            fields = json.loads(raw[8:])
            metadata = fields.pop("__metadata__")
            good = metadata["format"] == FORMAT and len(metadata["sha256"]) == len(_UNKNOWN_SUM)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            good = False
        if not good:
            raise FormatError(f"{name}: not a prompt cache, or not a whole one")
        return cls(raw, metadata, fields)

    def sum_of(self, file) -> str:
        """Of the header, its own place in it apart, and all that follows."""
        digest = hashlib.sha256(self.raw.replace(self.metadata["sha256"].encode(), _UNKNOWN_SUM.encode(), 1))
        file.seek(len(self.raw))
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()

    def place(self, name: str) -> tuple[int, int]:
        """(first byte, bytes) of an array"""
        begin, end = self.fields[name]["data_offsets"]
        return len(self.raw) + begin, end - begin


def _read(file, header: Header, model, max_entries: int, max_bytes: int | None) -> list[Entry]:
    """The latest entries that fit, the least recently used first."""
    described = json.loads(header.metadata["entries"])
    sizes = [0] * len(described)
    for name in header.fields:
        owner, _, of = name.partition(".")
        sizes[int(owner)] += 0 if of == "tokens" else header.place(name)[1]
    chosen: list[int] = []
    total = 0
    for number in reversed(range(len(described))):
        total += sizes[number]
        if len(chosen) == max_entries or (max_bytes is not None and total > max_bytes):
            break
        chosen.insert(0, number)
    return [_entry(file, header, n, described[n]["checkpoints"], model.make_cache()) for n in chosen]


def _entry(file, header: Header, number: int, lengths: list[int], caches: list) -> Entry:
    def array(name: str) -> mx.array:
        name = f"{number}.{name}"
        begin, size = header.place(name)
        file.seek(begin)
        kind = next(kind for kind, text in DTYPES.items() if text == header.fields[name]["dtype"])
        return mx.array(np.frombuffer(file.read(size), np.uint8)).view(kind).reshape(header.fields[name]["shape"])

    entry = Entry(cast(list[int], array("tokens").tolist()), caches)
    for layer, cache in enumerate(caches):
        cache.keys, cache.values = array(f"{layer}.keys"), array(f"{layer}.values")
        cache.offset = len(entry.tokens)
        if isinstance(cache, SlidingKVCache):
            cache.held = cache.keys.shape[2]
    sliding = [layer for layer, cache in enumerate(caches) if isinstance(cache, SlidingKVCache)]
    for length in lengths:
        windows = {layer: (array(f"at{length}.{layer}.keys"), array(f"at{length}.{layer}.values")) for layer in sliding}
        entry.checkpoints.append(Checkpoint(length, windows))
    mx.eval([(cache.keys, cache.values) for cache in caches], [p.windows for p in entry.checkpoints])
    return entry
