"""LLVM code of int8 products: products of bytes, and activations split into signed bytes.

`cpu.int8_products` says what they are and when they are used.
"""

from llvmlite import ir
from numba.core import cgutils

from ..formats import AFFINE, FORMAT_BITS, SCALE_BYTES
from ..int8_products import ACTIVATION_BYTES, REGISTER_BYTES, planes
from . import vectors as vec

LANES = 16  # of 32 bits
BLOCK = LANES  # groups whose factors are made together
PREFETCH_BYTES = 12288  # how far ahead weights are asked for
PREFETCH_FACTOR_BYTES = 1024  # and their scales and biases, whose rows are a sixteenth as long at 4 bits

I8X64 = ir.VectorType(vec.I8, REGISTER_BYTES)
I32X16 = ir.VectorType(vec.I32, LANES)
F32X16 = ir.VectorType(vec.F32, LANES)
ZERO = vec.vector_of(vec.F32, [0.0] * LANES)
# The values of E2M1 in halves, plus 12 so that none is negative.
E2M1 = [12 + sign * value for sign in (1, -1) for value in (0, 1, 2, 3, 4, 6, 8, 12)]
Pair = tuple[int, int]  # (row of weights, token)


def _intrinsic(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    type_ = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, type_, name)
    return builder.call(function, arguments)


def _add_byte_products(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, signed: ir.Value) -> ir.Value:
    """total (16 int32) + the sums of four neighbouring products of unsigned codes with signed bytes."""
    words = [builder.bitcast(v, I32X16) for v in (codes, signed)]
    return _intrinsic(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, [total, *words])


def load_code_bytes(builder: ir.IRBuilder, format: str, address: ir.Value) -> list[ir.Value]:
    """The codes of one register of packed weights: 64 bytes for each plane. Reads no byte beyond them."""
    bits = FORMAT_BITS[format]
    if 8 % bits == 0:
        raw = vec.load(builder, address, I8X64)
        # AVX-512 has no shift of bytes; the bits that a wider shift brings in from the neighbour are masked away below.
        words = builder.bitcast(raw, I32X16)
        shifted = [builder.lshr(words, vec.vector_of(vec.I32, [bits * p] * LANES)) for p in range(8 // bits)]
        spread = [raw, *(builder.bitcast(v, I8X64) for v in shifted[1:])]
    else:
        raw = _load_bytes(builder, address, 8 * bits)
        # Eight codes go into a 64-bit word; then every byte takes eight bits, beginning with its code's.
        wide = _shuffle(builder, raw, [k * bits + min(j, bits - 1) for k in range(8) for j in range(8)])
        shifts = vec.vector_of(vec.I8, [bits * j for j in range(8)] * 8)
        spread = [_intrinsic(builder, "llvm.x86.avx512.pmultishift.qb.512", I8X64, [shifts, wide])]
    mask = vec.vector_of(vec.I8, [(1 << bits) - 1] * REGISTER_BYTES)
    codes = [builder.and_(v, mask) if bits < 8 else v for v in spread]
    if format != "mxfp4":
        return codes
    table = vec.vector_of(vec.I8, E2M1 * 4)
    return [_intrinsic(builder, "llvm.x86.avx512.pshuf.b.512", I8X64, [table, v]) for v in codes]


def _load_bytes(builder: ir.IRBuilder, address: ir.Value, count: int) -> ir.Value:
    """`count` bytes from `address`, by loads whose sizes are powers of two."""
    first = 1 << (count.bit_length() - 1)
    raw = vec.load(builder, address, ir.VectorType(vec.I8, first))
    if first == count:
        return raw
    rest = vec.load(builder, address, ir.VectorType(vec.I8, count - first), first)
    rest = _shuffle(builder, rest, [i % (count - first) for i in range(first)])
    return _shuffle(builder, raw, list(range(count)), rest)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, index: list[int], b: ir.Value | None = None) -> ir.Value:
    """The elements `index` of a, or of a and b side by side."""
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, other, vec.vector_of(vec.I32, index))


