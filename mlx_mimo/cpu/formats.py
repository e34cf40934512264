"""The formats of weights that the kernels read: their names, their bits, and where eight codes lie in a word.

A row of MLX's packed weights is one little-endian stream of bits, so eight codes of `bits` bits are `bits` bytes. One
32-bit load broadcast over the lanes and masked leaves lane i holding code_i * 2^shift_i. The kernels do not undo the
shift: the activations are multiplied by 2^-shift_i beforehand (`lane_scales`; a power of two, so exact).
"""

import functools

import numpy as np
from llvmlite import binding

LANES = 8  # float32 lanes of one AVX2 register, of two NEON registers
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
AFFINE = {f"affine{bits}": bits for bits in AFFINE_BITS}
FORMAT_BITS = {**AFFINE, "mxfp4": 4, "bf16": 16, "f16": 16, "f32": 32}
SCALE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "e8m0": 1}


@functools.cache
def _cpu_features() -> dict[str, bool]:
    return dict(binding.get_host_cpu_features())


def _unsigned_conversion_is_cheap() -> bool:
    """x86 before AVX-512 converts only signed integers in one instruction; ARM converts both."""
    return _cpu_features().get("avx512vl", False) or not binding.get_process_triple().startswith(("x86", "i686"))


def windows(bits: int) -> list[tuple[int, int]]:
    """(byte offset of the 32-bit load, shift within it) of each lane of a unit of eight codes.

    No load reaches beyond the unit, except those of 2 and 3 bits (see `codegen.vectors.load_codes`).
    """
    if bits <= 4:
        return [(0, bits * lane) for lane in range(LANES)]
    return [(0, bits * lane) if lane < 4 else (bits - 4, bits * lane - 8 * (bits - 4)) for lane in range(LANES)]


def high_shift(bits: int) -> int:
    """How far lanes 4 to 7 are shifted down so that no code reaches the sign bit."""
    return 0 if bits < 4 or _unsigned_conversion_is_cheap() else 8


def lane_scales(format: str) -> np.ndarray:
    """The factors of the activations, lane by lane: (8,) float32."""
    bits = FORMAT_BITS[format]
    if format not in AFFINE or bits == 8:
        return np.ones(LANES, np.float32)
    shifts = [shift - (high_shift(bits) if lane >= 4 else 0) for lane, (_, shift) in enumerate(windows(bits))]
    return np.exp2(-np.array(shifts, np.float32)).astype(np.float32)
