"""The kernels: packed weights times a few tokens, gate and up together, dequantised rows.

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

from .arithmetic import KERNEL, call, dots, put, unpack, word

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
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("arithmetic.py", "formats.py")]
    return int.from_bytes(hashlib.sha256(b"".join(sources)).digest()[:4], "little")


EDITION = _edition()


def _kernel(function: Callable) -> int:
    """The address of a kernel, compiled or taken from numba's cache; says so the first time on a machine."""
    global _noted
    if not _noted:
        _noted = True
        if not list(Path(_launch._cache.cache_path).glob("kernels.*.kernel-*.nbi")):
            print("compiling kernels, once", file=sys.stderr, flush=True)
    compiled = cfunc(KERNEL, cache=True)(function)
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


@functools.cache
def multiply(format: str, scale: str, units: int, tokens: int) -> int:
    """out[o + t, r] = weights[slot][r] · x[i + t], for items (run of tokens, two rows r); the address of the kernel.

    Table: weight, scales, biases; bytes a slot of weight, of scales; bytes a row of weight, of scales; rows; n (see
    `dots`); x, sums, bytes a row of each; out, bytes a row of it; slot, i and o of every run (three int64 arrays).
    """

    edition = EDITION

    def kernel(table, first, last):
        _ = edition
        w0, s0, b0 = word(table, 0), word(table, 1), word(table, 2)
        w_slot, s_slot, w_row, s_row = word(table, 3), word(table, 4), word(table, 5), word(table, 6)
        rows, n = word(table, 7), word(table, 8)
        x0, sums0, x_row, sums_row = word(table, 9), word(table, 10), word(table, 11), word(table, 12)
        out, out_row = word(table, 13), word(table, 14)
        slots, x_rows, out_rows = word(table, 15), word(table, 16), word(table, 17)
        blocks = (rows + 1) // 2
        for item in range(first, last):
            run, row = item // blocks, item % blocks * 2
            slot, x_at = word(slots, run), word(x_rows, run)
            w = w0 + slot * w_slot + row * w_row
            s = s0 + slot * s_slot + row * s_row
            b = b0 + slot * s_slot + row * s_row
            x, sums = x0 + x_at * x_row, sums0 + x_at * sums_row
            at = out + word(out_rows, run) * out_row + row * 4
            if row + 1 < rows:
                two = dots(format, scale, units, 2, tokens, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n)
                for t in range(tokens):
                    put(at + t * out_row, two[t])
                    put(at + t * out_row + 4, two[tokens + t])
            else:
                one = dots(format, scale, units, 1, tokens, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n)
                for t in range(tokens):
                    put(at + t * out_row, one[t])

    return _kernel(kernel)


@functools.cache
def gate_up(format: str, scale: str, units: int) -> int:
    """out[o, r] = gate[slot][r] · x[i] and up_out[o, r] = up[slot][r] · x[i], for items (run of one token, row r).

    Table as for `multiply`, then up's weight, scales and biases and up_out; both are of one shape and format.
    """

    edition = EDITION

    def kernel(table, first, last):
        _ = edition
        w0, s0, b0 = word(table, 0), word(table, 1), word(table, 2)
        w_slot, s_slot, w_row, s_row = word(table, 3), word(table, 4), word(table, 5), word(table, 6)
        rows, n = word(table, 7), word(table, 8)
        x0, sums0, x_row, sums_row = word(table, 9), word(table, 10), word(table, 11), word(table, 12)
        out, out_row = word(table, 13), word(table, 14)
        slots, x_rows, out_rows = word(table, 15), word(table, 16), word(table, 17)
        up_w, up_s, up_b, up_out = word(table, 18), word(table, 19), word(table, 20), word(table, 21)
        for item in range(first, last):
            run, row = item // rows, item % rows
            slot, x_at = word(slots, run), word(x_rows, run)
            w_at, s_at = slot * w_slot + row * w_row, slot * s_slot + row * s_row
            x, sums = x0 + x_at * x_row, sums0 + x_at * sums_row
            w, s, b = w0 + w_at, s0 + s_at, b0 + s_at
            gate = dots(format, scale, units, 1, 1, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n)[0]
            w, s, b = up_w + w_at, up_s + s_at, up_b + s_at
            up = dots(format, scale, units, 1, 1, w, w_row, s, b, s_row, x, x_row, sums, sums_row, n)[0]
            at = word(out_rows, run) * out_row + row * 4
            put(out + at, gate)
            put(up_out + at, up)

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