def int8_dots(
    builder: ir.IRBuilder,
    format: str,
    scale: str,
    units: int,
    weights: list[ir.Value],
    factors: list[tuple[ir.Value, ir.Value]],
    xs: list[ir.Value],
    sums: list[ir.Value],
    groups: ir.Value,
) -> list[ir.Value]:
    """The products of every row of `weights` with every row of `xs`, row by row, float32; see `intrinsics.dots`.

    A row of xs and a row of sums are what `split_row` writes; sums are `groups` sums and then as many steps, float32.
    """
    affine = format in AFFINE
    state = _State(builder, [(row, token) for row in range(len(weights)) for token in range(len(xs))])
    steps = [builder.add(s, builder.mul(groups, vec.I64(4))) for s in sums]
    blocks = builder.udiv(builder.add(groups, vec.I64(BLOCK - 1)), vec.I64(BLOCK))
    with cgutils.for_range(builder, blocks) as block:
        first = builder.mul(block.index, vec.I64(BLOCK))
        left = builder.sub(groups, first)
        _prefetch_factors(builder, scale, affine, factors, first)
        full = builder.icmp_unsigned(">=", left, vec.I64(BLOCK))
        count = builder.select(full, vec.I64(BLOCK), left)
        with builder.if_else(full) as (then, otherwise):
            with then:
                _prepare_factors(builder, scale, affine, state, factors, sums, steps, first, None)
            with otherwise, cgutils.for_range(builder, count) as group:
                _prepare_factors(builder, scale, affine, state, factors, sums, steps, first, group.index)
        _multiply_block(builder, format, units, state, weights, xs, first, count)
    return state.results()


class _State:
    """The variables of the loop over a row's groups, for each (row of weights, token)."""

    def __init__(self, builder: ir.IRBuilder, pairs: list[Pair]):
        self.builder = builder
        self.factors, self.totals, self.offsets = (
            {pair: cgutils.alloca_once_value(builder, ZERO) for pair in pairs} for _ in range(3)
        )
        # The offsets of groups beyond the last full block:
        self.rest = {pair: cgutils.alloca_once_value(builder, vec.F32(0.0)) for pair in pairs}

    def factor_at(self, pair: Pair, index: ir.Value) -> ir.Value:
        """The address of the factor of the block's group `index`."""
        address = self.builder.ptrtoint(self.factors[pair], vec.I64)
        return self.builder.add(address, self.builder.mul(index, vec.I64(4)))

    def add_product(self, place: ir.Value, a: ir.Value, b: ir.Value) -> None:
        """Adds a * b to the variable at `place`."""
        self.builder.store(vec.multiply_add(self.builder, a, b, self.builder.load(place)), place)

    def results(self) -> list[ir.Value]:
        """The products, one float32 for each pair."""
        builder, results = self.builder, []
        for pair, total in self.totals.items():
            both = builder.fadd(builder.load(total), builder.load(self.offsets[pair]))
            results.append(builder.fadd(_sum(builder, both), builder.load(self.rest[pair])))
        return results


def _prefetch_factors(
    builder: ir.IRBuilder, scale: str, affine: bool, factors: list[tuple[ir.Value, ir.Value]], first: ir.Value
) -> None:
    """Prefetches a block's share of the scales and biases to come; like the weights, their rows are adjacent."""
    width = vec.I64(SCALE_BYTES[scale] * len(factors))
    at = builder.mul(first, width)
    for address in factors[0] if affine else factors[0][:1]:
        ahead = builder.add(builder.add(address, at), vec.I64(PREFETCH_FACTOR_BYTES))
        for line in range(0, BLOCK * width.constant, 64):
            vec.prefetch(builder, builder.add(ahead, vec.I64(line)))


def _prepare_factors(
    builder: ir.IRBuilder,
    scale: str,
    affine: bool,
    state: _State,
    factors: list[tuple[ir.Value, ir.Value]],
    sums: list[ir.Value],
    steps: list[ir.Value],
    first: ir.Value,
    index: ir.Value | None,
) -> None:
    """Stores factors (scale * step) and adds offsets (bias * sum): of a full block, or of its group `index` alone."""
    load, number = (_load_scalars, _splat_constant) if index is None else (vec.load_scalar, vec.F32)
    offsets = state.offsets if index is None else state.rest
    index = vec.I64(0) if index is None else index
    group = builder.add(first, index)
    at, at_float = builder.mul(group, vec.I64(SCALE_BYTES[scale])), builder.mul(group, vec.I64(4))
    for row, (scales, biases) in enumerate(factors):
        factor = load(builder, builder.add(scales, at), scale)
        if affine:
            bias = load(builder, builder.add(biases, at), scale)
        else:  # the codes are twice the values, plus 12: see E2M1
            bias, factor = builder.fmul(factor, number(-6.0)), builder.fmul(factor, number(0.5))
        for token, (sum_, step) in enumerate(zip(sums, steps)):
            product = builder.fmul(factor, load(builder, builder.add(step, at_float), "f32"))
            vec.store(builder, product, state.factor_at((row, token), index))
            state.add_product(offsets[row, token], bias, load(builder, builder.add(sum_, at_float), "f32"))


