"""Products in whole numbers, where the processor multiplies bytes: x86 with AVX-512 VNNI and VBMI.

Codes are bytes already. Activations become fixed-point numbers of 24 bits, one power of two (`step`) for each group of
weights, written as three signed digits of a byte each. A group's product is then exact, in three instructions for 64
weights where float32 takes twelve, and only the groups' results are rounded: as true as float32, and twice as fast.
"""

import functools

from llvmlite import binding, ir
from numba import config
from numba.core import cgutils

from . import formats as f

LANES = 16  # of 32 bits
BYTES = 64  # a register
DIGITS = 3
BLOCK = LANES  # groups whose factors are made together
AHEAD = 12288  # bytes: how far ahead weights are asked for
FACTORS_AHEAD = 1024  # and their scales and biases, whose rows are a sixteenth as long at 4 bits

I8X64, I32X16, F32X16 = (ir.VectorType(type_, n) for type_, n in ((f.I8, BYTES), (f.I32, LANES), (f.F32, LANES)))
ZERO = f.vector_of(f.F32, [0.0] * LANES)
# E2M1's values in halves, plus 12 so that none is negative.
E2M1 = [12 + sign * v for sign in (1, -1) for v in (0, 1, 2, 3, 4, 6, 8, 12)]


@functools.cache
def available() -> bool:
    """Whether this processor has the instructions, and numba was not told to compile for another."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi"))


def planes(format: str) -> int:
    """How many registers of codes one register of packed weights makes: code i lies in plane i % planes."""
    bits = f.FORMAT_BITS[format]
    return 8 // bits if 8 % bits == 0 else 1


def take(format: str, columns: int) -> bool:
    """Whether rows of `columns` weights of this format are multiplied in this way."""
    known = format in f.AFFINE or format == "mxfp4"
    return known and available() and columns % (BYTES * planes(format)) == 0


def _intrinsic(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    type_ = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, type_, name)
    return builder.call(function, arguments)


def _add_products(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, digits: ir.Value) -> ir.Value:
    """total (16 int32) + the sums of four neighbouring products of unsigned codes with signed digits."""
    words = [builder.bitcast(v, I32X16) for v in (codes, digits)]
    return _intrinsic(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, [total, *words])


def load_codes(builder: ir.IRBuilder, format: str, address: ir.Value) -> list[ir.Value]:
    """`planes` times 64 codes as bytes; reads no byte beyond them."""
    bits = f.FORMAT_BITS[format]
    if 8 % bits == 0:
        raw = f.load(builder, address, I8X64)
        # There is no shift of bytes; what a wider one brings in from the neighbour is masked away.
        words = builder.bitcast(raw, I32X16)
        shifted = [builder.lshr(words, f.vector_of(f.I32, [bits * p] * LANES)) for p in range(8 // bits)]
        spread = [raw, *(builder.bitcast(v, I8X64) for v in shifted[1:])]
    else:
        raw = _load_bytes(builder, address, 8 * bits)
        # Eight codes to a 64-bit word, then every byte takes the eight bits that its code begins.
        wide = _shuffle(builder, raw, [k * bits + min(j, bits - 1) for k in range(8) for j in range(8)])
        shifts = f.vector_of(f.I8, [bits * j for j in range(8)] * 8)
        spread = [_intrinsic(builder, "llvm.x86.avx512.pmultishift.qb.512", I8X64, [shifts, wide])]
    codes = [builder.and_(v, f.vector_of(f.I8, [(1 << bits) - 1] * BYTES)) if bits < 8 else v for v in spread]
    if format != "mxfp4":
        return codes
    table = f.vector_of(f.I8, E2M1 * 4)
    return [_intrinsic(builder, "llvm.x86.avx512.pshuf.b.512", I8X64, [table, v]) for v in codes]


def _load_bytes(builder: ir.IRBuilder, address: ir.Value, count: int) -> ir.Value:
    """`count` bytes, by loads of powers of two."""
    first = 1 << (count.bit_length() - 1)
    raw = f.load(builder, address, ir.VectorType(f.I8, first))
    if first == count:
        return raw
    rest = f.load(builder, address, ir.VectorType(f.I8, count - first), first)
    rest = _shuffle(builder, rest, [i % (count - first) for i in range(first)])
    return _shuffle(builder, raw, list(range(count)), rest)


def _shuffle(builder: ir.IRBuilder, a: ir.Value, index: list[int], b: ir.Value | None = None) -> ir.Value:
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, other, f.vector_of(f.I32, index))


def dots(builder, format, scale, units, weights, factors, xs, sums, groups):
    """As `arithmetic.dots`: every row of `weights` with every one of `xs`, a list of float32.

    A row of x is what `split` makes of it; a row of sums is `groups` sums and then as many steps, float32.
    """
    affine = format in f.AFFINE
    state = _State(builder, [(row, token) for row in range(len(weights)) for token in range(len(xs))])
    steps = [builder.add(s, builder.mul(groups, f.I64(4))) for s in sums]
    blocks = builder.udiv(builder.add(groups, f.I64(BLOCK - 1)), f.I64(BLOCK))
    with cgutils.for_range(builder, blocks) as block:
        first = builder.mul(block.index, f.I64(BLOCK))
        left = builder.sub(groups, first)
        _ask_for_factors(builder, scale, affine, factors, first)
        whole = builder.icmp_unsigned(">=", left, f.I64(BLOCK))
        count = builder.select(whole, f.I64(BLOCK), left)
        with builder.if_else(whole) as (then, otherwise):
            with then:
                _prepare(builder, scale, affine, state, factors, sums, steps, first, None)
            with otherwise, cgutils.for_range(builder, count) as group:
                _prepare(builder, scale, affine, state, factors, sums, steps, first, group.index)
        _multiply(builder, format, units, state, weights, xs, first, count)
    return state.results()


class _State:
    """What the loop over a row's groups keeps for each (row, token)."""

    def __init__(self, builder, pairs):
        self.builder = builder
        self.factors, self.totals, self.offsets = (
            {pair: cgutils.alloca_once_value(builder, ZERO) for pair in pairs} for _ in range(3)
        )
        self.rest = {pair: cgutils.alloca_once_value(builder, f.F32(0.0)) for pair in pairs}  # offsets, one by one

    def factor_at(self, pair, index):
        """The address of one of a block's factors."""
        address = self.builder.ptrtoint(self.factors[pair], f.I64)
        return self.builder.add(address, self.builder.mul(index, f.I64(4)))

    def add_product(self, place, a, b):
        self.builder.store(f.multiply_add(self.builder, a, b, self.builder.load(place)), place)

    def results(self):
        builder, results = self.builder, []
        for pair, total in self.totals.items():
            both = builder.fadd(builder.load(total), builder.load(self.offsets[pair]))
            results.append(builder.fadd(_sum(builder, both), builder.load(self.rest[pair])))
        return results


