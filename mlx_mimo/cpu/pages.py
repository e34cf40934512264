"""Large pages for weights, where Linux has them.

With pages of 4 KB, scattered over the memory, the processor reads ahead no further than the page's end, and weights
come slower. MLX takes its memory from malloc, which does not ask for more.
"""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise, from Linux' mman.h; COLLAPSE is of Linux 6.1
_AT_ONCE = 2**28  # bytes: Ctrl-C is heard between two calls


@functools.cache
def page_bytes() -> int:
    """The size of a large page; 0 where there are none, or where whoever runs this machine wants none."""
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

    It takes as long as copying the memory, and next to nothing where that was done before. An array of less than two
    large pages is left alone. Where the kernel refuses (an old one, or no free memory), it may do so by itself later.
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
