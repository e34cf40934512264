"""The backend of this installation: Metal, CUDA, or the CPU with or without our kernels.

MLX is imported only on a Mac or where its CUDA build is installed.
"""

import importlib.util
import os
import platform
import sys
from typing import Any

from .. import device
from ..errors import UsageError


def backend_and_limits() -> tuple[str, dict[str, Any]]:
    """("metal", MLX's device information) on a Mac; ("cpu", {}) or ("cuda", …) elsewhere, or where MLX_MIMO_DEVICE
    chooses the CPU. Raises UsageError where it chooses a GPU and there is none.
    """
    asked = device.asked()
    if asked == "cpu":
        return "cpu", {}
    if platform.system() != "Darwin" and not _cuda_wheel():
        if asked == "gpu":
            raise UsageError(device.NO_GPU)
        return "cpu", {}
    import mlx.core as mx

    device.choose()
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu", {}
    return ("metal" if mx.metal.is_available() else "cuda"), mx.device_info()


def _cuda_wheel() -> bool:
    # importlib.metadata would read a file of every installed package; the folders' names are enough.
    return any(
        name.startswith("mlx_cuda") and name.endswith("-info")
        for path in sys.path
        if os.path.isdir(path)
        for name in os.listdir(path)
    )


def kernels_available() -> bool:
    """Whether the CPU kernels can be used. MLX_MIMO_CPU_KERNELS=0 turns them off, for gradients or a comparison."""
    return os.environ.get("MLX_MIMO_CPU_KERNELS") != "0" and kernels_installed()


def kernels_installed() -> bool:
    """Whether the packages that the CPU kernels need are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("numba", "threadpoolctl"))
