"""KV caches of both attention kinds, in mlx-lm's protocol.

Global layers use mlx-lm's own `KVCache`. Sliding layers keep the window and `SLACK` tokens more, in temporal order, so
that tokens can be taken back after the window has moved on: mlx-lm's rotating cache has by then overwritten the keys
that the earlier position saw.
"""

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache, _BaseCache

from ..config.model_args import SLACK, ModelArgs
from ..errors import MimoError


def make_cache(args: ModelArgs) -> list:
    """An empty cache for each layer."""
    return [SlidingKVCache(args.window) if args.is_sliding(i) else KVCache() for i in range(args.num_hidden_layers)]


def common_length(caches: list) -> int | None:
    """How many tokens the caches hold; None where they differ, which an interrupted forward pass leaves behind."""
    lengths = {cache.offset for cache in caches}
    return lengths.pop() if len(lengths) == 1 else None


def rollback(caches: list, n: int) -> bool:
    """Takes the last `n` tokens back in every layer and returns True; or returns False and changes nothing, where a
    layer no longer holds what the token before them saw."""
    if any(n > max_trim(cache) for cache in caches):
        return False
    for cache in caches:
        cache.trim(n)
    return True


def max_trim(cache) -> int:
    """How many tokens can be taken back from a cache of one layer."""
    if hasattr(cache, "max_trim"):
        return cache.max_trim
    return cache.size() if cache.is_trimmable() else 0


class SlidingKVCache(_BaseCache):
    """The keys and values of the last tokens, oldest first.

    `keys` (B, H, capacity, D) and `values` hold `held` tokens, the last of which is token `offset - 1`. Between
    `max_size - 1 + slack` and twice as many stay held, so that the buffer is moved to the front once in a while instead
    of with every token.
    """

    def __init__(self, max_size: int, slack: int = SLACK):
        self.max_size = max_size  # keys a query sees, its own included
        self.slack = slack
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.held = 0
        self.last_block = 0  # tokens of the last update that have not been taken back

    @property
    def kept(self) -> int:
        """Number of tokens that are never dropped: the keys that the next query sees except its own, and the slack."""
        return self.max_size - 1 + self.slack

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values (B, H, L, D); returns those that the L new queries see, at most max_size - 1 + L."""
        length = keys.shape[2]
        seen = min(self.held, self.max_size - 1) + length
        if self.keys is None or self.values is None or self.held + length > self.keys.shape[2]:
            self.keys, self.values = self._moved(keys, values)
        else:
            end = self.held + length
            self.keys[..., self.held : end, :] = keys
            self.values[..., self.held : end, :] = values
            self.held = end
        self.offset += length
        self.last_block = length
        start = self.held - seen
        seen_keys, seen_values = self.keys[..., start : self.held, :], self.values[..., start : self.held, :]
        if self.held > 2 * self.kept:
            self._shrink(self.keys, self.values)  # drops a prompt's chunk
        return seen_keys, seen_values

    def _moved(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Sets `held`, and returns copies of the kept tokens and the new ones in buffers with room for more."""
        length = keys.shape[2]
        stay = min(self.held, self.kept)
        # Small at first, then always the same size.
        capacity = max(stay + length, min(2 * self.kept, 2 * (stay + length)))
        first = self.held - stay

        def moved(old: mx.array | None, new: mx.array) -> mx.array:
            parts = [new] if old is None else [old[..., first : self.held, :], new]
            room = capacity - stay - length
            if room:
                parts.append(mx.zeros((*new.shape[:2], room, new.shape[3]), new.dtype))
            return mx.concatenate(parts, axis=2)

        buffers = moved(self.keys, keys), moved(self.values, values)
        self.held = stay + length
        return buffers

    def _shrink(self, keys: mx.array, values: mx.array) -> None:
        """Keeps of the buffers what is never dropped."""
        first = self.held - self.kept
        self.keys = mx.contiguous(keys[..., first : self.held, :])
        self.values = mx.contiguous(values[..., first : self.held, :])
        self.held = self.kept
        # Without this, every layer's whole chunk would stay in memory until the chunk has been computed.
        mx.async_eval(self.keys, self.values)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        """The mask for N new tokens, asked for before they are appended; `window_size` None is the cache's own."""
        window = window_size or self.max_size
        before = min(self.held, self.max_size - 1)
        if N == 1:
            # Exactly the window is fetched.
            return None if window >= before + 1 else mx.arange(before + 1) > before - window
        if before + N > window or return_array:
            return create_causal_mask(N, before, window_size=window)
        return "causal"

    # Taking tokens back

    @property
    def max_trim(self) -> int:
        """How many tokens can be taken back so that the next token still finds its whole window."""
        dropped = self.offset - self.held
        return self.offset if dropped == 0 else max(0, self.held - (self.max_size - 1))

    def is_trimmable(self) -> bool:
        """Whether mlx-lm may trim; it asks without saying by how much.

        Its prompt cache trims by any length, which is possible while nothing is dropped. Its speculative decoding
        trims tokens of the block that was just verified. Our own code asks `rollback`, which is told the length.
        """
        return self.offset == self.held or 1 < self.last_block <= self.max_trim

    def trim(self, n: int) -> int:
        """Takes the last `n` tokens back and returns how many. Raises MimoError where the window before them is gone,
        since mlx-lm's callers ignore the result.
        """
        n = min(n, self.offset)
        if n > self.max_trim:
            raise MimoError(
                f"KV cache: {n} tokens to be taken back, at most {self.max_trim} can be; process the prompt again"
            )
        self.offset -= n
        self.held -= n
        self.last_block = max(0, self.last_block - n)
        return n

    # mlx-lm's protocol

    def size(self) -> int:
        # After a rollback one token less than `max_size` may be held: all that the next query sees, itself apart.
        return min(self.held, self.max_size)

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.keys, self.values) if part is not None)

    @property
    def state(self):
        return self.keys, self.values, self.offset, self.held, self.max_size, self.slack

    @state.setter
    def state(self, value) -> None:
        self.keys, self.values, self.offset, self.held, self.max_size, self.slack = value
        self.last_block = 0

    def _temporal_order(self, array: mx.array) -> mx.array:
        """The held tokens, oldest first; BatchRotatingKVCache.merge takes the last `size()` of them."""
        return array[..., : self.held, :]

    @classmethod
    def merge(cls, caches: list["SlidingKVCache"]) -> "BatchSlidingKVCache":
        return BatchSlidingKVCache.merge(caches)

    def to_quantized(self, group_size: int = 64, bits: int = 4):
        raise MimoError("KV cache: sliding layers are not quantised (they have sinks); leave --kv-bits away")


class BatchSlidingKVCache(BatchRotatingKVCache):
    """mlx-lm's batch cache, whose `extract` returns our single caches. It cannot roll back once past the window."""

    def extract(self, idx: int) -> SlidingKVCache:
        cache = SlidingKVCache(self.max_size)
        if self.keys is None:
            return cache
        rotating = super().extract(idx)
        cache.keys, cache.values, cache.offset = rotating.keys, rotating.values, rotating.offset
        cache.held = rotating.keys.shape[2]
        return cache


# mlx-lm's load_prompt_cache looks classes up by name in its own module.
for _class in (SlidingKVCache, BatchSlidingKVCache):
    setattr(mlx_lm_cache, _class.__name__, _class)
