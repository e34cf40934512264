"""LLVM vector code that reads packed weights eight at a time, for every format.

Mask, convert and multiply-add for eight weights keep up with memory on one core. The code is written as LLVM vectors
rather than loops: that compiles in a tenth of the time and does not depend on what the vectoriser recognises.
"""

from collections.abc import Iterable

from llvmlite import ir

from ..formats import FORMAT_BITS, LANES, high_shift, windows

PREFETCH_BYTES = 8192  # how far ahead weights are asked for; the hardware alone keeps too few lines in flight

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F16 = ir.FloatType(), ir.HalfType()
VI32, VF32 = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
CONTRACT = ("contract",)  # multiply and add may become one instruction


# ---- constants and loads


def vector_of(type_: ir.Type, values: Iterable[float]) -> ir.Constant:
    """A constant vector."""
    numbers = [ir.Constant(type_, v) for v in values]
    return ir.Constant(ir.VectorType(type_, len(numbers)), numbers)


def load(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type, offset: int = 0) -> ir.Value:
    """The value at `address + offset` bytes, of any alignment."""
    if offset:
        address = builder.add(address, I64(offset))
    pointer = builder.inttoptr(address, type_.as_pointer())
    return builder.load(pointer, align=1)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    """Writes `value` to `address + offset` bytes, of any alignment."""
    if offset:
        address = builder.add(address, I64(offset))
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Asks for the cache line at `address` into the second-level cache; the address need not be mapped.

    The first-level cache has room for fewer lines on their way.
    """
    pointer = builder.inttoptr(address, I8.as_pointer())
    type_ = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], type_)
    builder.call(function, [pointer, I32(0), I32(2), I32(1)])


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """`scalar` in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), vector_of(I32, [0] * lanes))


def load_scalar(builder: ir.IRBuilder, address: ir.Value, kind: str) -> ir.Value:
    """The scale or bias at `address` as float32; `kind` is one of SCALE_BYTES."""
    if kind == "f32":
        return load(builder, address, F32)
    if kind == "f16":
        return builder.fpext(load(builder, address, F16), F32)
    if kind == "bf16":
        return builder.bitcast(builder.shl(builder.zext(load(builder, address, I16), I32), I32(16)), F32)
    # E8M0 is an exponent alone. Code 0 is 2^-127, a subnormal of float32.
    code = builder.zext(load(builder, address, I8), I32)
    subnormal = builder.icmp_unsigned("==", code, I32(0))
    return builder.bitcast(builder.select(subnormal, I32(0x400000), builder.shl(code, I32(23))), F32)


# ---- eight weights as floats


def load_codes(builder: ir.IRBuilder, format: str, address: ir.Value, last: bool) -> ir.Value:
    """Eight weights from `address` as <8 x float>, each multiplied by 1 / lane_scales.

    Where `last` is true, no byte beyond the unit is read: 2 and 3 bits then load from further back.
    """
    bits = FORMAT_BITS[format]
    if format == "f32":
        return load(builder, address, VF32)
    if format == "f16":
        return builder.fpext(load(builder, address, ir.VectorType(F16, LANES)), VF32)
    if format == "bf16":
        halves = builder.zext(load(builder, address, ir.VectorType(I16, LANES)), VI32)
        return builder.bitcast(builder.shl(halves, vector_of(I32, [16] * LANES)), VF32)
    if format == "mxfp4":
        return _load_e2m1(builder, address)
    if bits == 8:
        return builder.sitofp(builder.zext(load(builder, address, ir.VectorType(I8, LANES)), VI32), VF32)
    if bits < 4 and last:
        word = builder.lshr(load(builder, address, I32, bits - 4), I32(8 * (4 - bits)))
    else:
        word = load(builder, address, I32)
    words = splat(builder, word)
    if bits > 4:
        high = splat(builder, load(builder, address, I32, bits - 4))
        words = builder.shuffle_vector(words, high, vector_of(I32, [0, 1, 2, 3, 12, 13, 14, 15]))
    shifts = [shift for _, shift in windows(bits)]
    down = high_shift(bits)
    if down:
        words = builder.lshr(words, vector_of(I32, [0] * 4 + [down] * 4))
        shifts = [s - (down if lane >= 4 else 0) for lane, s in enumerate(shifts)]
    masked = builder.and_(words, vector_of(I32, [((1 << bits) - 1) << s for s in shifts]))
    return builder.sitofp(masked, VF32) if down or bits < 4 else builder.uitofp(masked, VF32)


def _load_e2m1(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Eight MXFP4 codes (sign, two bits of exponent, one of mantissa) as floats.

    The three bits are put where float32 keeps its exponent and mantissa, which gives f. The value is f from 1 up, and
    2f - 1 below 1, where e2m1 is subnormal: the smaller of the two in both cases.
    """
    codes = builder.lshr(splat(builder, load(builder, address, I32)), vector_of(I32, range(0, 32, 4)))
    magnitude = builder.and_(builder.shl(codes, vector_of(I32, [22] * LANES)), vector_of(I32, [7 << 22] * LANES))
    f = builder.bitcast(builder.add(magnitude, vector_of(I32, [126 << 23] * LANES)), VF32)
    twice = builder.fsub(builder.fadd(f, f), vector_of(F32, [1.0] * LANES))
    value = builder.select(builder.fcmp_ordered("<", twice, f), twice, f)
    sign = builder.and_(builder.shl(codes, vector_of(I32, [28] * LANES)), vector_of(I32, [1 << 31] * LANES))
    return builder.bitcast(builder.or_(builder.bitcast(value, VI32), sign), VF32)


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of the eight lanes."""
    width = LANES
    while width > 1:
        width //= 2
        index = ir.Constant(ir.VectorType(I32, LANES), [I32((i + width) % LANES) for i in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, index))
    return builder.extract_element(vector, I32(0))


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c."""
    return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)
