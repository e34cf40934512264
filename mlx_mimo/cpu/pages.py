"""Large pages for weights, where Linux has them.

The processor reads ahead no further than a page's end, so weights in scattered pages of 4 KB are read more slowly. MLX
takes its memory from malloc, which does not ask for large pages.
"""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise, from Linux' mman.h; COLLAPSE is of Linux 6.1
_AT_ONCE = 2**28  # bytes in one call, so that Ctrl-C is handled between two


@functools.cache
def page_bytes() -> int:
    """The size of a large page; 0 where there are none, or where the machine's settings forbid them."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


@functools.cache
def _madvise():
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def make_large(host: np.ndarray) -> bool:
    """Moves an array's memory into large pages, its address unchanged; returns whether that was done.

    It takes as long as copying the memory, and next to nothing where the pages are large already. Arrays of less than
    two large pages stay as they are. Where the kernel refuses (an old one, or no free memory), it may do it later.
    """
    size = page_bytes()
    if not size or host.nbytes < 2 * size:
        return False
    address = host.ctypes.data
    first, last = -(-address // size) * size, (address + host.nbytes) // size * size
    if _madvise()(first, last - first, _HUGEPAGE):
        return False
    step = -(-_AT_ONCE // size) * size
    done = True
    for at in range(first, last, step):
        done = _madvise()(at, min(step, last - at), _COLLAPSE) == 0 and done
    return done
