"""KV caches of past requests, so that a conversation's next turn computes only what is new.

Global layers can be cut back to any length; sliding layers cannot once their window has moved on. Each entry
therefore keeps the sliding layers' small windows at a few positions (checkpoints) where the next request may branch
off: the end of the system message and the ends of prompts.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ...models.cache import SlidingKVCache, rollback

MOST_CHECKPOINTS = 4


@dataclass
class Checkpoint:
    """The sliding layers as they were after `length` tokens: {layer: (keys, values)}."""

    length: int
    windows: dict[int, tuple[mx.array, mx.array]]

    @classmethod
    def of(cls, caches: Sequence) -> "Checkpoint | None":
        """Of the caches as they are; None where one is neither sliding nor global."""
        windows = {}
        for layer, cache in enumerate(caches):
            if isinstance(cache, SlidingKVCache) and cache.keys is not None and cache.values is not None:
                seen = slice(max(0, cache.held - (cache.max_size - 1)), cache.held)
                # Copies of their own: a view would keep the whole buffer, and make its next update copy it.
                keys, values = (mx.contiguous(a[..., seen, :] + 0) for a in (cache.keys, cache.values))
                windows[layer] = keys, values
            elif not isinstance(cache, KVCache):
                return None
        mx.eval(list(windows.values()))
        return cls(caches[0].offset, windows)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.windows.values())


@dataclass
class Entry:
    tokens: list[int]  # what the caches hold
    caches: list[Any]  # a SlidingKVCache or mlx-lm's KVCache for each layer
    checkpoints: list[Checkpoint] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches) + sum(point.nbytes for point in self.checkpoints)

    def usable(self, shared: int) -> int:
        """How many of the first `shared` tokens need not be computed again."""
        surplus = len(self.tokens) - shared
        if all(surplus <= _most(cache) for cache in self.caches):
            return shared
        return max((point.length for point in self.checkpoints if point.length <= shared), default=0)

    def branch(self, length: int) -> "Entry":
        """A copy of the first `length` tokens; this entry stays as it is."""
        point = next((p for p in self.checkpoints if p.length == length), None)
        caches = []
        for layer, cache in enumerate(self.caches):
            copy: Any = object.__new__(type(cache))
            copy.__dict__.update(cache.__dict__)
            if point is not None and layer in point.windows:
                copy.keys, copy.values = (a + 0 for a in point.windows[layer])
                copy.offset, copy.held, copy.last_block = length, copy.keys.shape[2], 0
            elif isinstance(cache, SlidingKVCache):
                copy.keys, copy.values = (None if a is None else a + 0 for a in (cache.keys, cache.values))
                copy.trim(cache.offset - length)
            else:
                copy.keys, copy.values = (mx.contiguous(a[..., :length, :] + 0) for a in (cache.keys, cache.values))
                copy.offset = length
            caches.append(copy)
        mx.eval([(cache.keys, cache.values) for cache in caches])
        kept = [p for p in self.checkpoints if p.length <= length]
        return Entry(self.tokens[:length], caches, kept)


def _most(cache) -> int:
    if isinstance(cache, SlidingKVCache):
        return cache.max_trim
    return cache.offset if isinstance(cache, KVCache) else 0


class PromptCache:
    """Entries by recency, at most `max_entries` and `max_bytes` of them. For the generation thread alone."""

    def __init__(self, max_entries: int = 10, max_bytes: int | None = None):
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[int, ...], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in list(self._entries.values()))

    @property
    def entries(self) -> list[Entry]:
        """The least recently used first."""
        return list(self._entries.values())

    def take(self, tokens: list[int], keep: bool = False) -> Entry | None:
        """The entry that spares most of a prompt (L,), cut back to what it shares with it; one token at least is left.

        A conversation that goes on takes its entry along; one that branches off copies it, as does `keep`.
        """
        found: tuple[tuple[int, ...], Entry] | None = None
        length = 0
        for candidate in self._entries.items():
            usable = candidate[1].usable(min(_shared(candidate[1].tokens, tokens), len(tokens) - 1))
            if usable > length:
                found, length = candidate, usable
        if found is None:
            return None
        key, best = found
        self._entries.move_to_end(key)
        surplus = len(best.tokens) - length
        if keep or surplus > 1 or not rollback(best.caches, surplus):
            return best.branch(length)
        del self._entries[key]
        best.tokens = best.tokens[:length]
        return best

    def give(self, entry: Entry) -> None:
        """Keeps an entry; what it contains entirely leaves, then the least recently used."""
        entry.checkpoints = sorted(entry.checkpoints, key=lambda point: point.length)[-MOST_CHECKPOINTS:]
        for key, other in list(self._entries.items()):
            whole = len(other.tokens) <= len(entry.tokens) and _shared(other.tokens, entry.tokens) == len(other.tokens)
            if whole and entry.usable(len(other.tokens)) == len(other.tokens):
                del self._entries[key]
        self._entries[tuple(entry.tokens)] = entry
        self._entries.move_to_end(tuple(entry.tokens))
        self.trim_to(n_sequences=self.max_entries, n_bytes=self.max_bytes)

    def clear(self) -> None:
        self._entries.clear()

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Drops the least recently used until so many sequences and bytes are left, at most."""
        while self._entries and (
            (n_sequences is not None and len(self) > n_sequences) or (n_bytes is not None and self.nbytes > n_bytes)
        ):
            self._entries.popitem(last=False)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
