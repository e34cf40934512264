"""Products with packed weights equal float64 products with dequantised weights, for every format and any shape."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from mlx_mimo.cpu import int8_products, packed, products
from mlx_mimo.cpu.packed import Packed
from mlx_mimo.cpu.products import ExpertMatrices, matmul, run_experts

AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
TOLERANCE = 1e-5


def packed_and_exact(shape, bits, group, mode="affine", scale=mx.bfloat16, seed=0):
    """A random quantised matrix (…, rows, columns) and its values in float64."""
    weight = mx.random.normal(shape, key=mx.random.key(seed))
    if mode == "mxfp4":
        codes, scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
        exact = mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
        return Packed(codes, scales, bits=4, group_size=32, mode="mxfp4"), np.array(exact, np.float64)
    codes, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    scales, biases = scales.astype(scale), biases.astype(scale)
    # The codes themselves come from MLX; scale and bias are applied in float64.
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    numbers = np.array(mx.dequantize(codes, ones, zeros, group_size=group, bits=bits), np.float64)
    wide = [np.repeat(np.array(v.astype(mx.float32), np.float64), group, axis=-1) for v in (scales, biases)]
    return Packed(codes, scales, biases, bits=bits, group_size=group), numbers * wide[0] + wide[1]


def plain_and_exact(shape, dtype, seed=0):
    weight = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    return Packed(weight), np.array(weight.astype(mx.float32), np.float64)


def activations(tokens, columns, seed=1):
    return np.random.default_rng(seed).normal(size=(tokens, columns)).astype(np.float32)


def relative_error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def check(packing, rows, columns, tokens):
    """A product of that many rows of activations equals float64; returns the matrix."""
    bits, group = (4, 32) if packing == "mxfp4" else packing
    matrix, exact = packed_and_exact((rows, columns), bits, group, "mxfp4" if packing == "mxfp4" else "affine")
    x = activations(tokens, columns)
    assert relative_error(matmul(x, matrix), x @ exact.T) < TOLERANCE
    return matrix


@pytest.fixture
def float32_only(monkeypatch):
    monkeypatch.setattr(int8_products, "available", lambda: False)


@pytest.fixture(params=["int8", "float32"])
def way(request, monkeypatch):
    """Both ways to multiply; int8 products are skipped on a processor without them."""
    if request.param == "float32":
        monkeypatch.setattr(int8_products, "available", lambda: False)
    elif not int8_products.available():
        pytest.skip("this processor has no VNNI and VBMI")
    return request.param


QUANTISED = [*AFFINE, "mxfp4"]


@pytest.mark.parametrize("packing", QUANTISED)
def test_int8_products_equal_float64(packing):
    """7 rows of x go as 4, 2 and 1; 23 rows of weights are odd; 2304 columns end with a part of a block of groups."""
    if not int8_products.available():
        pytest.skip("this processor has no VNNI and VBMI")
    check(packing, rows=23, columns=2304, tokens=7)


@pytest.mark.parametrize(("packing", "columns", "tokens"), [((8, 32), 256, 1), ((4, 64), 1280, 3), ((3, 128), 1280, 2)])
def test_both_ways_equal_float64_at_other_sizes(way, packing, columns, tokens):
    matrix = check(packing, rows=23, columns=columns, tokens=tokens)
    assert matrix.int8 == (way == "int8")


@pytest.mark.parametrize("scale", [mx.float16, mx.float32])
def test_both_ways_take_other_scale_types(way, scale):
    matrix, exact = packed_and_exact((9, 1280), 4, 64, scale=scale)
    for tokens in (2, 70):
        x = activations(tokens, 1280)
        assert relative_error(matmul(x, matrix), x @ exact.T) < TOLERANCE


@pytest.mark.parametrize("factor", [1e-26, 1.0, 1e30])
def test_activations_of_any_magnitude_keep_their_precision(way, factor):
    """Each group of activations has a step of its own, so a large group costs a small one no precision; 0 gives 0."""
    matrix, exact = packed_and_exact((16, 512), 4, 64)
    x = activations(1, 512)
    x[0, :64] *= 1e4
    x[0, 64:128] = 0
    x[0, 128:192] *= 1e-4
    x = (x * np.float32(factor)).astype(np.float32)
    for first in (0, 128, 192):
        part = np.zeros_like(x)
        part[0, first : first + 64] = x[0, first : first + 64]
        assert relative_error(matmul(part, matrix), part.astype(np.float64) @ exact.T) < TOLERANCE
    assert not matmul(np.zeros_like(x), matrix).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_visible_in_the_product(way, value):
    matrix, _ = packed_and_exact((16, 256), 4, 64)
    x = activations(1, 256)
    x[0, 100] = value
    assert not np.isfinite(matmul(x, matrix)).any()


@pytest.mark.parametrize("packing", QUANTISED)
def test_every_format_equals_float64(float32_only, packing):
    """One row of x goes through the kernel; nine rows go through BLAS, with dequantised weights."""
    group = 32 if packing == "mxfp4" else packing[1]
    for tokens in (1, 9):
        check(packing, rows=37, columns=3 * group, tokens=tokens)


@pytest.mark.parametrize("packing", [(2, 64), (4, 64), (5, 64), "mxfp4"])
def test_several_rows_of_activations_equal_float64(float32_only, packing):
    """Rows of x are taken 4, 2 and 1 at a time in every format; 8 are the most that the kernels take."""
    for tokens in (3, 7, 8):
        check(packing, rows=5, columns=192, tokens=tokens)


def test_mxfp4_decodes_every_code_and_the_smallest_scale():
    codes = mx.array(np.array([0x76543210, 0xFEDCBA98] * 2, np.uint32))[None]
    for exponent in (0, 1, 127, 140):
        scales = mx.array([[exponent]], dtype=mx.uint8)
        matrix = Packed(codes, scales, bits=4, group_size=32, mode="mxfp4")
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
        exact = np.concatenate([values, -values] * 2) * 2.0 ** (exponent - 127)
        for column in range(32):
            x = np.zeros((1, 32), np.float32)
            x[0, column] = 2.0**20
            assert matmul(x, matrix)[0, 0] == exact[column] * 2.0**20


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize(("columns", "tokens"), [(1, 1), (31, 4), (64, 11), (100, 7)])
def test_unquantised_equals_float64(dtype, columns, tokens):
    matrix, exact = plain_and_exact((13, columns), dtype)
    x = activations(tokens, columns)
    assert relative_error(matmul(x, matrix), x @ exact.T) < TOLERANCE


PLAIN = [mx.bfloat16, mx.float16, mx.float32]
DRAWN = [(2, 64), (4, 64), (5, 64), "mxfp4", mx.bfloat16]  # one of each way to read codes; others compile for long


def any_matrix(packing, shape, seed):
    """A matrix of any format: (bits, group), "mxfp4", or a type that is not quantised; `shape` counts groups."""
    if packing in PLAIN:
        return plain_and_exact(shape, packing, seed)
    if packing == "mxfp4":
        return packed_and_exact((*shape[:-1], shape[-1] * 32), 4, 32, "mxfp4", seed=seed)
    bits, group = packing
    return packed_and_exact((*shape[:-1], shape[-1] * group), bits, group, seed=seed)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 40),
    packing=st.sampled_from(DRAWN),
    tokens=st.one_of(st.integers(1, 12), st.integers(60, 70)),  # on both sides of each max_kernel_rows
    int8=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_equals_float64(rows, groups, packing, tokens, int8, seed):
    with pytest.MonkeyPatch.context() as patch:
        if not int8:
            patch.setattr(int8_products, "available", lambda: False)
        matrix, exact = any_matrix(packing, (rows, groups), seed)
        x = activations(tokens, matrix.columns, seed)
        got, want = matmul(x, matrix), x @ exact.T
    # A product may cancel to almost 0, so the error is relative to the size that such a product usually has.
    usual = np.sqrt((x.astype(np.float64) ** 2).sum(1)[:, None] * (exact**2).sum(1)[None] / matrix.columns)
    assert (np.abs(got - want) / np.maximum(usual, 1e-30)).max() < TOLERANCE


@settings(max_examples=10, deadline=None)
@given(
    packings=st.tuples(*[st.sampled_from(DRAWN)] * 2),
    hidden=st.integers(1, 3),
    inner=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 6), st.just(70)),
    seed=st.integers(0, 2**16),
)
def test_experts_of_any_formats_equal_float64(packings, hidden, inner, tokens, seed):
    """Widths are multiples of every group size, so gate and up may have one format and down another."""
    shapes, made = ((inner, hidden), (inner, hidden), (hidden, inner)), []
    for turn, ((outputs, inputs), packing) in enumerate(zip(shapes, (packings[0], packings[0], packings[1]))):
        group = 1 if packing in PLAIN else 32 if packing == "mxfp4" else packing[1]
        made.append(any_matrix(packing, (4, 128 * outputs, 128 * inputs // group), seed + turn))
    bank, exact = ExpertMatrices(*(matrix for matrix, _ in made)), [values for _, values in made]
    x = activations(tokens, 128 * hidden, seed) / 8
    slots = np.random.default_rng(seed).integers(0, 4, size=(tokens, 2)).astype(np.int32)
    assert relative_error(run_experts(x, slots, bank), exact_experts(x, slots, exact)) < TOLERANCE


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_kernels_read_no_byte_beyond_the_matrix(way, bits):
    """The page behind the matrix cannot be read: a read beyond the last byte would end the process."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(address + page), page, 0) != 0:
        pytest.skip("no mprotect here")
    matrix, exact = packed_and_exact((4, 256), bits, 32)
    host = matrix.views[0].host.reshape(-1)
    ctypes.memmove(address + page - host.nbytes, host.ctypes.data, host.nbytes)
    matrix.addresses = matrix.addresses._replace(weight=address + page - host.nbytes)
    x = activations(1, 256)
    assert relative_error(matmul(x, matrix), x @ exact.T) < TOLERANCE
    libc.mprotect(ctypes.c_void_p(address + page), page, 3)


