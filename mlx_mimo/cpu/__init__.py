"""The CPU fallback: kernels on packed weights, and the modules that stand in for MLX's.

Importing this needs neither numba nor MLX; `planning.backend.kernels_available` tells whether the rest can be imported.
"""

import warnings

from ..planning import backend

WITHOUT_NUMBA = "no numba or threadpoolctl: MLX's own operations run, many times slower; pip install 'mlx-mimo[cpu]'"


def note_if_missing() -> None:
    """Says once that numba would help."""
    if not backend.kernels_installed():
        warnings.warn(WITHOUT_NUMBA, stacklevel=2)


def set_threads(count: int) -> None:
    """How many threads the kernels use; all cores by default. Without numba there is nothing to set."""
    if backend.kernels_available():
        from . import kernels

        kernels.set_threads(count)
