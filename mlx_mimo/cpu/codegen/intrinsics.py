"""The generated code as functions that numba compiles into a kernel, and the memory accesses that numba lacks."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from . import vectors as vec
from .float_products import dequantise_row, plain_dots, quantised_dots, widen_row
from .int8_products import int8_dots, split_row

I64 = types.int64
KERNEL = types.void(I64, I64, I64)  # address of a table, first item, last item + 1


# ---- memory by address


@intrinsic
def load_word(typingctx: Any, address: Any, index: Any) -> Any:
    """Loads the int64 at `address[index]`."""

    def codegen(context, builder, signature, args):
        return vec.load(builder, builder.add(args[0], builder.mul(args[1], vec.I64(8))), vec.I64)

    return I64(I64, I64), codegen


@intrinsic
def store_float(typingctx: Any, address: Any, value: Any) -> Any:
    """Stores a float32 at `address`."""

    def codegen(context, builder, signature, args):
        vec.store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(I64, types.float32), codegen


@intrinsic
def call_kernel(typingctx: Any, function: Any, table: Any, first: Any, last: Any) -> Any:
    """Calls the kernel at address `function`."""

    def codegen(context, builder, signature, args):
        kernel = ir.FunctionType(ir.VoidType(), [vec.I64] * 3)
        builder.call(builder.inttoptr(args[0], kernel.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(I64, I64, I64, I64), codegen


# ---- rows


@intrinsic(prefer_literal=True)
def dots(
    typingctx: Any,
    int8: Any,
    format: Any,
    scale: Any,
    units: Any,
    rows: Any,
    tokens: Any,
    weight: Any,
    weight_row: Any,
    scales: Any,
    biases: Any,
    scales_row: Any,
    x: Any,
    x_row: Any,
    sums: Any,
    sums_row: Any,
    length: Any,
) -> Any:
    """`rows` rows of weights times `tokens` rows of activations: a tuple of rows * tokens float32, row by row.

    `weight`, `scales` and `biases` are addresses of the first row; the next lies `weight_row` or `scales_row` bytes on.
    `x` is the address of the activations times lane_scales, `sums` of their sums over each group; with `int8`, both are
    what `split_activations` writes. A row has `length` groups of `units` times 32 weights, or `length` weights where
    `scale` is "", which means not quantised. The first six arguments are constants.
    """
    format_, scale_, units_ = format.literal_value, scale.literal_value, units.literal_value
    rows_, tokens_ = rows.literal_value, tokens.literal_value

    def codegen(context, builder, signature, args):
        weight, weight_row, scales, biases, scales_row, x, x_row, sums, sums_row, length = args[6:]
        weights = _rows(builder, weight, weight_row, rows_)
        factors = list(zip(_rows(builder, scales, scales_row, rows_), _rows(builder, biases, scales_row, rows_)))
        xs, totals = _rows(builder, x, x_row, tokens_), _rows(builder, sums, sums_row, tokens_)
        if int8.literal_value:
            values = int8_dots(builder, format_, scale_, units_, weights, factors, xs, totals, length)
        elif scale_:
            values = quantised_dots(builder, format_, scale_, units_, weights, factors, xs, totals, length)
        else:
            values = plain_dots(builder, format_, weights, xs, length)
        return cgutils.pack_array(builder, values)

    result = types.UniTuple(types.float32, rows_ * tokens_)
    return result(int8, format, scale, units, rows, tokens, *[I64] * 10), codegen


def _rows(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    """The addresses of `count` rows."""
    return [builder.add(address, builder.mul(stride, vec.I64(i))) for i in range(count)]


@intrinsic(prefer_literal=True)
def unpack(
    typingctx: Any,
    format: Any,
    scale: Any,
    units: Any,
    weight: Any,
    scales: Any,
    biases: Any,
    lane_scales: Any,
    out: Any,
    length: Any,
) -> Any:
    """Writes one row of weights as float32 to `out`; `lane_scales` is an address, the rest is as in `dots`."""
    format_, scale_, units_ = format.literal_value, scale.literal_value, units.literal_value

    def codegen(context, builder, signature, args):
        weight, scales, biases, lane_scales, out, length = args[3:]
        if scale_:
            dequantise_row(builder, format_, scale_, units_, weight, scales, biases, lane_scales, out, length)
        else:
            widen_row(builder, format_, weight, out, length)
        return context.get_dummy_value()

    return types.void(format, scale, units, *[I64] * 6), codegen


@intrinsic(prefer_literal=True)
def split_activations(
    typingctx: Any, planes: Any, units: Any, x: Any, signed_bytes: Any, sums: Any, groups: Any
) -> Any:
    """Writes one row of activations, float32, as int8 products take it; `x`, `signed_bytes`, `sums` are addresses."""

    def codegen(context, builder, signature, args):
        split_row(builder, planes.literal_value, units.literal_value, *args[2:])
        return context.get_dummy_value()

    return types.void(planes, units, *[I64] * 4), codegen
