"""The CPU fallback: kernels on packed weights, and the modules that stand in for MLX's.

Importing this needs neither numba nor MLX; `available` tells whether the rest can be imported.
"""

import importlib.util
import os
import warnings

WITHOUT_NUMBA = "no numba or threadpoolctl: MLX's own operations run, many times slower; pip install 'mlx-mimo[cpu]'"


def available() -> bool:
    """Whether the kernels can be used. MLX_MIMO_CPU_KERNELS=0 turns them off, for gradients or a comparison."""
    return os.environ.get("MLX_MIMO_CPU_KERNELS") != "0" and _installed()


def _installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("numba", "threadpoolctl"))


def note_if_missing() -> None:
    """Says once that numba would help."""
    if not _installed():
        warnings.warn(WITHOUT_NUMBA, stacklevel=2)


def adapt(model, kernels: bool = True) -> None:
    """Makes a loaded model fit for the CPU, in place: modules with kernels, float32 elsewhere.

    Without kernels all is float32: MLX's CPU backend accumulates in the activations' type, and is slow in 16 bits.
    """
    if kernels and available():
        from .modules import use_cpu_kernels

        use_cpu_kernels(model)
        return
    import mlx.core as mx
    from mlx.utils import tree_map

    note_if_missing()
    narrow = (mx.bfloat16, mx.float16)
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in narrow else x, model.parameters()))


def set_threads(count: int) -> None:
    """How many threads the kernels use; all cores by default. Without numba there is nothing to set."""
    if available():
        from . import kernels

        kernels.set_threads(count)