# ---- experts


def bank_and_exact(hidden, inner, slots, bits=4, group=32, down_bits=None):
    made = [
        packed_and_exact((slots, inner, hidden), bits, group, seed=1),
        packed_and_exact((slots, inner, hidden), bits, group, seed=2),
        packed_and_exact((slots, hidden, inner), down_bits or bits, group, seed=3),
    ]
    return ExpertMatrices(*(packed for packed, _ in made)), [exact for _, exact in made]


def exact_experts(x, slots, exact):
    gate, up, down = exact
    out = np.empty((*slots.shape, x.shape[1]))
    for t, k in np.ndindex(*slots.shape):
        s = slots[t, k]
        g, u = gate[s] @ x[t].astype(np.float64), up[s] @ x[t].astype(np.float64)
        out[t, k] = down[s] @ (g / (1 + np.exp(-g)) * u)
    return out


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("down_bits", [4, 8])
def test_experts_equal_float64(tokens, down_bits):
    bank, exact = bank_and_exact(96, 64, 6, down_bits=down_bits)
    x = activations(tokens, 96)
    slots = np.random.default_rng(2).integers(0, 6, size=(tokens, 3)).astype(np.int32)
    assert relative_error(run_experts(x, slots, bank), exact_experts(x, slots, exact)) < TOLERANCE


