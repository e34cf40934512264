"""Limits the threads of NumPy's BLAS, call by call.

OpenBLAS's threads wait busily for some 20 ms after each call; on a machine with few cores the kernels' threads would
have to share cores with them.
"""

import contextlib
import functools

from threadpoolctl import ThreadpoolController

from . import kernels

WORTH_WAKING = 2**26  # multiplications: at about 50 a nanosecond a core, this is a millisecond


@functools.cache
def _libraries() -> ThreadpoolController:
    import numpy as np

    np.dot(np.zeros((1, 1)), np.zeros((1, 1)))  # makes NumPy load its BLAS
    return ThreadpoolController().select(user_api="blas")


def limited(multiplications: int) -> contextlib.AbstractContextManager:
    """A context in which BLAS uses one thread for little work and the kernels' number for more."""
    return _libraries().limit(limits=kernels.threads() if multiplications >= WORTH_WAKING else 1)
