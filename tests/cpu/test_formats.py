"""The kernels read every format as MLX packs it, checked against codes worked out by hand and mx.dequantize."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("numba")

from mlx_mimo.cpu import formats, int8_products
from mlx_mimo.cpu.formats import AFFINE_BITS, FORMAT_BITS, LANES, lane_scales, windows
from mlx_mimo.cpu.packed import Packed, format_of


def packed_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, columns) codes → uint32 words: one little-endian stream of bits a row, the first code lowest."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append(np.frombuffer(stream.to_bytes(len(row) * bits // 8, "little"), np.uint32))
    return np.stack(rows)


def dequantised(matrix: Packed) -> np.ndarray:
    return matrix.dequantised(0, 0, matrix.rows, np.empty(matrix.rows * matrix.columns, np.float32))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_affine_codes_are_a_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    codes[0, :32] = 2**bits - 1
    words = mx.array(packed_by_hand(codes, bits))
    scales, biases = mx.array([[0.5, 2.0]] * 3), mx.array([[-1.0, 3.0]] * 3)
    exact = codes * np.repeat([0.5, 2.0], 32) + np.repeat([-1.0, 3.0], 32)
    np.testing.assert_array_equal(mx.dequantize(words, scales, biases, group_size=32, bits=bits), exact)
    np.testing.assert_array_equal(dequantised(Packed(words, scales, biases, bits=bits, group_size=32)), exact)


@pytest.mark.parametrize("scale", [mx.bfloat16, mx.float16, mx.float32])
def test_scales_and_biases_are_read_in_their_type(scale):
    words, scales, biases = mx.quantize(mx.random.normal((5, 128), key=mx.random.key(0)), group_size=64, bits=4)
    scales, biases = scales.astype(scale), biases.astype(scale)
    wide = [part.astype(mx.float32) for part in (scales, biases)]
    want = mx.dequantize(words, *wide, group_size=64, bits=4)
    np.testing.assert_allclose(
        dequantised(Packed(words, scales, biases, bits=4, group_size=64)), want, rtol=1e-6, atol=1e-6
    )


def test_mxfp4_equals_mlx():
    words, scales = mx.quantize(mx.random.normal((5, 64), key=mx.random.key(0)), group_size=32, bits=4, mode="mxfp4")
    want = mx.dequantize(words, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(dequantised(Packed(words, scales, bits=4, group_size=32, mode="mxfp4")), want)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_unquantised_weights_are_widened(dtype):
    weight = mx.random.normal((5, 33), key=mx.random.key(0)).astype(dtype)
    np.testing.assert_array_equal(dequantised(Packed(weight)), weight.astype(mx.float32))


@pytest.mark.parametrize("cheap", [False, True], ids=["AVX2", "AVX-512 or ARM"])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_lane_scales_undo_the_shift_of_each_lane(bits, cheap, monkeypatch):
    """Masked in place, lane i of a word is code_i * 2^shift_i, and no code may reach a sign bit that counts."""
    monkeypatch.setattr(formats, "_unsigned_conversion_is_cheap", lambda: cheap)
    codes = np.arange(1, LANES + 1) % 2**bits
    unit = packed_by_hand(np.tile(codes, 4)[None], bits).tobytes()  # the first eight codes, and what lies behind
    if bits == 8:
        assert lane_scales("affine8").tolist() == [1.0] * LANES  # bytes are not shifted
        return
    for lane, (offset, shift) in enumerate(windows(bits)):
        down = formats.high_shift(bits) if lane >= 4 else 0
        word = int.from_bytes(unit[offset : offset + 4], "little") >> down
        masked = word & ((2**bits - 1) << (shift - down))
        assert masked * lane_scales(f"affine{bits}")[lane] == codes[lane]
        assert cheap or masked < 2**31


def test_formats_have_names_and_unknown_ones_have_none():
    assert format_of(mx.uint32, 4, 64) == "affine4"
    assert format_of(mx.uint32, 4, 32, "mxfp4") == "mxfp4"
    assert format_of(mx.bfloat16) == "bf16"
    for unknown in [(7, 64, "affine"), (4, 16, "affine"), (8, 32, "mxfp8"), (4, 16, "nvfp4"), (4, 64, "mxfp4")]:
        assert format_of(mx.uint32, *unknown) is None
    assert format_of(mx.uint8) is None
    assert {format_of(dtype) for dtype in (mx.bfloat16, mx.float16, mx.float32)} == set(FORMAT_BITS) - {
        *formats.AFFINE,
        "mxfp4",
    }


def test_int8_products_take_whole_registers_of_known_formats(monkeypatch):
    monkeypatch.setattr(int8_products, "available", lambda: True)
    assert [int8_products.planes(f"affine{bits}") for bits in AFFINE_BITS] == [4, 1, 2, 1, 1, 1]
    assert int8_products.multiplies("affine4", 4096)
    assert not int8_products.multiplies("affine4", 192)  # 128 codes to a register
    assert int8_products.multiplies("affine3", 192)
    assert not int8_products.multiplies("bf16", 4096)
    monkeypatch.setattr(int8_products, "available", lambda: False)
    assert not int8_products.multiplies("affine4", 4096)