def _ask_for_factors(builder, scale, affine, factors, first):
    """A block's share of the scales and biases to come, which like the weights lie one row behind the other."""
    width = f.I64(f.SCALE_KINDS[scale] * len(factors))
    at = builder.mul(first, width)
    for address in factors[0] if affine else factors[0][:1]:
        ahead = builder.add(builder.add(address, at), f.I64(FACTORS_AHEAD))
        for line in range(0, BLOCK * width.constant, 64):
            f.prefetch(builder, builder.add(ahead, f.I64(line)))


def _prepare(builder, scale, affine, state, factors, sums, steps, first, index):
    """Factors (scale * step) and offsets (bias * sum): of a whole block, or of one group where the row ends."""
    load, number = (_load_scalars, _splat_constant) if index is None else (f.load_scalar, f.F32)
    offsets = state.offsets if index is None else state.rest
    index = f.I64(0) if index is None else index
    group = builder.add(first, index)
    at, at_float = builder.mul(group, f.I64(f.SCALE_KINDS[scale])), builder.mul(group, f.I64(4))
    for row, (scales, biases) in enumerate(factors):
        factor = load(builder, builder.add(scales, at), scale)
        if affine:
            bias = load(builder, builder.add(biases, at), scale)
        else:  # the codes are halves and 12 too large
            bias, factor = builder.fmul(factor, number(-6.0)), builder.fmul(factor, number(0.5))
        for token, (sum_, step) in enumerate(zip(sums, steps)):
            product = builder.fmul(factor, load(builder, builder.add(step, at_float), "f32"))
            f.store(builder, product, state.factor_at((row, token), index))
            state.add_product(offsets[row, token], bias, load(builder, builder.add(sum_, at_float), "f32"))