def test_one_token_may_use_a_slot_twice():
    bank, exact = bank_and_exact(64, 32, 2)
    x, slots = activations(1, 64), np.array([[1, 1, 0, 1]], np.int32)
    got = run_experts(x, slots, bank)
    assert relative_error(got, exact_experts(x, slots, exact)) < TOLERANCE
    np.testing.assert_array_equal(got[0, 0], got[0, 3])


def test_gate_and_up_may_differ_in_format():
    gate, exact_gate = packed_and_exact((2, 32, 64), 3, 64, seed=1)
    up, exact_up = packed_and_exact((2, 32, 64), 6, 32, seed=2)
    down, exact_down = plain_and_exact((2, 64, 32), mx.bfloat16, seed=3)
    bank, exact = ExpertMatrices(gate, up, down), [exact_gate, exact_up, exact_down]
    for tokens in (1, 3, 30):
        x = activations(tokens, 64)
        slots = np.random.default_rng(2).integers(0, 2, size=(tokens, 2)).astype(np.int32)
        assert relative_error(run_experts(x, slots, bank), exact_experts(x, slots, exact)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_by_kernels_and_by_blas_in_one_call(way, tokens, monkeypatch):
    """Expert 0 has more rows than the kernels take; the others have fewer, and go in several batches."""
    monkeypatch.setattr(packed, "MAX_KERNEL_ROWS", 6)
    monkeypatch.setattr(packed, "MAX_KERNEL_ROWS_INT8", 6)
    monkeypatch.setattr(products, "PAIRS_AT_ONCE", 9)
    bank, exact = bank_and_exact(256, 256, 12, group=64)
    x = activations(tokens, 256)
    slots = np.random.default_rng(4).integers(1, 12, size=(tokens, 3)).astype(np.int32)
    slots[:, 0] = 0
    assert relative_error(run_experts(x, slots, bank), exact_experts(x, slots, exact)) < TOLERANCE


@pytest.mark.parametrize("tokens", [5, 64, 65])
def test_a_stack_equals_its_matrices(way, tokens):
    made = [packed_and_exact((rows, 256), 8, 64, seed=rows) for rows in (48, 16, 32)]
    stack = products.Stack([matrix for matrix, _ in made])
    x = activations(tokens, 256)
    for part, (_, exact) in zip(stack(x), made):
        assert relative_error(part, x @ exact.T) < TOLERANCE


def test_a_matrix_of_several_blocks_equals_float64(float32_only, monkeypatch):
    """For BLAS, weights are dequantised a block of rows at a time; here two rows, and one in the last block."""
    monkeypatch.setattr(products, "BLOCK_BYTES", 2 * 4 * 192)
    check((4, 64), rows=7, columns=192, tokens=9)


def test_a_stack_of_heights_without_a_common_one_equals_its_matrices(float32_only):
    made = [packed_and_exact((rows, 64), 4, 32, seed=rows) for rows in (6, 4, 10)]
    x = activations(3, 64)
    for part, (_, exact) in zip(products.Stack([matrix for matrix, _ in made])(x), made):
        assert relative_error(part, x @ exact.T) < TOLERANCE
