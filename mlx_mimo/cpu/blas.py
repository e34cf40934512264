"""Limits the threads of NumPy's BLAS, call by call.

OpenBLAS's threads wait busily for some 20 ms after each call; on a machine with few cores the kernels' threads would
have to share cores with them.
"""

import contextlib
import functools

from threadpoolctl import ThreadpoolController

WORTH_WAKING = 2**26  # multiplications: at about 50 a nanosecond a core, this is a millisecond


@functools.cache
def _libraries() -> ThreadpoolController:
    import numpy as np

    np.dot(np.zeros((1, 1)), np.zeros((1, 1)))  # makes NumPy load its BLAS
    return ThreadpoolController().select(user_api="blas")


def limitable() -> list[str]:
    """The BLAS libraries that `limited` limits, with their versions. There is none where NumPy's BLAS is one that
    threadpoolctl does not know, as Accelerate is in NumPy's wheels for macOS; `limited` does nothing then.
    """
    return [f"{library['internal_api']} {library['version'] or ''}".strip() for library in _libraries().info()]


def limited(multiplications: int) -> contextlib.AbstractContextManager:
    """A context in which BLAS uses one thread for little work and the kernels' number for more."""
    from . import kernels  # here: `limitable` needs no compiled kernels

    return _libraries().limit(limits=kernels.threads() if multiplications >= WORTH_WAKING else 1)
