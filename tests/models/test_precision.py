"""Float32 matrix products on devices that compute them with a shorter mantissa."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mimo.models import precision


def normal(*shape: int, seed: int, dtype=mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def shortened(x: mx.array) -> mx.array:
    """x rounded to nearest at TF32's 10 bits of mantissa."""
    bits = x.view(mx.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_bfloat16_parts_add_up_and_cannot_be_shortened(dtype):
    x = normal(50, 64, seed=0, dtype=dtype)
    parts = precision.bfloat16_parts(x)
    assert mx.array_equal(sum(reversed(parts)), x.astype(mx.float32))
    for part in parts:
        assert mx.array_equal(shortened(part), part)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_split_matmul_is_float32_on_a_device_that_shortens(dtype):
    x, weight = normal(40, 512, seed=1, dtype=dtype), normal(16, 512, seed=2)
    exact = np.array(x.astype(mx.float32)).astype(np.float64) @ np.array(weight).astype(np.float64).T
    plain = np.array(shortened(x.astype(mx.float32)) @ shortened(weight).T)
    parts = np.array(precision.split_matmul(x, weight))
    assert np.abs(plain - exact).max() > 1e-3
    assert np.abs(parts - exact).max() < 5e-5
    assert np.abs(parts - exact).max() < 2 * np.abs(np.array(x.astype(mx.float32) @ weight.T) - exact).max() + 1e-6


def test_float32_matmul_splits_only_where_the_device_shortens(monkeypatch):
    x, weight = normal(2, 8, seed=3), normal(4, 8, seed=4)
    monkeypatch.setattr(precision, "split_matmul", lambda x, weight: "parts")
    monkeypatch.setattr(precision, "_is_exact", lambda: False)
    assert precision.float32_matmul(x, weight) == "parts"
    assert precision.float32_matmul(x[:1], weight).shape == (1, 4)
    monkeypatch.setattr(precision, "_is_exact", lambda: True)
    assert mx.array_equal(precision.float32_matmul(x, weight), x @ weight.T)


@pytest.mark.parametrize(
    ("architecture", "exact"),
    [("applegpu_g13s", True), ("applegpu_g16p", True), ("applegpu_g17s", False), ("sm_90", False)],
)
def test_devices_without_short_float32_are_known_by_their_architecture(monkeypatch, architecture, exact):
    monkeypatch.setattr(mx.metal, "is_available", lambda: architecture.startswith("apple"))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert precision._has_no_short_float32.__wrapped__() is exact
