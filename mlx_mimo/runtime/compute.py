"""Which strategy computes the experts, by device and format."""

import mlx.core as mx

from .. import cpu
from ..checkpoint.record import RecordLayout
from ..experts.compute import Compute, MLXCompute
from ..planning import backend


def choose_compute(layout: RecordLayout, hidden_size: int) -> Compute:
    """The strategy for this device and format: the one place where it is decided."""
    if mx.default_device() == mx.cpu:
        if backend.kernels_available():
            from ..cpu.experts import KernelCompute

            if KernelCompute.takes(layout, hidden_size):
                return KernelCompute(layout, hidden_size)
        cpu.note_if_missing()
    return MLXCompute(layout, hidden_size)
