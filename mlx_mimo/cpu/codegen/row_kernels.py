"""The kernels: numba C functions `(table, first, last)` that do the items first..last of a table.

Each factory makes the kernel of one format; what is known when it is made is a constant in its code. A kernel compiles
in a tenth of a second, and numba keeps the compiled code on disk.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from numba import cfunc

from .. import kernel_cache
from ..formats import FORMAT_BITS
from ..tables import DequantiseTable, MultiplyTable, RunTable, SplitTable, positions
from .intrinsics import KERNEL, dots, load_word, split_activations, store_float, unpack

kernel_cache.choose()
_announced = False
_kept: list[Any] = []  # a kernel's code lives as long as its object


def _edition() -> int:
    """A number that changes with the code that kernels are made of; numba itself looks at this file only."""
    folder = Path(__file__).parent
    generators = [folder / f"{name}.py" for name in ("float_products", "int8_products", "intrinsics", "vectors")]
    facts = [folder.parent / f"{name}.py" for name in ("formats", "int8_products", "tables")]
    sources = b"".join(path.read_bytes() for path in generators + facts)
    return int.from_bytes(hashlib.sha256(sources).digest()[:4], "little")


EDITION = _edition()


class Kernel(NamedTuple):
    """A compiled kernel: its address, and the class of the tables that it reads."""

    address: int
    table: type


def _compile(function: Callable[[int, int, int], None], table: type) -> Kernel:
    """The kernel, compiled or taken from numba's cache. Announces the first one that is compiled on stderr."""
    global _announced
    compiled = cfunc(KERNEL, cache=True)(function)
    if not (_announced or compiled.cache_hits):
        _announced = True
        print("compiling kernels, once", file=sys.stderr, flush=True)
    _kept.append(compiled)
    return Kernel(compiled.address, table)


def rows_together(format: str, int8: int) -> int:
    """How many rows of weights share one load of x. One where that is fast enough: memory is fastest in one stream."""
    return 1 if int8 and FORMAT_BITS[format] == 8 else 2


@functools.cache
def multiply(format: str, scale: str, units: int, tokens: int, int8: int) -> Kernel:
    """out[t, r] = weights[r] · x[t] of every run, for items (run of `tokens` rows of x, `rows_together` rows)."""

    edition, together = EDITION, rows_together(format, int8)
    at, run_at = positions(MultiplyTable), positions(RunTable)

    def kernel(table, first, last):
        _ = edition
        runs, count, rows = load_word(table, at.runs), load_word(table, at.run_count), load_word(table, at.rows)
        w_row, s_row = load_word(table, at.weight_row_bytes), load_word(table, at.scales_row_bytes)
        x0, x_row = load_word(table, at.x), load_word(table, at.x_row_bytes)
        sums0, sums_row = load_word(table, at.sums), load_word(table, at.sums_row_bytes)
        out_row, n = load_word(table, at.out_row_bytes), load_word(table, at.length)
        blocks = (rows + together - 1) // together
        for item in range(first, last):
            run, row = item // blocks, item % blocks * together
            w = load_word(runs, run + run_at.weight * count) + row * w_row
            s = load_word(runs, run + run_at.scales * count) + row * s_row
            b = load_word(runs, run + run_at.biases * count) + row * s_row
            x_at = load_word(runs, run + run_at.x_row * count)
            x, sums = x0 + x_at * x_row, sums0 + x_at * sums_row
            out = load_word(runs, run + run_at.out * count) + row * 4
            if row + together <= rows:
                found = dots(
                    int8, format, scale, units, together, tokens, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n
                )
                for r in range(together):
                    for t in range(tokens):
                        store_float(out + t * out_row + 4 * r, found[r * tokens + t])
            else:
                for r in range(rows - row):
                    one = dots(
                        int8, format, scale, units, 1, tokens, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n
                    )
                    for t in range(tokens):
                        store_float(out + t * out_row + 4 * r, one[t])
                    w, s, b = w + w_row, s + s_row, b + s_row

    return _compile(kernel, MultiplyTable)


@functools.cache
def dequantise(format: str, scale: str, units: int) -> Kernel:
    """out[r] = row r of the weights as float32, for items (row)."""

    edition, at = EDITION, positions(DequantiseTable)

    def kernel(table, first, last):
        _ = edition
        w0, w_row = load_word(table, at.weight), load_word(table, at.weight_row_bytes)
        s0, b0, s_row = load_word(table, at.scales), load_word(table, at.biases), load_word(table, at.scales_row_bytes)
        lanes, n = load_word(table, at.lane_scales), load_word(table, at.length)
        out, out_row = load_word(table, at.out), load_word(table, at.out_row_bytes)
        for r in range(first, last):
            unpack(format, scale, units, w0 + r * w_row, s0 + r * s_row, b0 + r * s_row, lanes, out + r * out_row, n)

    return _compile(kernel, DequantiseTable)


@functools.cache
def split_rows(planes: int, units: int) -> Kernel:
    """Rows of activations as signed bytes, sums and steps for int8 products, for items (row)."""

    edition, at = EDITION, positions(SplitTable)

    def kernel(table, first, last):
        _ = edition
        x, x_row = load_word(table, at.x), load_word(table, at.x_row_bytes)
        parts, parts_row = load_word(table, at.signed_bytes), load_word(table, at.signed_bytes_row_bytes)
        sums, sums_row, n = load_word(table, at.sums), load_word(table, at.sums_row_bytes), load_word(table, at.groups)
        for r in range(first, last):
            split_activations(planes, units, x + r * x_row, parts + r * parts_row, sums + r * sums_row, n)

    return _compile(kernel, SplitTable)