def _splat_constant(value: float) -> ir.Constant:
    return vec.vector_of(vec.F32, [value] * LANES)


def _load_scalars(builder: ir.IRBuilder, address: ir.Value, kind: str) -> ir.Value:
    """Sixteen scales or biases as float32; see `vectors.load_scalar`."""
    if kind == "f32":
        return vec.load(builder, address, F32X16)
    if kind == "f16":
        return builder.fpext(vec.load(builder, address, ir.VectorType(vec.F16, LANES)), F32X16)
    if kind == "bf16":
        halves = builder.zext(vec.load(builder, address, ir.VectorType(vec.I16, LANES)), I32X16)
        return builder.bitcast(builder.shl(halves, vec.vector_of(vec.I32, [16] * LANES)), F32X16)
    codes = builder.zext(vec.load(builder, address, ir.VectorType(vec.I8, LANES)), I32X16)
    subnormal = builder.icmp_unsigned("==", codes, vec.vector_of(vec.I32, [0] * LANES))
    normal = builder.shl(codes, vec.vector_of(vec.I32, [23] * LANES))
    return builder.bitcast(builder.select(subnormal, vec.vector_of(vec.I32, [0x400000] * LANES), normal), F32X16)


def _multiply_block(
    builder: ir.IRBuilder,
    format: str,
    units: int,
    state: _State,
    weights: list[ir.Value],
    xs: list[ir.Value],
    first: ir.Value,
    count: ir.Value,
) -> None:
    """totals += factor * (codes · activations) for the `count` groups from `first` on."""
    bits, planes_ = FORMAT_BITS[format], planes(format)
    register, group = REGISTER_BYTES * planes_, 32 * units  # weights
    together, parts = max(1, register // group), max(1, group // register)
    nbytes = register * bits // 8
    with cgutils.for_range(builder, builder.udiv(count, vec.I64(together))) as turn:
        index = builder.mul(turn.index, vec.I64(together))
        start = builder.udiv(builder.mul(builder.add(first, index), vec.I64(group)), vec.I64(register))
        codes_at, x_at = builder.mul(start, vec.I64(nbytes)), builder.mul(start, vec.I64(ACTIVATION_BYTES * register))
        # Rows are adjacent, so the cache lines that come next are those behind these rows, in order.
        ahead = builder.add(weights[0], builder.mul(codes_at, vec.I64(len(weights))))
        for line in range(0, len(weights) * parts * nbytes, 64):
            vec.prefetch(builder, builder.add(ahead, vec.I64(PREFETCH_BYTES + line)))
        for part in range(parts):
            offsets = [
                part * ACTIVATION_BYTES * register + i * REGISTER_BYTES for i in range(ACTIVATION_BYTES * planes_)
            ]
            activations = [[vec.load(builder, builder.add(x, x_at), I8X64, offset) for offset in offsets] for x in xs]
            for row, weight in enumerate(weights):
                at = builder.add(builder.add(weight, codes_at), vec.I64(part * nbytes))
                codes = load_code_bytes(builder, format, at)
                for token, signed_bytes in enumerate(activations):
                    factor = _factor(builder, state.factor_at((row, token), index), together)
                    state.add_product(state.totals[row, token], _product(builder, codes, signed_bytes, bits), factor)


def _factor(builder: ir.IRBuilder, address: ir.Value, together: int) -> ir.Value:
    """The factors of the `together` groups that share a register, lane by lane."""
    if together == 1:
        return vec.splat(builder, vec.load(builder, address, vec.F32), LANES)
    factors = vec.load(builder, address, ir.VectorType(vec.F32, together))
    return _shuffle(builder, factors, [lane * together // LANES for lane in range(LANES)])


def _product(builder: ir.IRBuilder, codes: list[ir.Value], signed_bytes: list[ir.Value], bits: int) -> ir.Value:
    """codes · activations of a register of weights: 16 partial sums, exact in int32 and then rounded to float32.

    `signed_bytes` are the planes of the activations' most significant byte, then of the next, then of the last.
    """
    largest = 4 * len(codes) * ((1 << bits) - 1) << 23  # bound of what a lane can hold
    total = vec.vector_of(vec.I32, [0] * LANES)
    number = None
    for d in range(ACTIVATION_BYTES):
        if d == ACTIVATION_BYTES - 1 and largest >= 2**31:  # the last byte would overflow: summed apart
            number = builder.sitofp(total, F32X16)
            total = vec.vector_of(vec.I32, [0] * LANES)
        elif d:
            total = builder.shl(total, vec.vector_of(vec.I32, [8] * LANES))
        for plane, code in enumerate(codes):
            total = _add_byte_products(builder, total, code, signed_bytes[d * len(codes) + plane])
    last = builder.sitofp(total, F32X16)
    return last if number is None else vec.multiply_add(builder, number, _splat_constant(256.0), last)


def _sum(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of sixteen lanes."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    type_ = ir.FunctionType(vec.F32, [vec.F32, F32X16])
    function = builder.module.globals.get(name) or ir.Function(builder.module, type_, name)
    return builder.call(function, [vec.F32(0.0), vector], fastmath=("reassoc",))


def split_row(
    builder: ir.IRBuilder,
    planes_: int,
    units: int,
    x: ir.Value,
    signed_bytes: ir.Value,
    sums: ir.Value,
    groups: ir.Value,
) -> None:
    """Splits a row of `groups` * `units` * 32 float32 activations; the last four arguments are addresses and a count.

    Writes, for every register of weights, 64 bytes a plane: the planes of the most significant byte, of the next, of
    the last. Writes to `sums` each group's sum, and behind all sums each group's step.
    """
    steps = builder.add(sums, builder.mul(groups, vec.I64(4)))
    vectors = 2 * units
    with cgutils.for_range(builder, groups) as group:
        x_at = builder.add(x, builder.mul(group.index, vec.I64(vectors * 64)))
        parts = [vec.load(builder, x_at, F32X16, 64 * i) for i in range(vectors)]
        total, largest = parts[0], _abs(builder, parts[0])
        for part in parts[1:]:
            total = builder.fadd(total, part)
            magnitude = _abs(builder, part)
            largest = builder.select(builder.fcmp_ordered(">", magnitude, largest), magnitude, largest)
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        largest = _intrinsic(builder, name, vec.F32, [largest])
        # The first byte reaches 127, not 128: the bound allows for that, and the step is the power of two above it.
        # The least step is the least normal number of float32, 2^-126.
        bits = builder.bitcast(builder.fmul(largest, vec.F32(128.5 / 127)), vec.I32)
        exponent = builder.sub(builder.lshr(bits, vec.I32(23)), vec.I32(22))
        small = builder.icmp_signed("<", exponent, vec.I32(1))
        exponent = builder.select(small, vec.I32(1), exponent)
        step = builder.bitcast(builder.shl(exponent, vec.I32(23)), vec.F32)
        inverse = builder.shl(builder.sub(vec.I32(254), exponent), vec.I32(23))
        inverse = vec.splat(builder, builder.bitcast(inverse, vec.F32), LANES)
        at = builder.mul(group.index, vec.I64(4))
        vec.store(builder, _sum(builder, total), builder.add(sums, at))
        vec.store(builder, step, builder.add(steps, at))
        for i, part in enumerate(parts):
            rounded = _intrinsic(builder, f"llvm.rint.v{LANES}f32", F32X16, [builder.fmul(part, inverse)])
            number = builder.fptosi(rounded, I32X16)
            place = builder.add(builder.mul(group.index, vec.I64(32 * units)), vec.I64(LANES * i))
            register = vec.I64(REGISTER_BYTES * planes_)
            within = builder.udiv(builder.urem(place, register), vec.I64(planes_))
            start = builder.mul(builder.udiv(place, register), vec.I64(REGISTER_BYTES * planes_ * ACTIVATION_BYTES))
            out = builder.add(builder.add(signed_bytes, start), within)
            for d in reversed(range(ACTIVATION_BYTES)):
                byte = builder.trunc(number, ir.VectorType(vec.I8, LANES))
                for plane in range(planes_):
                    mine = _shuffle(builder, byte, list(range(plane, LANES, planes_)))
                    vec.store(builder, mine, out, (d * planes_ + plane) * REGISTER_BYTES)
                # The byte is signed: the number that it holds is subtracted before the next byte is taken.
                number = builder.sub(number, builder.sext(byte, I32X16))
                number = builder.ashr(number, vec.vector_of(vec.I32, [8] * LANES))


def _abs(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    return _intrinsic(builder, f"llvm.fabs.v{LANES}f32", F32X16, [vector])
