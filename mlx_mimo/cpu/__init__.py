"""The CPU fallback: kernels that read packed weights, and modules that use them in the place of MLX's.

This file imports neither numba nor MLX; `planning.backend.kernels_available` tells whether the others can be imported.
"""

import warnings

from ..planning import backend

WITHOUT_NUMBA = "no numba or threadpoolctl: MLX's own operations run, many times slower; pip install 'mlx-mimo[cpu]'"


def note_if_missing() -> None:
    """Warns where the packages that the kernels need are not installed."""
    if not backend.kernels_installed():
        warnings.warn(WITHOUT_NUMBA, stacklevel=2)


def set_threads(count: int) -> None:
    """Sets how many threads the kernels use; all cores by default. Does nothing without numba."""
    if backend.kernels_available():
        from . import kernels

        kernels.set_threads(count)
