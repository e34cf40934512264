"""How experts are computed, by device and format."""

import mlx.core as mx

from .. import cpu
from ..checkpoint.record import RecordLayout
from ..experts.compute import Compute, MLXCompute
from ..planning import backend


def choose_compute(layout: RecordLayout, hidden_size: int) -> Compute:
    """Returns the way of computing experts of this layout on the default device: the CPU kernels where they are there
    and take the layout, else MLX."""
    if mx.default_device() == mx.cpu:
        if backend.kernels_available():
            from ..cpu.experts import KernelCompute

            if KernelCompute.takes(layout, hidden_size):
                return KernelCompute(layout, hidden_size)
        cpu.note_if_missing()
    return MLXCompute(layout, hidden_size)
