"""Encodes float32 weights as stored bytes: by numba kernels, or by MLX where numba is absent (on a Mac on the GPU)."""

from dataclasses import dataclass

import numpy as np

from mlx_mimo.checkpoint.quantization import Quantization
from mlx_mimo.device import choose as choose_device


@dataclass(frozen=True)
class Encoded:
    """The stored parts of some rows of a matrix, and the sums of squares that give their relative error."""

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
    """float32 → uint16: the bits of the nearest bfloat16, ties to even. The values must not be NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray, quantization: Quantization | None) -> Encoded:
    """Encodes (R, C) float32: as bfloat16 where `quantization` is None, else their bfloat16 quantised."""
    if quantization is None:
        bits = bfloat16(values)
        return Encoded({"weight": bits}, *_errors(values, from_bfloat16(bits)))
    return (_encode_numba if kernels_available() else _encode_mlx)(values, quantization)


def _encode_numba(values: np.ndarray, quantization: Quantization) -> Encoded:
    from . import kernels

    rows, columns = values.shape
    bits_in = np.ascontiguousarray(values).view(np.uint32)
    packed = np.empty((rows, columns * quantization.bits // 8), np.uint8)
    groups = (rows, columns // quantization.group_size)
    if quantization.mode == "mxfp4":
        scales = np.empty(groups, np.uint8)
        errors = kernels.quantize_mxfp4(bits_in, packed, scales)
        return Encoded({"weight": packed, "scales": scales}, *errors)
    scales, biases = np.empty(groups, np.uint16), np.empty(groups, np.uint16)
    errors = kernels.quantize_affine(bits_in, quantization.group_size, quantization.bits, packed, scales, biases)
    return Encoded({"weight": packed, "scales": scales, "biases": biases}, *errors)


def _encode_mlx(values: np.ndarray, quantization: Quantization) -> Encoded:
    import mlx.core as mx

    choose_device()
    weight = mx.array(bfloat16(values)).view(mx.bfloat16)
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    arrays = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
    scales, *biases = (a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for a in arrays[1:])
    back = mx.dequantize(
        arrays[0], scales, biases[0] if biases else None, group_size=group_size, bits=bits, mode=mode
    ).astype(mx.float32)
    mx.eval(*arrays, back)
    views = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a.view(mx.uint8)) for a in arrays]
    parts = dict(zip(("weight", "scales", "biases"), views))
    return Encoded(parts, *_errors(values, np.array(back)))


def _errors(values: np.ndarray, stored: np.ndarray) -> tuple[float, float]:
    difference = (stored - values).astype(np.float64)
    return float(np.square(difference).sum()), float(np.square(values.astype(np.float64)).sum())
