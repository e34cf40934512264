"""Products of bytes: which weights are multiplied as int8, and the shape that their activations take.

On x86 with AVX-512 VNNI and VBMI the processor multiplies bytes. Codes are bytes already. Activations become
fixed-point numbers of 24 bits with one power of two (the step) for each group of weights, written as three signed bytes
each. A group's product is then exact, in three instructions for 64 weights where float32 takes twelve; only the groups'
results are rounded. The result is as precise as in float32 and comes twice as fast.

`codegen.int8_products` generates the code.
"""

import functools

from llvmlite import binding
from numba import config

from .formats import AFFINE, FORMAT_BITS

REGISTER_BYTES = 64
ACTIVATION_BYTES = 3  # signed bytes of one activation, the most significant first
_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi")


@functools.cache
def available() -> bool:
    """Whether this processor has the instructions, and numba was not told to compile for another."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in _NEEDED)


def planes(format: str) -> int:
    """How many registers of codes one register of packed weights makes: code i lies in plane i % planes."""
    bits = FORMAT_BITS[format]
    return 8 // bits if 8 % bits == 0 else 1


def multiplies(format: str, columns: int) -> bool:
    """Whether rows of `columns` weights of this format are multiplied as int8."""
    known = format in AFFINE or format == "mxfp4"
    return known and available() and columns % (REGISTER_BYTES * planes(format)) == 0
