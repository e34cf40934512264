"""The kernels: packed weights times a few tokens, dequantised rows, activations as whole numbers.

A kernel is a C function `(table, first, last)`: a table of addresses and counts, and which of its items to do. `run`
spreads a kernel's items over the threads through `_launch`, the one parallel function, so a kernel itself compiles in
a tenth of a second. numba keeps the compiled code on disk: once on a machine.
"""

import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from numba import cfunc, njit, prange

from .arithmetic import KERNEL, call, dots, put, split, unpack, word
from .formats import FORMAT_BITS

BYTES_PER_THREAD = 2**16  # of weights: less is not worth waking another thread for
_lock = threading.Lock()  # not every threading layer of numba takes calls from two threads at once
_threads = 0
_noted = False


def set_threads(count: int) -> None:
    """How many threads kernels use from now on; the default is all cores."""
    global _threads
    _threads = max(1, min(count, numba.config.NUMBA_NUM_THREADS))


def threads() -> int:
    return _threads or min(numba.config.NUMBA_NUM_THREADS, _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _choose_cache() -> None:
    """Where numba keeps compiled code: beside this file, else the user's cache, else for this process only."""
    if os.environ.get("NUMBA_CACHE_DIR") or _writable(Path(__file__).parent / "__pycache__"):
        return
    import platformdirs

    user = Path(platformdirs.user_cache_dir("mlx-mimo")) / "numba"
    # A folder that others could write to is no place for it: numba's cache is pickled.
    numba.config.CACHE_DIR = str(user if _writable(user) else tempfile.mkdtemp(prefix="mlx-mimo-"))


_choose_cache()


def _edition() -> int:
    """Changes with the code that kernels are made of; numba itself looks at this file only."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("arithmetic.py", "digits.py", "formats.py")]
    return int.from_bytes(hashlib.sha256(b"".join(sources)).digest()[:4], "little")


EDITION = _edition()


def _kernel(function: Callable) -> int:
    """The address of a kernel, compiled or taken from numba's cache; the first that is compiled is told of."""
    global _noted
    compiled = cfunc(KERNEL, cache=True)(function)
    if not (_noted or compiled.cache_hits):
        _noted = True
        print("compiling kernels, once", file=sys.stderr, flush=True)
    _kept.append(compiled)
    return compiled.address


_kept: list = []  # a kernel's code lives as long as its object


@njit(cache=True, nogil=True)  # expert reads go on meanwhile, in Python threads
def _launch_here(function, table, items):
    call(function, table, 0, items)


@njit(parallel=True, cache=True, nogil=True)
def _launch(function, table, items, parts):
    for part in prange(parts):
        call(function, table, items * part // parts, items * (part + 1) // parts)


def run(kernel: int, table: list[int], items: int, nbytes: int) -> None:
    """Runs the kernel at address `kernel` on all its items, which read `nbytes` of weights; returns when it is done."""
    words = np.array(table, np.int64)
    parts = min(threads(), max(1, nbytes // BYTES_PER_THREAD))
    if parts == 1:
        _launch_here(kernel, words.ctypes.data, items)
        return
    with _lock:
        numba.set_num_threads(parts)
        _launch(kernel, words.ctypes.data, items, parts)


# Each factory below makes one kernel for a format: what is known when it is made is a constant in its code.


def rows_together(format: str, whole: int) -> int:
    """How many rows of weights share what is read of x. One where that keeps up: memory likes a single stream best."""
    return 1 if whole and FORMAT_BITS[format] == 8 else 2


@functools.cache
def multiply(format: str, scale: str, units: int, tokens: int, whole: int) -> int:
    """out[t, r] = weights[r] · x[t] of every run, for items (run of tokens, `rows_together` rows).

    Returns the kernel's address. Table: runs; bytes a row of weight, of scales; rows; n (see `dots`); x, sums, bytes a
    row of each; bytes a row of out; how many runs. Runs is int64 (5, runs): addresses of weight, scales and biases, the
    first row of x, the address of the first row of out.
    """

    edition, together = EDITION, rows_together(format, whole)

    def kernel(table, first, last):
        _ = edition
        runs, w_row, s_row, rows, n = word(table, 0), word(table, 1), word(table, 2), word(table, 3), word(table, 4)
        x0, sums0, x_row, sums_row = word(table, 5), word(table, 6), word(table, 7), word(table, 8)
        out_row, count = word(table, 9), word(table, 10)
        blocks = (rows + together - 1) // together
        for item in range(first, last):
            run, row = item // blocks, item % blocks * together
            w = word(runs, run) + row * w_row
            s, b = word(runs, run + count) + row * s_row, word(runs, run + 2 * count) + row * s_row
            x_at = word(runs, run + 3 * count)
            x, sums = x0 + x_at * x_row, sums0 + x_at * sums_row
            at = word(runs, run + 4 * count) + row * 4
            if row + together <= rows:
                found = dots(
                    whole, format, scale, units, together, tokens, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n
                )
                for r in range(together):
                    for t in range(tokens):
                        put(at + t * out_row + 4 * r, found[r * tokens + t])
            else:
                for r in range(rows - row):
                    one = dots(
                        whole, format, scale, units, 1, tokens, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n
                    )
                    for t in range(tokens):
                        put(at + t * out_row + 4 * r, one[t])
                    w, s, b = w + w_row, s + s_row, b + s_row

    return _kernel(kernel)


@functools.cache
def dequantise(format: str, scale: str, units: int) -> int:
    """out[r] = row r as float32. Table: weight, scales, biases, bytes a row of weight, of scales, lanes, out, n, bytes
    of a row of out."""

    edition = EDITION

    def kernel(table, first, last):
        _ = edition
        w0, s0, b0, w_row, s_row = word(table, 0), word(table, 1), word(table, 2), word(table, 3), word(table, 4)
        lanes, out, n, out_row = word(table, 5), word(table, 6), word(table, 7), word(table, 8)
        for r in range(first, last):
            unpack(format, scale, units, w0 + r * w_row, s0 + r * s_row, b0 + r * s_row, lanes, out + r * out_row, n)

    return _kernel(kernel)


@functools.cache
def split_rows(planes: int, units: int) -> int:
    """Activations as whole numbers. Table: x, bytes a row; digits, bytes a row; sums and steps, bytes a row; n."""

    edition = EDITION

    def kernel(table, first, last):
        _ = edition
        x, x_row, out, out_row = word(table, 0), word(table, 1), word(table, 2), word(table, 3)
        sums, sums_row, n = word(table, 4), word(table, 5), word(table, 6)
        for r in range(first, last):
            split(planes, units, x + r * x_row, out + r * out_row, sums + r * sums_row, n)

    return _kernel(kernel)
