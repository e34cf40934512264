"""What a kernel does to rows of packed weights, in LLVM vectors: products, and rows made float32."""

from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from . import digits
from . import formats as f

I64 = types.int64
KERNEL = types.void(I64, I64, I64)


# ---- what numba's own Python cannot say: memory by address, vectors


@intrinsic
def word(typingctx, address, index):
    """The int64 at `address[index]`."""

    def codegen(context, builder, signature, args):
        return f.load(builder, builder.add(args[0], builder.mul(args[1], f.I64(8))), f.I64)

    return I64(I64, I64), codegen


@intrinsic
def put(typingctx, address, value):
    """Writes a float32."""

    def codegen(context, builder, signature, args):
        f.store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(I64, types.float32), codegen


@intrinsic
def call(typingctx, function, parameters, first, last):
    """Calls the kernel at address `function`."""

    def codegen(context, builder, signature, args):
        kernel = f.ir.FunctionType(f.ir.VoidType(), [f.I64] * 3)
        builder.call(builder.inttoptr(args[0], kernel.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(I64, I64, I64, I64), codegen


@intrinsic(prefer_literal=True)
def dots(
    typingctx,
    whole,
    format,
    scale,
    units,
    rows,
    tokens,
    weight,
    w_row,
    scales,
    biases,
    s_row,
    x,
    x_row,
    sums,
    sums_row,
    n,
):
    """`rows` weight rows times `tokens` rows of activations: a tuple of rows * tokens float32, row by row.

    `weight, scales, biases` are addresses of the first row, the next lying `w_row` and `s_row` bytes on; `x` the
    activations times lane_scales with rows `x_row` bytes apart, `sums` their sums over each group; with `whole`, both
    are as `digits.dots` wants them. A row has `n` groups of `units` times 32 weights; unquantised, where `scale` is "",
    it has `n` weights.
    """
    format_, scale_, units_ = format.literal_value, scale.literal_value, units.literal_value
    rows_, tokens_ = rows.literal_value, tokens.literal_value

    def codegen(context, builder, signature, args):
        weight, w_row, scales, biases, s_row, x, x_row, sums, sums_row, n = args[6:]
        weights = _rows(builder, weight, w_row, rows_)
        factors = list(zip(_rows(builder, scales, s_row, rows_), _rows(builder, biases, s_row, rows_)))
        xs, totals = _rows(builder, x, x_row, tokens_), _rows(builder, sums, sums_row, tokens_)
        if whole.literal_value:
            values = digits.dots(builder, format_, scale_, units_, weights, factors, xs, totals, n)
        elif scale_:
            values = _quantised_dots(builder, format_, scale_, units_, weights, factors, xs, totals, n)
        else:
            values = _plain_dots(builder, format_, weights, xs, n)
        return cgutils.pack_array(builder, values)

    result = types.UniTuple(types.float32, rows_ * tokens_)
    return result(whole, format, scale, units, rows, tokens, *[I64] * 10), codegen


def _rows(builder, address, stride, count):
    return [builder.add(address, builder.mul(stride, f.I64(i))) for i in range(count)]


def _quantised_dots(builder, format, scale, units, weights, factors, xs, sums, groups):
    """sum over groups of scale * (codes · x) + bias * (sum of x)."""
    bits, affine, width = f.FORMAT_BITS[format], format in f.AFFINE, f.I64(f.SCALE_KINDS[scale])
    zero = f.vector_of(f.F32, [0.0] * f.LANES)
    pairs = [(row, token) for row in range(len(weights)) for token in range(len(xs))]
    totals = {pair: cgutils.alloca_once_value(builder, zero) for pair in pairs}
    offsets = {pair: cgutils.alloca_once_value(builder, f.F32(0.0)) for pair in pairs}
    with cgutils.for_range(builder, groups) as group:
        codes_at = builder.mul(group.index, f.I64(units * 4 * bits))
        x_at = builder.mul(group.index, f.I64(units * 4 * 32))
        parts = dict.fromkeys(pairs)
        for weight in weights:
            for line in range(0, units * 4 * bits, 64):
                f.prefetch(builder, builder.add(builder.add(weight, codes_at), f.I64(f.AHEAD + line)))
        for k in range(4 * units):
            lanes = [f.load(builder, builder.add(x, x_at), f.VF32, 32 * k) for x in xs]
            for row, weight in enumerate(weights):
                at = builder.add(builder.add(weight, codes_at), f.I64(k * bits))
                codes = f.load_codes(builder, format, at, last=k == 4 * units - 1)
                for token, lane in enumerate(lanes):
                    part = parts[row, token]
                    product = builder.fmul(codes, lane, flags=f.CONTRACT)
                    parts[row, token] = product if part is None else builder.fadd(product, part, flags=f.CONTRACT)
        at = builder.mul(group.index, width)
        group_sums = [
            f.load(builder, builder.add(s, builder.mul(group.index, f.I64(4))), f.F32) for s in sums if affine
        ]
        for row, (scales, biases) in enumerate(factors):
            factor = f.splat(builder, f.load_scalar(builder, builder.add(scales, at), scale))
            bias = f.load_scalar(builder, builder.add(biases, at), scale) if affine else None
            for token in range(len(xs)):
                total, offset = totals[row, token], offsets[row, token]
                builder.store(f.multiply_add(builder, parts[row, token], factor, builder.load(total)), total)
                if affine:
                    builder.store(f.multiply_add(builder, bias, group_sums[token], builder.load(offset)), offset)
    return [builder.fadd(f.sum_lanes(builder, builder.load(totals[p])), builder.load(offsets[p])) for p in pairs]


def _plain_dots(builder, format, weights, xs, n):
    """Rows that are not quantised; their length `n` need not be a multiple of anything."""
    width = f.FORMAT_BITS[format] // 8
    zero = f.vector_of(f.F32, [0.0] * f.LANES)
    pairs = [(row, token) for row in range(len(weights)) for token in range(len(xs))]
    chains = max(1, 4 // len(pairs))
    totals = {pair: [cgutils.alloca_once_value(builder, zero) for _ in range(chains)] for pair in pairs}
    rest = {pair: cgutils.alloca_once_value(builder, f.F32(0.0)) for pair in pairs}
    blocks = builder.udiv(n, f.I64(chains * f.LANES))
    with cgutils.for_range(builder, blocks) as block:
        start = builder.mul(block.index, f.I64(chains * f.LANES))
        for k in range(chains):
            at = builder.add(start, f.I64(k * f.LANES))
            lanes = [f.load(builder, builder.add(x, builder.mul(at, f.I64(4))), f.VF32) for x in xs]
            for row, weight in enumerate(weights):
                at_row = builder.add(weight, builder.mul(at, f.I64(width)))
                values = f.load_codes(builder, format, at_row, last=False)
                for token, lane in enumerate(lanes):
                    total = totals[row, token][k]
                    builder.store(f.multiply_add(builder, values, lane, builder.load(total)), total)
    done = builder.mul(blocks, f.I64(chains * f.LANES))
    with cgutils.for_range(builder, builder.sub(n, done)) as item:
        at = builder.add(done, item.index)
        for row, weight in enumerate(weights):
            value = f.load_scalar(builder, builder.add(weight, builder.mul(at, f.I64(width))), format)
            for token, x in enumerate(xs):
                lane = f.load(builder, builder.add(x, builder.mul(at, f.I64(4))), f.F32)
                total = rest[row, token]
                builder.store(f.multiply_add(builder, value, lane, builder.load(total)), total)
    results = []
    for pair in pairs:
        vectors = [builder.load(total) for total in totals[pair]]
        while len(vectors) > 1:
            vectors = [builder.fadd(a, b) for a, b in zip(vectors[::2], vectors[1::2])]
        results.append(builder.fadd(f.sum_lanes(builder, vectors[0]), builder.load(rest[pair])))
    return results


@intrinsic(prefer_literal=True)
def unpack(typingctx, format, scale, units, weight, scales, biases, lanes, out, n):
    """Writes one row as float32 to `out`. `lanes` is the address of lane_scales; the rest as in `dots`."""
    format_, scale_, units_ = format.literal_value, scale.literal_value, units.literal_value
    bits, affine = f.FORMAT_BITS[format_], format_ in f.AFFINE

    def quantised(builder, weight, scales, biases, lanes, out, n):
        width = f.I64(f.SCALE_KINDS[scale_])
        exact = f.load(builder, lanes, f.VF32)
        with cgutils.for_range(builder, n) as group:
            at = builder.mul(group.index, width)
            factors = f.splat(builder, f.load_scalar(builder, builder.add(scales, at), scale_))
            factors = builder.fmul(factors, exact)
            if affine:
                bias = f.splat(builder, f.load_scalar(builder, builder.add(biases, at), scale_))
            codes_at = builder.add(weight, builder.mul(group.index, f.I64(units_ * 4 * bits)))
            out_at = builder.add(out, builder.mul(group.index, f.I64(units_ * 4 * 32)))
            for k in range(4 * units_):
                at = builder.add(codes_at, f.I64(k * bits))
                codes = f.load_codes(builder, format_, at, last=k == 4 * units_ - 1)
                value = f.multiply_add(builder, codes, factors, bias) if affine else builder.fmul(codes, factors)
                f.store(builder, value, out_at, 32 * k)

    def plain(builder, weight, out, n):
        with cgutils.for_range(builder, n) as item:
            at = builder.add(weight, builder.mul(item.index, f.I64(bits // 8)))
            value = f.load_scalar(builder, at, format_)
            f.store(builder, value, builder.add(out, builder.mul(item.index, f.I64(4))))

    def codegen(context, builder, signature, args):
        weight, scales, biases, lanes, out, n = args[3:]
        if scale_:
            quantised(builder, weight, scales, biases, lanes, out, n)
        else:
            plain(builder, weight, out, n)
        return context.get_dummy_value()

    return types.void(format, scale, units, *[I64] * 6), codegen


@intrinsic(prefer_literal=True)
def split(typingctx, planes, units, x, digits_at, sums, n):
    """Writes one row of activations, float32, as `digits.dots` wants it; `x`, `digits_at` and `sums` are addresses."""

    def codegen(context, builder, signature, args):
        digits.split(builder, planes.literal_value, units.literal_value, *args[2:])
        return context.get_dummy_value()

    return types.void(planes, units, *[I64] * 4), codegen
