"""Matrices as MLX packs them, read where they lie; `Packed` is one matrix or a bank of them in slots."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import MimoError
from . import int8_products, kernels
from .codegen import row_kernels
from .formats import AFFINE_BITS, FORMAT_BITS, GROUP_SIZES, lane_scales
from .pages import make_large
from .tables import DequantiseTable

# With more rows of activations than this, BLAS is faster than the kernels' products, in float32 and as int8.
MAX_KERNEL_ROWS, MAX_KERNEL_ROWS_INT8 = 8, 64
_KINDS = {mx.bfloat16: "bf16", mx.float16: "f16", mx.float32: "f32", mx.uint8: "e8m0"}


def format_of(dtype: mx.Dtype, bits: int = 0, group_size: int = 0, mode: str = "affine") -> str | None:
    """The name of a format in `formats`, or None where no kernel reads it; 0 bits: weights of `dtype`, unquantised."""
    if not bits:
        kind = _KINDS.get(dtype)
        return kind if kind != "e8m0" else None
    if mode == "affine" and bits in AFFINE_BITS and group_size in GROUP_SIZES:
        return f"affine{bits}"
    return "mxfp4" if (mode, bits, group_size) == ("mxfp4", 4, 32) else None


lanes_of = functools.cache(lane_scales)


@dataclass(frozen=True)
class _View:
    """The memory of an evaluated array, whose address stays valid as long as this exists."""

    array: mx.array
    host: np.ndarray

    @property
    def address(self) -> int:
        return self.host.ctypes.data


def _view(array: mx.array) -> _View:
    flat = mx.contiguous(array).view(mx.uint8)
    mx.eval(flat)
    return _View(flat, np.asarray(flat))


class Addresses(NamedTuple):
    """Addresses of weight, scales and biases, 0 where a matrix has none; or the bytes of a row of each."""

    weight: Any
    scales: Any
    biases: Any


class Packed:
    """A matrix (rows, columns), or `slots` of them: weight (slots, rows, packed columns), scales and biases alike.

    With `borrowed`, the caller must keep the arrays as long as this is used; otherwise this keeps them, and moves them
    into large pages. Raises MimoError for a format without kernels (`format_of` returns None for it).
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        *,
        bits: int = 0,
        group_size: int = 0,
        mode: str = "affine",
        borrowed: bool = False,
    ):
        format = format_of(weight.dtype, bits, group_size, mode)
        if format is None:
            raise MimoError(f"{mode}, {bits} bits, groups of {group_size}: no CPU kernel; use MLX's own operations")
        self.format = format
        self.rows = weight.shape[-2]
        self.columns = weight.shape[-1] * weight.dtype.size * 8 // FORMAT_BITS[format]
        self.slots = weight.shape[0] if weight.ndim == 3 else 1
        self.group_size = group_size
        scale_type = scales.dtype if scales is not None else None
        if bits and scale_type is None:
            raise MimoError(f"{bits} bits, but no scales; convert again")
        self.scale = _KINDS[scale_type] if bits and scale_type is not None else ""
        if biases is not None and biases.dtype != scale_type:
            raise MimoError(f"scales are {scale_type}, biases {biases.dtype}; one type expected, convert again")
        views = [_view(part) if part is not None else None for part in (weight, scales, biases)]
        for view in views if not borrowed else ():
            if view:
                make_large(view.host)
        self.addresses = Addresses(*(view.address if view else 0 for view in views))
        self.row_bytes = Addresses(*(view.host.nbytes // (self.slots * self.rows) if view else 0 for view in views))
        self.views = [] if borrowed else views
        self.units = group_size // 32
        self.length = self.columns // group_size if group_size else self.columns  # of a row; see MultiplyTable
        self.int8 = int(int8_products.multiplies(self.format, self.columns))

    @property
    def max_kernel_rows(self) -> int:
        """The most rows of activations that go through the kernels; more go through BLAS."""
        return MAX_KERNEL_ROWS_INT8 if self.int8 else MAX_KERNEL_ROWS

    @property
    def slot_bytes(self) -> int:
        return self.rows * sum(self.row_bytes)

    @property
    def kind(self) -> tuple[str | int, ...]:
        """Equal for matrices that take the same activations and the same kernel."""
        return (self.format, self.scale, self.group_size, *self.row_bytes)

    def row_addresses(self, rows: np.ndarray | np.int64) -> Addresses:
        """The addresses of `rows`, counted over all slots."""
        return Addresses(*(address + rows * size for address, size in zip(self.addresses, self.row_bytes)))

    def slot_addresses(self, slots: np.ndarray) -> Addresses:
        """The addresses of the first rows of `slots`."""
        start, size, rows = self.addresses, self.row_bytes, self.rows
        return Addresses(
            weight=start.weight + slots * (size.weight * rows),
            scales=start.scales + slots * (size.scales * rows),
            biases=start.biases + slots * (size.biases * rows),
        )

    def dequantised(self, slot: int, first: int, last: int, out: np.ndarray) -> np.ndarray:
        """Rows first..last of one slot as float32, in the memory of `out`: (last - first, columns)."""
        out = out[: (last - first) * self.columns].reshape(last - first, self.columns)
        start = self.row_addresses(np.int64(slot * self.rows + first))
        table = DequantiseTable(
            weight=start.weight,
            scales=start.scales,
            biases=start.biases,
            weight_row_bytes=self.row_bytes.weight,
            scales_row_bytes=self.row_bytes.scales,
            lane_scales=lanes_of(self.format).ctypes.data,
            length=self.length,
            out=out.ctypes.data,
            out_row_bytes=out.strides[0],
        )
        # In one thread: another that has just worked keeps a core busy waiting, and BLAS uses all of them next.
        kernels.run(row_kernels.dequantise(self.format, self.scale, self.units), table, last - first, 0)
        return out
