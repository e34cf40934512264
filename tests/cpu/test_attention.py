"""Attention on the host equals MLX's."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("numba")

from mlx_lm.models.base import create_causal_mask

from mlx_mimo.cpu.attention import attention
from mlx_mimo.errors import MimoError


def tensors(length, seen, heads=4, kv_heads=2, batch=1):
    shapes = [(batch, heads, length, 192), (batch, kv_heads, seen, 192), (batch, kv_heads, seen, 128)]
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]


MASKS = {
    "none": lambda length, seen: None,
    "causal": lambda length, seen: "causal",
    "window": lambda length, seen: create_causal_mask(length, seen - length, window_size=16),
    "added": lambda length, seen: mx.random.normal((2, 1, length, seen)),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("length", "seen"), [(1, 1), (1, 40), (17, 17), (300, 333)])
def test_equals_mlx(length, seen, mask, sinks):
    q, k, v = tensors(length, seen, batch=2)
    options = {
        "scale": 192**-0.5,
        "mask": MASKS[mask](length, seen),
        "sinks": mx.array([0.0, 3.0, -3.0, 1.0]) if sinks else None,
    }
    want = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    np.testing.assert_allclose(attention(q, k, v, **options), want, atol=3e-5)


def test_a_slice_of_the_cache_is_read_in_place():
    q, k, v = tensors(1, 64)
    want = mx.fast.scaled_dot_product_attention(q, k[:, :, 5:40], v[:, :, 5:40], scale=0.1)
    np.testing.assert_allclose(attention(q, k[:, :, 5:40], v[:, :, 5:40], scale=0.1), want, atol=1e-5)


def test_gradients_are_refused():
    q, k, v = tensors(1, 3)
    with pytest.raises(MimoError, match="no gradient"):
        mx.grad(lambda q: attention(q, k, v, scale=1.0).sum())(q)
