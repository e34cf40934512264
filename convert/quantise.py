"""Float32 weights to stored bytes: by numba kernels, or by MLX where numba is absent (on a Mac the GPU)."""

from dataclasses import dataclass

import numpy as np

from mlx_mimo.device import choose as choose_device

from .recipe import Quantisation


@dataclass(frozen=True)
class Encoded:
    """The stored parts of some rows of a matrix, and how far they are from the weights."""

    parts: dict[str, np.ndarray]  # weight, scales, biases → bytes as stored, row by row
    squared_error: float
    squared_weight: float


def kernels_available() -> bool:
    try:
        from . import kernels  # noqa: F401
    except ImportError:
        return False
    return True


def bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 of the nearest bfloat16, ties to even; NaN does not occur."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray, quantisation: Quantisation | None) -> Encoded:
    """(R, C) float32 → what is stored: their bfloat16 where `quantisation` is None, else the quantised bfloat16."""
    if quantisation is None:
        bits = bfloat16(values)
        return Encoded({"weight": bits}, *_errors(values, from_bfloat16(bits)))
    return (_encode_numba if kernels_available() else _encode_mlx)(values, quantisation)


def _encode_numba(values: np.ndarray, quantisation: Quantisation) -> Encoded:
    from . import kernels

    rows, columns = values.shape
    bits_in = np.ascontiguousarray(values).view(np.uint32)
    packed = np.empty((rows, columns * quantisation.bits // 8), np.uint8)
    groups = (rows, columns // quantisation.group_size)
    if quantisation.mode == "mxfp4":
        scales = np.empty(groups, np.uint8)
        errors = kernels.quantise_mxfp4(bits_in, packed, scales)
        return Encoded({"weight": packed, "scales": scales}, *errors)
    scales, biases = np.empty(groups, np.uint16), np.empty(groups, np.uint16)
    errors = kernels.quantise_affine(bits_in, quantisation.group_size, quantisation.bits, packed, scales, biases)
    return Encoded({"weight": packed, "scales": scales, "biases": biases}, *errors)


def _encode_mlx(values: np.ndarray, quantisation: Quantisation) -> Encoded:
    import mlx.core as mx

    choose_device()
    weight = mx.array(bfloat16(values)).view(mx.bfloat16)
    options = {"group_size": quantisation.group_size, "bits": quantisation.bits, "mode": quantisation.mode}
    arrays = mx.quantize(weight, **options)
    wide = [arrays[0], *(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for a in arrays[1:])]
    back = mx.dequantize(*wide, **options).astype(mx.float32)
    mx.eval(*arrays, back)
    views = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a.view(mx.uint8)) for a in arrays]
    parts = dict(zip(("weight", "scales", "biases"), views))
    return Encoded(parts, *_errors(values, np.array(back)))


def _errors(values: np.ndarray, stored: np.ndarray) -> tuple[float, float]:
    difference = (stored - values).astype(np.float64)
    return float(np.square(difference).sum()), float(np.square(values.astype(np.float64)).sum())
