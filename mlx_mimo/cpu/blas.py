"""How many threads NumPy's BLAS may use for a call. OpenBLAS's wait for more work busily, for some 20 ms after each
call, and on a machine with few cores they take the kernels' from them."""

import contextlib
import functools

from threadpoolctl import ThreadpoolController

WORTH_WAKING = 2**26  # multiplications: at about 50 a nanosecond a core, this is a millisecond


@functools.cache
def _libraries() -> ThreadpoolController:
    import numpy as np

    np.dot(np.zeros((1, 1)), np.zeros((1, 1)))  # loads it, where that has been put off
    return ThreadpoolController().select(user_api="blas")


def limitable() -> list[str]:
    """The BLAS libraries that `limited` limits, with their versions. There is none where NumPy's BLAS is one that
    threadpoolctl does not know, as Accelerate is in NumPy's wheels for macOS; `limited` does nothing then.
    """
    return [f"{library['internal_api']} {library['version'] or ''}".strip() for library in _libraries().info()]


def limited(multiplications: int) -> contextlib.AbstractContextManager:
    """Within it BLAS uses one thread for little work, as many as the kernels for more; then as many as before."""
    from . import kernels  # here, since compiling them is not for whoever only asks what is `limitable`

    return _libraries().limit(limits=kernels.threads() if multiplications >= WORTH_WAKING else 1)
