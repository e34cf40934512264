"""Quantisation kernels for the CPU: bit for bit what `mx.quantize` gives for the bfloat16-rounded weights.

Compiled by numba on first use and kept in its cache. They release the interpreter lock: threads run them side by side.
"""

import numpy as np
from numba import njit

_ROUNDER = np.float32(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds to the nearest integer, ties to even


@njit(nogil=True, cache=True)
def dequantize_fp8(codes, table, scales, row_map, block, out):
    """out (R, C) float32 = table[codes (R, C) uint8] · scales[row_map[r], c // block]."""
    rows, columns = codes.shape
    for r in range(rows):
        for begin in range(0, columns, block):
            scale = scales[row_map[r], begin // block]
            for c in range(begin, min(begin + block, columns)):
                out[r, c] = table[codes[r, c]] * scale


@njit(nogil=True, cache=True)
def mark_full_scale(codes, row_map, block, found):
    """Sets found (scale rows, scale columns) where the cell owns a code of ±448. Returns how many codes are NaN."""
    rows, columns = codes.shape
    nans = 0
    for r in range(rows):
        for begin in range(0, columns, block):
            full = 0
            for c in range(begin, min(begin + block, columns)):
                magnitude = codes[r, c] & 0x7F
                full += magnitude == 0x7E
                nans += magnitude == 0x7F
            if full:
                found[row_map[r], begin // block] = True
    return nans


@njit(nogil=True, cache=True)
def _round_bfloat16(bits):
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@njit(nogil=True, cache=True)
def round_bfloat16(bits, out):
    """out (N,) uint16: the nearest bfloat16 of N float32 given as uint32, ties to even."""
    for i in range(bits.size):
        out[i] = _round_bfloat16(bits[i]) >> np.uint32(16)


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _extremes(values):
    """(smallest, largest). The flags allow vector minima: NaN was refused before, and a zero's sign does not matter."""
    low = high = values[0]
    for value in values:
        low = min(low, value)
        high = max(high, value)
    return low, high


@njit(nogil=True, cache=True)
def _pack(codes, bits, out):
    """Writes `bits` bits of every code into `out`, the least significant first, as one stream of bytes."""
    if bits == 8:
        out[:] = codes
    elif bits == 4:
        for i in range(out.size):
            out[i] = codes[2 * i] | codes[2 * i + 1] << 4
    elif bits == 2:
        for i in range(out.size):
            out[i] = codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6
    else:
        for begin in range(0, codes.size // 8):
            word = np.uint64(0)
            for i in range(8):
                word |= np.uint64(codes[8 * begin + i]) << np.uint64(bits * i)
            for i in range(bits):
                out[begin * bits + i] = (word >> np.uint64(8 * i)) & np.uint64(255)


@njit(nogil=True, cache=True)
def quantize_affine(bits_in, group, bits, packed, scales, biases):
    """Quantises weights (R, C) float32, given as uint32, into `packed` (R, C·bits/8) uint8 and, as bfloat16 bits,
    `scales` and `biases` (R, C/group) uint16.

    Returns the sums of squared error and of squared weights, both against the float32 weights.
    """
    rows, columns = bits_in.shape
    top = np.float32((1 << bits) - 1)
    rounded_bits = np.empty(group, np.uint32)
    rounded = rounded_bits.view(np.float32)
    codes = np.empty(group, np.uint8)
    pair_bits = np.empty(2, np.uint32)
    pair = pair_bits.view(np.float32)
    group_bytes = group * bits // 8
    error = weight = 0.0
    exact = bits_in.view(np.float32)
    for r in range(rows):
        for g in range(columns // group):
            begin = g * group
            for i in range(group):
                rounded_bits[i] = _round_bfloat16(bits_in[r, begin + i])
            low, high = _extremes(rounded)
            negative = abs(low) > abs(high)
            scale = max((high - low) / top, np.float32(1e-7))
            edge = low if negative else high
            if not negative:
                scale = -scale
            steps = np.rint(edge / scale)
            bias = np.float32(0)
            if steps != 0:
                scale = edge / steps
                bias = edge
            for i in range(group):
                value = (rounded[i] - bias) / scale + _ROUNDER - _ROUNDER
                codes[i] = np.uint8(min(max(value, np.float32(0)), top))
            _pack(codes, bits, packed[r, g * group_bytes : (g + 1) * group_bytes])
            pair[0] = scale
            pair[1] = bias
            pair_bits[0] = _round_bfloat16(pair_bits[0])
            pair_bits[1] = _round_bfloat16(pair_bits[1])
            scales[r, g] = pair_bits[0] >> np.uint32(16)
            biases[r, g] = pair_bits[1] >> np.uint32(16)
            group_error = np.float32(0)
            group_weight = np.float32(0)
            for i in range(group):
                original = exact[r, begin + i]
                difference = np.float32(codes[i]) * pair[0] + pair[1] - original
                group_error += difference * difference
                group_weight += original * original
            error += group_error
            weight += group_weight
    return error, weight


@njit(nogil=True, cache=True)
def quantize_mxfp4(bits_in, packed, scales):
    """Quantises weights (R, C) float32, given as uint32, into E2M1 `packed` (R, C/2) uint8 and E8M0 `scales` (R, C/32)
    uint8.

    Returns the sums of squared error and of squared weights, both against the float32 weights.
    """
    rows, columns = bits_in.shape
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    rounded_bits = np.empty(32, np.uint32)
    rounded = rounded_bits.view(np.float32)
    codes = np.empty(32, np.uint8)
    one_bits = np.empty(1, np.uint32)
    one = one_bits.view(np.float32)
    exact = bits_in.view(np.float32)
    error = weight = 0.0
    for r in range(rows):
        for g in range(columns // 32):
            begin = 32 * g
            for i in range(32):
                rounded_bits[i] = _round_bfloat16(bits_in[r, begin + i])
            low, high = _extremes(rounded)
            one[0] = max(abs(low), abs(high)) / np.float32(6)
            # The smallest power of two that is not below it, so that the largest magnitude is never clipped.
            exponent = min(int((one_bits[0] + np.uint32(0x7FFFFF)) >> np.uint32(23)), 254) - 127
            if one[0] == 0:
                exponent = 0
            scales[r, g] = exponent + 127
            scale = np.float32(2.0**exponent)
            group_error = np.float32(0)
            group_weight = np.float32(0)
            for i in range(32):
                magnitude = abs(rounded[i]) / scale
                # As MLX does on the CPU, a tie goes to the smaller magnitude and zero has no sign.
                code = np.uint8(magnitude > 0.25) + np.uint8(magnitude > 0.75) + np.uint8(magnitude > 1.25)
                code += np.uint8(magnitude > 1.75) + np.uint8(magnitude > 2.5) + np.uint8(magnitude > 3.5)
                code += np.uint8(magnitude > 5)
                sign = rounded_bits[i] >> np.uint32(31)
                codes[i] = code | sign << 3 if code else 0
                value = values[code] * scale
                original = exact[r, begin + i]
                difference = (-value if sign else value) - original
                group_error += difference * difference
                group_weight += original * original
            _pack(codes, 4, packed[r, 16 * g : 16 * g + 16])
            error += group_error
            weight += group_weight
    return error, weight
