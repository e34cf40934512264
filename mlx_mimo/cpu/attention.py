"""Attention on the host with NumPy's BLAS; MLX's CPU backend uses a reference BLAS, which is slower."""

import mlx.core as mx
import numpy as np

from ..errors import MimoError
from . import blas
from .host import host, on_host

BLOCK = 256  # queries at a time, so that scores stay small


def attention(queries, keys, values, cache=None, *, scale: float, mask=None, sinks=None) -> mx.array:
    """mx.fast.scaled_dot_product_attention in float32: queries (B, H, L, D), keys and values (B, KV, S, …).

    Raises MimoError for a quantised cache, and inside a transformation.
    """
    check_cache(cache)
    queries, keys, values = _float32(queries, keys, values)
    compute = on_host(lambda queries, *sinks: attend(queries, keys, values, scale, mask, *sinks))
    return compute(queries) if sinks is None else compute(queries, sinks)


def check_cache(cache) -> None:
    """Raises MimoError for a quantised cache, whose keys and values cannot be read in place."""
    if hasattr(cache, "bits"):
        raise MimoError("quantised KV caches have no CPU kernel; leave --kv-bits out")


def attend(queries, keys, values, scale: float, mask=None, sinks=None) -> np.ndarray:
    """`attention` for NumPy arrays; mask may be an MLX array."""
    if isinstance(mask, mx.array):
        mask = np.asarray(mask) if mask.dtype == mx.bool_ else host(mask)
    with blas.limited(queries.size * keys.shape[2] * 2):
        return _attend(queries, keys, values, scale, mask, sinks)


def _float32(queries, keys, values) -> tuple[mx.array, np.ndarray, np.ndarray]:
    """Waits for all three at once; returns keys and values as views of the cache's memory, slices included."""
    queries, keys, values = (x if x.dtype == mx.float32 else x.astype(mx.float32) for x in (queries, keys, values))
    try:
        mx.eval(queries, keys, values)
    except ValueError:
        host(keys)  # raises MimoError
        raise
    return queries, np.asarray(keys), np.asarray(values)


def _attend(queries, keys, values, scale, mask, sinks) -> np.ndarray:
    batch, heads, length, _ = queries.shape
    kv_heads, seen = keys.shape[1:3]
    shared = heads // kv_heads  # query heads to a key head
    out = np.empty((batch, heads, length, values.shape[-1]), np.float32)
    for b, kv in np.ndindex(batch, kv_heads):
        group = slice(kv * shared, (kv + 1) * shared)
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            q = queries[b, group, first:last].reshape(shared * (last - first), -1)
            # Keys behind the block's last query are left out under a causal mask.
            end = seen - length + last if isinstance(mask, str) else seen
            scores = (q @ keys[b, kv, :end].T).reshape(shared, last - first, end)
            scores *= np.float32(scale)
            _mask(scores, mask, b, group, first, last, seen - length)
            weights, total = _softmax(scores, None if sinks is None else sinks[group])
            weighted = weights.reshape(-1, end) @ values[b, kv, :end]
            out[b, group, first:last] = weighted.reshape(shared, last - first, -1) / total
    return out


def _mask(scores, mask, b, group, first, last, before) -> None:
    """Adds a mask of floats to scores, or writes -inf where a query may not see a key."""
    if mask is None:
        return
    if isinstance(mask, str):
        if mask != "causal":
            raise MimoError(f"attention mask {mask!r}; 'causal' or an array expected")
        allowed = np.arange(scores.shape[-1])[None] <= np.arange(first, last)[:, None] + before
        np.copyto(scores, -np.inf, where=~allowed)
        return
    full = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    part = full[b if full.shape[0] > 1 else 0]
    part = part[group if part.shape[0] > 1 else slice(None), first:last] if part.shape[1] > 1 else part
    if part.dtype == np.bool_:
        np.copyto(scores, -np.inf, where=~np.broadcast_to(part, scores.shape))
    else:
        scores += part


def _softmax(scores, sinks) -> tuple[np.ndarray, np.ndarray]:
    """(numerators, denominators); a head's sink is one more score without a value. Overwrites `scores`."""
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    top = np.where(np.isfinite(top), top, 0)
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - top)
    return scores, total
