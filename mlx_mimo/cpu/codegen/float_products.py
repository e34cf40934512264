"""LLVM code in float32: products of rows of weights with rows of activations, and rows of weights dequantised."""

from llvmlite import ir
from numba.core import cgutils

from ..formats import AFFINE, FORMAT_BITS, LANES, SCALE_BYTES
from . import vectors as vec


def quantised_dots(
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
    """The sum over groups of scale * (codes · x) + bias * (sum of x), for every row of `weights` and every x.

    Takes what `int8_products.int8_dots` takes, with xs and sums in float32.
    """
    bits, affine, width = FORMAT_BITS[format], format in AFFINE, vec.I64(SCALE_BYTES[scale])
    zero = vec.vector_of(vec.F32, [0.0] * LANES)
    pairs = [(row, token) for row in range(len(weights)) for token in range(len(xs))]
    totals = {pair: cgutils.alloca_once_value(builder, zero) for pair in pairs}
    offsets = {pair: cgutils.alloca_once_value(builder, vec.F32(0.0)) for pair in pairs}
    with cgutils.for_range(builder, groups) as group:
        codes_at = builder.mul(group.index, vec.I64(units * 4 * bits))
        x_at = builder.mul(group.index, vec.I64(units * 4 * 32))
        parts = dict.fromkeys(pairs)
        for weight in weights:
            for line in range(0, units * 4 * bits, 64):
                vec.prefetch(builder, builder.add(builder.add(weight, codes_at), vec.I64(vec.PREFETCH_BYTES + line)))
        for k in range(4 * units):
            lanes = [vec.load(builder, builder.add(x, x_at), vec.VF32, 32 * k) for x in xs]
            for row, weight in enumerate(weights):
                at = builder.add(builder.add(weight, codes_at), vec.I64(k * bits))
                codes = vec.load_codes(builder, format, at, last=k == 4 * units - 1)
                for token, lane in enumerate(lanes):
                    part = parts[row, token]
                    product = builder.fmul(codes, lane, flags=vec.CONTRACT)
                    parts[row, token] = product if part is None else builder.fadd(product, part, flags=vec.CONTRACT)
        at = builder.mul(group.index, width)
        group_sums = [
            vec.load(builder, builder.add(s, builder.mul(group.index, vec.I64(4))), vec.F32) for s in sums if affine
        ]
        for row, (scales, biases) in enumerate(factors):
            factor = vec.splat(builder, vec.load_scalar(builder, builder.add(scales, at), scale))
            bias = vec.load_scalar(builder, builder.add(biases, at), scale) if affine else None
            for token in range(len(xs)):
                total, offset = totals[row, token], offsets[row, token]
                builder.store(vec.multiply_add(builder, parts[row, token], factor, builder.load(total)), total)
                if affine:
                    builder.store(vec.multiply_add(builder, bias, group_sums[token], builder.load(offset)), offset)
    return [builder.fadd(vec.sum_lanes(builder, builder.load(totals[p])), builder.load(offsets[p])) for p in pairs]


def plain_dots(
    builder: ir.IRBuilder, format: str, weights: list[ir.Value], xs: list[ir.Value], n: ir.Value
) -> list[ir.Value]:
    """The products of rows that are not quantised; their length `n` may be any number."""
    width = FORMAT_BITS[format] // 8
    zero = vec.vector_of(vec.F32, [0.0] * LANES)
    pairs = [(row, token) for row in range(len(weights)) for token in range(len(xs))]
    chains = max(1, 4 // len(pairs))
    totals = {pair: [cgutils.alloca_once_value(builder, zero) for _ in range(chains)] for pair in pairs}
    rest = {pair: cgutils.alloca_once_value(builder, vec.F32(0.0)) for pair in pairs}
    blocks = builder.udiv(n, vec.I64(chains * LANES))
    with cgutils.for_range(builder, blocks) as block:
        start = builder.mul(block.index, vec.I64(chains * LANES))
        for k in range(chains):
            at = builder.add(start, vec.I64(k * LANES))
            lanes = [vec.load(builder, builder.add(x, builder.mul(at, vec.I64(4))), vec.VF32) for x in xs]
            for row, weight in enumerate(weights):
                at_row = builder.add(weight, builder.mul(at, vec.I64(width)))
                values = vec.load_codes(builder, format, at_row, last=False)
                for token, lane in enumerate(lanes):
                    total = totals[row, token][k]
                    builder.store(vec.multiply_add(builder, values, lane, builder.load(total)), total)
    done = builder.mul(blocks, vec.I64(chains * LANES))
    with cgutils.for_range(builder, builder.sub(n, done)) as item:
        at = builder.add(done, item.index)
        for row, weight in enumerate(weights):
            value = vec.load_scalar(builder, builder.add(weight, builder.mul(at, vec.I64(width))), format)
            for token, x in enumerate(xs):
                lane = vec.load(builder, builder.add(x, builder.mul(at, vec.I64(4))), vec.F32)
                total = rest[row, token]
                builder.store(vec.multiply_add(builder, value, lane, builder.load(total)), total)
    results = []
    for pair in pairs:
        vectors = [builder.load(total) for total in totals[pair]]
        while len(vectors) > 1:
            vectors = [builder.fadd(a, b) for a, b in zip(vectors[::2], vectors[1::2])]
        results.append(builder.fadd(vec.sum_lanes(builder, vectors[0]), builder.load(rest[pair])))
    return results


def dequantise_row(
    builder: ir.IRBuilder,
    format: str,
    scale: str,
    units: int,
    weight: ir.Value,
    scales: ir.Value,
    biases: ir.Value,
    lane_scales: ir.Value,
    out: ir.Value,
    groups: ir.Value,
) -> None:
    """Writes a quantised row of `groups` groups as float32; all but the count are addresses."""
    bits, affine, width = FORMAT_BITS[format], format in AFFINE, vec.I64(SCALE_BYTES[scale])
    exact = vec.load(builder, lane_scales, vec.VF32)
    with cgutils.for_range(builder, groups) as group:
        at = builder.mul(group.index, width)
        factors = vec.splat(builder, vec.load_scalar(builder, builder.add(scales, at), scale))
        factors = builder.fmul(factors, exact)
        if affine:
            bias = vec.splat(builder, vec.load_scalar(builder, builder.add(biases, at), scale))
        codes_at = builder.add(weight, builder.mul(group.index, vec.I64(units * 4 * bits)))
        out_at = builder.add(out, builder.mul(group.index, vec.I64(units * 4 * 32)))
        for k in range(4 * units):
            at = builder.add(codes_at, vec.I64(k * bits))
            codes = vec.load_codes(builder, format, at, last=k == 4 * units - 1)
            value = vec.multiply_add(builder, codes, factors, bias) if affine else builder.fmul(codes, factors)
            vec.store(builder, value, out_at, 32 * k)


def widen_row(builder: ir.IRBuilder, format: str, weight: ir.Value, out: ir.Value, n: ir.Value) -> None:
    """Writes a row of `n` weights that are not quantised as float32."""
    with cgutils.for_range(builder, n) as item:
        at = builder.add(weight, builder.mul(item.index, vec.I64(FORMAT_BITS[format] // 8)))
        value = vec.load_scalar(builder, at, format)
        vec.store(builder, value, builder.add(out, builder.mul(item.index, vec.I64(4))))