def _splat_constant(value):
    return f.vector_of(f.F32, [value] * LANES)


def _load_scalars(builder, address, kind):
    """As `formats.load_scalar`, sixteen of them."""
    if kind == "f32":
        return f.load(builder, address, F32X16)
    if kind == "f16":
        return builder.fpext(f.load(builder, address, ir.VectorType(f.F16, LANES)), F32X16)
    if kind == "bf16":
        halves = builder.zext(f.load(builder, address, ir.VectorType(f.I16, LANES)), I32X16)
        return builder.bitcast(builder.shl(halves, f.vector_of(f.I32, [16] * LANES)), F32X16)
    codes = builder.zext(f.load(builder, address, ir.VectorType(f.I8, LANES)), I32X16)
    subnormal = builder.icmp_unsigned("==", codes, f.vector_of(f.I32, [0] * LANES))
    normal = builder.shl(codes, f.vector_of(f.I32, [23] * LANES))
    return builder.bitcast(builder.select(subnormal, f.vector_of(f.I32, [0x400000] * LANES), normal), F32X16)


def _multiply(builder, format, units, state, weights, xs, first, count):
    """totals += factor * (codes · digits) for the `count` groups from `first` on."""
    bits, planes_ = f.FORMAT_BITS[format], planes(format)
    register, group = BYTES * planes_, 32 * units  # weights
    together, parts = max(1, register // group), max(1, group // register)
    nbytes = register * bits // 8
    with cgutils.for_range(builder, builder.udiv(count, f.I64(together))) as turn:
        index = builder.mul(turn.index, f.I64(together))
        start = builder.udiv(builder.mul(builder.add(first, index), f.I64(group)), f.I64(register))
        codes_at, x_at = builder.mul(start, f.I64(nbytes)), builder.mul(start, f.I64(DIGITS * register))
        # Rows lie one behind the other, so the lines to come are those behind, in their order.
        ahead = builder.add(weights[0], builder.mul(codes_at, f.I64(len(weights))))
        for line in range(0, len(weights) * parts * nbytes, 64):
            f.prefetch(builder, builder.add(ahead, f.I64(AHEAD + line)))
        for part in range(parts):
            digits = [
                [f.load(builder, builder.add(x, x_at), I8X64, part * DIGITS * register + i * BYTES) for i in range(n)]
                for x, n in ((x, DIGITS * planes_) for x in xs)
            ]
            for row, weight in enumerate(weights):
                codes = load_codes(builder, format, builder.add(builder.add(weight, codes_at), f.I64(part * nbytes)))
                for token, number in enumerate(digits):
                    factor = _factor(builder, state.factor_at((row, token), index), together)
                    state.add_product(state.totals[row, token], _product(builder, codes, number, bits), factor)


def _factor(builder, address, together):
    """The factors of as many groups as share a register, lane by lane."""
    if together == 1:
        return f.splat(builder, f.load(builder, address, f.F32), LANES)
    factors = f.load(builder, address, ir.VectorType(f.F32, together))
    return _shuffle(builder, factors, [lane * together // LANES for lane in range(LANES)])


def _product(builder, codes, digits, bits):
    """codes · activations of a register of weights as 16 partial sums, float32; exact before they are rounded to that.

    `digits` are the planes of the most significant digit, of the next and of the last.
    """
    most = 4 * len(codes) * ((1 << bits) - 1) << 23  # that a lane can come to
    total = f.vector_of(f.I32, [0] * LANES)
    number = None
    for d in range(DIGITS):
        if d == DIGITS - 1 and most >= 2**31:  # the last digit apart
            number = builder.sitofp(total, F32X16)
            total = f.vector_of(f.I32, [0] * LANES)
        elif d:
            total = builder.shl(total, f.vector_of(f.I32, [8] * LANES))
        for plane, code in enumerate(codes):
            total = _add_products(builder, total, code, digits[d * len(codes) + plane])
    last = builder.sitofp(total, F32X16)
    return last if number is None else f.multiply_add(builder, number, _splat_constant(256.0), last)


def _sum(builder, vector):
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    type_ = ir.FunctionType(f.F32, [f.F32, F32X16])
    function = builder.module.globals.get(name) or ir.Function(builder.module, type_, name)
    return builder.call(function, [f.F32(0.0), vector], fastmath=("reassoc",))


def split(builder, planes_, units, x, digits, sums, groups):
    """One row of float32, `groups` times `units` times 32 of them, becomes a row of digits and one of sums and steps.

    For every register of weights, 64 bytes a plane: the planes of the most significant digit, of the next, of the last.
    """
    steps = builder.add(sums, builder.mul(groups, f.I64(4)))
    vectors = 2 * units
    with cgutils.for_range(builder, groups) as group:
        x_at = builder.add(x, builder.mul(group.index, f.I64(vectors * 64)))
        parts = [f.load(builder, x_at, F32X16, 64 * i) for i in range(vectors)]
        total, largest = parts[0], _abs(builder, parts[0])
        for part in parts[1:]:
            total = builder.fadd(total, part)
            magnitude = _abs(builder, part)
            largest = builder.select(builder.fcmp_ordered(">", magnitude, largest), magnitude, largest)
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        largest = _intrinsic(builder, name, f.F32, [largest])
        # The first digit reaches 127, not 128: room for that, and then the power of two above. The least step is
        # float32's least normal number, 2^-126.
        bits = builder.bitcast(builder.fmul(largest, f.F32(128.5 / 127)), f.I32)
        exponent = builder.sub(builder.lshr(bits, f.I32(23)), f.I32(22))
        small = builder.icmp_signed("<", exponent, f.I32(1))
        exponent = builder.select(small, f.I32(1), exponent)
        step = builder.bitcast(builder.shl(exponent, f.I32(23)), f.F32)
        inverse = builder.shl(builder.sub(f.I32(254), exponent), f.I32(23))
        inverse = f.splat(builder, builder.bitcast(inverse, f.F32), LANES)
        at = builder.mul(group.index, f.I64(4))
        f.store(builder, _sum(builder, total), builder.add(sums, at))
        f.store(builder, step, builder.add(steps, at))
        for i, part in enumerate(parts):
            whole = _intrinsic(builder, f"llvm.rint.v{LANES}f32", F32X16, [builder.fmul(part, inverse)])
            number = builder.fptosi(whole, I32X16)
            place = builder.add(builder.mul(group.index, f.I64(32 * units)), f.I64(LANES * i))
            register = f.I64(BYTES * planes_)
            within = builder.udiv(builder.urem(place, register), f.I64(planes_))
            start = builder.mul(builder.udiv(place, register), f.I64(BYTES * planes_ * DIGITS))
            out = builder.add(builder.add(digits, start), within)
            for d in reversed(range(DIGITS)):
                digit = builder.trunc(number, ir.VectorType(f.I8, LANES))
                for plane in range(planes_):
                    mine = _shuffle(builder, digit, list(range(plane, LANES, planes_)))
                    f.store(builder, mine, out, (d * planes_ + plane) * BYTES)
                # Signed digits: what the byte holds as a signed number is taken away before the next.
                number = builder.sub(number, builder.sext(digit, I32X16))
                number = builder.ashr(number, f.vector_of(f.I32, [8] * LANES))


def _abs(builder, vector):
    return _intrinsic(builder, f"llvm.fabs.v{LANES}f32", F32X16, [vector])
