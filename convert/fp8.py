"""FP8 e4m3 with block scales: values, maps from rows to scales, and the test that finds the right map.

A weight is code · scale, one scale for a block of 128 × 128. In global layers the release quantised, per KV head,
the rows of [K | V] as one chain of such blocks, so that a block lies across K's end and V's beginning.
"""

from dataclasses import dataclass

import numpy as np

from mlx_mimo.errors import FormatError

BLOCK = 128
CANDIDATES = ("chain", "flat", "rows/96")
# A quantiser scales each block so that its largest magnitude becomes ±448. A map fits where at most MISSING_AT_MOST of
# its cells have no such code, and is clearly best where every other leaves at least CLEARLY more of them.
MISSING_AT_MOST = 0.02
CLEARLY = 0.05


def _code_values() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa * 2.0**-9)
    value[(code & 127) == 127] = np.nan
    return np.where(code & 128, -value, value).astype(np.float32)


TABLE = _code_values()  # (256,) float32: the value of each code


@dataclass(frozen=True)
class Scales:
    """The scales of a weight: row r of it, column block c use `cells[row_map[r], c]`."""

    cells: np.ndarray  # (scale rows, scale columns) float32
    row_map: np.ndarray  # (rows,) int64

    def rows(self, begin: int, end: int) -> "Scales":
        return Scales(self.cells, self.row_map[begin:end])


def aligned(name: str, shape: tuple[int, ...], cells: np.ndarray) -> Scales:
    """Scales of a tensor whose blocks begin at its own first row. The last blocks may be partial."""
    wanted = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    if cells.shape != wanted:
        raise FormatError(f"{name}_scale_inv: shape {list(cells.shape)} found, {list(wanted)} expected")
    return Scales(cells, np.arange(shape[0]) // BLOCK)


def check_cells(name: str, cells: np.ndarray) -> None:
    bad = np.count_nonzero(~np.isfinite(cells) | (cells < 0))
    if bad:
        raise FormatError(
            f"{name}_scale_inv: {bad} of {cells.size} scales are NaN, infinite or negative; fetch the file again"
        )


def dequantize(codes: np.ndarray, scales: Scales) -> np.ndarray:
    """(R, C) uint8 codes → (R, C) float32, the product of code and scale."""
    out = np.empty(codes.shape, np.float32)
    kernels = _kernels()
    if kernels:
        kernels.dequantize_fp8(codes, TABLE, scales.cells, scales.row_map, BLOCK, out)
    else:
        np.take(TABLE, codes, out=out)
        out *= scales.cells[scales.row_map].repeat(BLOCK, axis=1)[:, : codes.shape[1]]
    return out


def mark_full_scale(name: str, codes: np.ndarray, scales: Scales, found: np.ndarray) -> None:
    """Marks in `found` the cells that own a code of ±448. Raises FormatError for a NaN code."""
    kernels = _kernels()
    if kernels:
        nans = kernels.mark_full_scale(codes, scales.row_map, BLOCK, found)
    else:
        magnitude = codes & 0x7F
        nans = np.count_nonzero(magnitude == 0x7F)
        full = np.logical_or.reduceat(magnitude == 0x7E, np.arange(0, codes.shape[1], BLOCK), axis=1)
        np.logical_or.at(found, scales.row_map, full)
    if nans:
        raise FormatError(f"{name}: {nans} of its codes are NaN; fetch the file again")


def _kernels():
    try:
        from . import kernels
    except ImportError:  # without numba NumPy does the same, several times slower
        return None
    return kernels


@dataclass(frozen=True)
class KvMap:
    """The map by which a global layer's K and V scales are read, and its evidence."""

    layer: int
    name: str  # one of CANDIDATES
    cells: int  # scales that are not zero
    missing: dict[str, int]  # candidate → cells without a code of ±448

    def as_json(self) -> dict:
        return {"map": self.name, "cells": self.cells, "cells_without_448": self.missing}


def kv_row_maps(kv_heads: int, head_dim: int, v_head_dim: int, k_cells: int, v_cells: int) -> dict[str, tuple]:
    """{candidate: (row map of K, row map of V)}; V's scale rows follow K's. Only maps that fit the shapes."""
    k_rows, v_rows = kv_heads * head_dim, kv_heads * v_head_dim
    maps = {}
    per_k = -(-head_dim // BLOCK)
    per_v = -(-(head_dim + v_head_dim) // BLOCK) - per_k
    if (k_cells, v_cells) == (kv_heads * per_k, kv_heads * per_v):
        block = np.arange(head_dim + v_head_dim) // BLOCK
        head = np.arange(kv_heads)[:, None]
        chain = np.where(block < per_k, head * per_k + block, k_cells + head * per_v + block - per_k)
        maps["chain"] = chain[:, :head_dim].reshape(-1), chain[:, head_dim:].reshape(-1)
    if k_cells * BLOCK >= k_rows and v_cells * BLOCK >= v_rows:
        maps["flat"] = np.arange(k_rows) // BLOCK, k_cells + np.arange(v_rows) // BLOCK
    if k_rows % k_cells == 0 and v_rows % v_cells == 0:
        even = np.arange(k_rows) // (k_rows // k_cells), k_cells + np.arange(v_rows) // (v_rows // v_cells)
        if not ("flat" in maps and all(np.array_equal(a, b) for a, b in zip(even, maps["flat"]))):
            maps["rows/96"] = even
    return maps


def count_missing(name: str, codes: np.ndarray, scales: Scales) -> int:
    """The number of non-zero cells without a code of ±448. Raises FormatError for a NaN code."""
    found = np.zeros(scales.cells.shape, np.bool_)
    mark_full_scale(name, codes, scales, found)
    return int(np.count_nonzero((scales.cells != 0) & ~found))


def choose(counts: dict[str, int], cells: int, wanted: str | None = None) -> str:
    """The map that is clearly best by `counts`, {map: cells without a code of ±448}; or `wanted`, if it is given.

    Raises FormatError where no map is clearly best, or where `wanted` does not fit.
    """
    if wanted is not None:
        if wanted not in counts:
            raise FormatError(f"K/V scales: {wanted} does not fit their shapes; possible: {', '.join(counts)}")
        return wanted
    told = ", ".join(f"{name} leaves {count:,}" for name, count in counts.items())
    # By the config blocks have 128 rows: rows/96 is chosen only where it is clearly better, and excludes no other map.
    believable = [name for name in counts if name != "rows/96"]
    best = min(believable, key=counts.__getitem__, default=None)
    if "rows/96" in counts and (best is None or counts["rows/96"] + max(1, CLEARLY * cells) <= counts[best]):
        best = "rows/96"
    others = [name for name in believable if name != best]
    if best is None or counts[best] > MISSING_AT_MOST * cells:
        raise FormatError(
            f"K/V scales of the global layers: no map fits ({told} of {cells:,} scales without a ±448 code): "
            f"damaged or not the released format; fetch it again, or say --kv-scales chain or flat"
        )
    if any(counts[other] < counts[best] + max(1, CLEARLY * cells) for other in others):
        raise FormatError(
            f"K/V scales of the global layers: no map is clearly best ({told} of {cells:,} scales without a ±448 "
            f"code); say --kv-scales chain (the release) or flat"
        )
    return best
