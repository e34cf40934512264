"""The converter's kernels give the bits and values that MLX gives."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mimo.checkpoint.quantization import Quantization
from mlx_mimo.convert import fp8, quantize

pytest.importorskip("numba")


def hard_weights() -> np.ndarray:
    """(24, 512) float32 with difficult rows: constants, zeros, one sign, ties, tiny and huge values."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((24, 512)) * 0.02).astype(np.float32)
    w[0], w[1], w[2, :256], w[2, 256:] = 0.5, 0, 1e-9, -2
    w[3] *= 1e-6
    w[4], w[5] = np.abs(w[4]), -np.abs(w[5])
    w[6] *= 1e4
    w[7, ::7] = -0.0
    w[8:16] = rng.integers(-448, 449, (8, 512)) * 2.0 ** -rng.integers(0, 9, (8, 512))
    w[16:20] = rng.integers(-24, 25, (4, 512)) / 4
    return w


def as_bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array.view(mx.uint8))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_is_bit_for_bit_mlx(bits, group):
    w = hard_weights()
    encoded = quantize.encode(w, Quantization(bits, group))
    wanted = mx.quantize(mx.array(w).astype(mx.bfloat16), group_size=group, bits=bits)
    for part, array in zip(("weight", "scales", "biases"), wanted):
        np.testing.assert_array_equal(encoded.parts[part], as_bits(array), err_msg=part)


def test_mxfp4_is_bit_for_bit_mlx():
    w = hard_weights()
    encoded = quantize.encode(w, Quantization(4, 32, "mxfp4"))
    packed, scales = mx.quantize(mx.array(w).astype(mx.bfloat16), mode="mxfp4")
    np.testing.assert_array_equal(encoded.parts["scales"], as_bits(scales))
    np.testing.assert_array_equal(encoded.parts["weight"], as_bits(packed))


@pytest.mark.parametrize("quantization", [Quantization(3, 64), Quantization(8, 32), Quantization(4, 32, "mxfp4"), None])
def test_without_numba_the_bytes_and_errors_are_the_same(quantization):
    w = hard_weights()
    by_kernel = quantize.encode(w, quantization)
    by_mlx = quantize._encode_mlx(w, quantization) if quantization else quantize.encode(w, None)
    assert by_kernel.parts.keys() == by_mlx.parts.keys()
    for part, data in by_kernel.parts.items():
        np.testing.assert_array_equal(data, by_mlx.parts[part])
    assert by_kernel.squared_error == pytest.approx(by_mlx.squared_error, rel=1e-4)
    assert by_kernel.squared_weight == pytest.approx(by_mlx.squared_weight, rel=1e-4)


def test_the_error_is_measured_on_the_stored_values():
    w = hard_weights()
    encoded = quantize.encode(w, Quantization(4, 64))
    q, s, b = mx.quantize(mx.array(w).astype(mx.bfloat16), group_size=64, bits=4)
    stored = np.array(mx.dequantize(q, s.astype(mx.float32), b.astype(mx.float32), group_size=64, bits=4))
    assert encoded.squared_error == pytest.approx(np.square((stored - w).astype(np.float64)).sum(), rel=1e-5)


def test_code_values_equal_mlx():
    codes = np.delete(np.arange(256, dtype=np.uint8), [127, 255])
    np.testing.assert_array_equal(fp8.TABLE[codes], np.array(mx.from_fp8(mx.array(codes), mx.float32)))
    assert np.isnan(fp8.TABLE[[127, 255]]).all()


def test_bfloat16_rounds_as_mlx():
    values = np.random.default_rng(1).standard_normal(10000).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3e38]
    np.testing.assert_array_equal(quantize.bfloat16(values), as_bits(mx.array(values).astype(mx.bfloat16)))
