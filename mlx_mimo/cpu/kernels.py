"""Runs kernels: spreads the items of a table over threads.

`codegen.row_kernels` makes kernels. `run` calls one through `_run_parallel`, the one parallel function, so that a
kernel itself compiles quickly.
"""

import os
import threading
from typing import NamedTuple

import numba
from numba import njit, prange

from . import kernel_cache
from .codegen.intrinsics import call_kernel
from .codegen.row_kernels import Kernel
from .tables import words

BYTES_PER_THREAD = 2**16  # of weights: less is not worth waking another thread for
_lock = threading.Lock()  # not every threading layer of numba takes calls from two threads at once
_threads = 0
kernel_cache.choose()


def set_threads(count: int) -> None:
    """Sets how many threads kernels use from now on; the default is all cores."""
    global _threads
    _threads = max(1, min(count, numba.config.NUMBA_NUM_THREADS))


def threads() -> int:
    """How many threads kernels use."""
    return _threads or min(numba.config.NUMBA_NUM_THREADS, _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@njit(cache=True, nogil=True)  # expert reads go on meanwhile, in Python threads
def _run_here(address, table, items):
    call_kernel(address, table, 0, items)


@njit(parallel=True, cache=True, nogil=True)
def _run_parallel(address, table, items, parts):
    for part in prange(parts):
        call_kernel(address, table, items * part // parts, items * (part + 1) // parts)


def run(kernel: Kernel, table: NamedTuple, items: int, nbytes: int) -> None:
    """Runs `kernel` on the items 0..items of `table`, which read `nbytes` of weights; returns when all are done.

    Raises TypeError for a table of another class than the kernel reads.
    """
    if type(table) is not kernel.table:
        raise TypeError(f"{type(table).__name__} given to a kernel that reads {kernel.table.__name__}")
    content = words(table)
    parts = min(threads(), max(1, nbytes // BYTES_PER_THREAD))
    if parts == 1:
        _run_here(kernel.address, content.ctypes.data, items)
        return
    with _lock:
        numba.set_num_threads(parts)
        _run_parallel(kernel.address, content.ctypes.data, items, parts)
