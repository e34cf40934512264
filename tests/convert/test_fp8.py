"""FP8 scales: partial blocks, the chain map of K and V, and the choice of the map."""

import numpy as np
import pytest
from support import checkpoints

from mlx_mimo.convert import fp8
from mlx_mimo.errors import FormatError


@pytest.fixture(params=["kernels", "numpy"])
def way(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(fp8, "_kernels", lambda: None)
    else:
        pytest.importorskip("numba")


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (64, 192), (1, 1), (257, 129)])
def test_partial_blocks_are_dequantised_exactly(way, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, cells = checkpoints.quantise(weight)
    values = fp8.dequantize(codes, fp8.aligned("w", shape, cells))
    np.testing.assert_array_equal(values, checkpoints.dequantise(codes, cells))


def test_rows_of_the_middle_are_dequantised_with_their_own_scales(way):
    weight = np.random.default_rng(0).standard_normal((400, 130)).astype(np.float32)
    codes, cells = checkpoints.quantise(weight)
    scales = fp8.aligned("w", weight.shape, cells)
    part = fp8.dequantize(codes[100:300], scales.rows(100, 300))
    np.testing.assert_array_equal(part, fp8.dequantize(codes, scales)[100:300])


def test_cells_with_a_code_of_448_are_marked(way):
    codes = np.zeros((256, 200), np.uint8)
    codes[130, 199] = 0xFE
    found = np.zeros((2, 2), np.bool_)
    fp8.mark_full_scale("w", codes, fp8.aligned("w", codes.shape, np.ones((2, 2), np.float32)), found)
    assert found.tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused(way, code):
    codes = np.zeros((3, 3), np.uint8)
    codes[1, 2] = code
    with pytest.raises(FormatError, match=r"^w: 1 of its codes"):
        fp8.mark_full_scale("w", codes, fp8.aligned("w", (3, 3), np.ones((1, 1), np.float32)), np.zeros((1, 1), bool))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_scales_are_refused(bad):
    with pytest.raises(FormatError, match="w_scale_inv: 1 of 4 scales"):
        fp8.check_cells("w", np.array([[1, bad], [0, 1]], np.float32))


def test_the_chain_map_is_the_one_the_exporter_used():
    for kv_heads in (1, 2, 4):
        k_map, v_map = fp8.kv_row_maps(kv_heads, 192, 128, 2 * kv_heads, kv_heads)["chain"]
        k_rows, v_rows = checkpoints.chain_rows(kv_heads)
        np.testing.assert_array_equal(k_map, k_rows)
        np.testing.assert_array_equal(v_map, np.where(v_rows < 0, ~v_rows, v_rows + 2 * kv_heads))


def test_the_chain_map_of_the_released_geometry_by_hand():
    k_map, v_map = fp8.kv_row_maps(4, 192, 128, 8, 4)["chain"]
    assert (k_map[:128] == 0).all()
    assert (k_map[128:192] == 1).all()
    assert k_map[192] == 2
    assert (v_map[:64] == 1).all()  # K's second scale reaches into V
    assert (v_map[64:128] == 8).all()
    assert v_map[128] == 3


def test_maps_that_do_not_fit_the_shapes_are_left_out():
    assert "chain" not in fp8.kv_row_maps(4, 192, 128, 6, 4)
    assert set(fp8.kv_row_maps(4, 192, 128, 8, 4)) == {"chain", "flat", "rows/96"}


def test_the_map_that_leaves_clearly_fewest_cells_is_chosen():
    assert fp8.choose({"chain": 0, "flat": 90, "rows/96": 40}, 384) == "chain"
    assert fp8.choose({"chain": 300, "flat": 2, "rows/96": 90}, 384) == "flat"
    assert fp8.choose({"chain": 48, "flat": 90, "rows/96": 0}, 384) == "rows/96"
    assert fp8.choose({"chain": 0, "flat": 6, "rows/96": 0}, 36) == "chain"  # by the config blocks have 128 rows
    assert fp8.choose({"chain": 300, "flat": 2}, 384, wanted="chain") == "chain"
    with pytest.raises(FormatError, match="no map is clearly best"):
        fp8.choose({"chain": 0, "flat": 5, "rows/96": 90}, 384)
    with pytest.raises(FormatError, match="no map fits"):
        fp8.choose({"chain": 100, "flat": 200}, 384)
    with pytest.raises(FormatError, match="does not fit"):
        fp8.choose({"flat": 0}, 384, wanted="chain")
