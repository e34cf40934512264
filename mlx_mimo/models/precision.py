"""Float32 matrix products that are float32.

On CUDA, and on Apple silicon with neural accelerators (M5 on), MLX multiplies float32 matrices with 10 bits of
mantissa unless MLX_ENABLE_TF32=0 is set before its first operation. A library must not set that for its whole
process, and the router needs its 24 bits: with fewer, tokens near a tie change experts between prefill and decode.
"""

import functools
import os
import re

import mlx.core as mx

PARTS = 3  # of 8 bits each: a float32's 24


def float32_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x (..., K) · weightᵀ (N, K) → (..., N), in float32 on any device."""
    rows = x.size // x.shape[-1]
    # No backend shortens the product of a matrix and a vector.
    if rows <= 1 or _is_exact():
        return x.astype(mx.float32) @ weight.astype(mx.float32).T
    return split_matmul(x, weight)


def split_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """As `float32_matmul`, as a sum of products of bfloat16 values, which no backend shortens."""
    x_parts, weight_parts = bfloat16_parts(x), bfloat16_parts(weight)
    pairs = [(i, j) for i in range(len(x_parts)) for j in range(len(weight_parts)) if i + j < PARTS]
    (i, j), *rest = sorted(pairs, key=sum, reverse=True)  # the smallest first
    total = x_parts[i] @ weight_parts[j].T
    for i, j in rest:
        total = total + x_parts[i] @ weight_parts[j].T
    return total


def bfloat16_parts(x: mx.array) -> list[mx.array]:
    """Float32 arrays of bfloat16 values that add up to x: one array where x is bfloat16, else three."""
    if x.dtype == mx.bfloat16:
        return [x.astype(mx.float32)]
    parts, rest = [], x.astype(mx.float32)
    for _ in range(PARTS):
        parts.append(rest.astype(mx.bfloat16).astype(mx.float32))
        rest = rest - parts[-1]
    return parts


def _is_exact() -> bool:
    """Whether the default device multiplies float32 matrices in float32."""
    device = mx.default_device()
    return device.type == mx.DeviceType.cpu or os.environ.get("MLX_ENABLE_TF32") == "0" or _has_no_short_float32()


@functools.cache
def _has_no_short_float32() -> bool:
    """Apple silicon up to the M4, by the generation in its architecture's name."""
    if not mx.metal.is_available():
        return False
    match = re.fullmatch(r"applegpu_g(\d+)\w*", str(mx.device_info().get("architecture", "")))
    return match is not None and int(match[1]) < 17
