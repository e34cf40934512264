"""Functions of MLX arrays that compute in NumPy on the host."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..errors import MimoError

NO_TRANSFORM = "CPU kernels have no {}; load the model with MLX's own operations for that (MLX_MIMO_CPU_KERNELS=0)"


def on_host(compute: Callable[..., np.ndarray | list[np.ndarray]]) -> Callable:
    """`compute` as a function of as many MLX arrays. Inside a transformation it raises MimoError."""

    @mx.custom_function
    def function(*arrays: mx.array):
        result = compute(*map(host, arrays))
        return [mx.array(part) for part in result] if isinstance(result, list) else mx.array(result)

    @function.vjp
    def _(*_):
        raise MimoError(NO_TRANSFORM.format("gradient"))

    @function.jvp
    def _(*_):
        raise MimoError(NO_TRANSFORM.format("forward derivative"))

    @function.vmap
    def _(*_):
        raise MimoError(NO_TRANSFORM.format("vmap"))

    return function


def host(x: mx.array) -> np.ndarray:
    """x as a contiguous float32 NumPy array: waits for x, and copies only what is not contiguous float32 already.

    Raises MimoError inside a transformation (compile, vmap), where x has no value.
    """
    try:
        # No MLX operation where none is needed: waiting for one takes longer than many of our kernels.
        return np.ascontiguousarray(x if x.dtype == mx.float32 else x.astype(mx.float32))
    except ValueError as error:  # "Attempting to eval an array during function transformations"
        raise MimoError(NO_TRANSFORM.format("compile or vmap")) from error
