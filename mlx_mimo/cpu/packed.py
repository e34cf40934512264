"""Matrices as MLX packs them, seen in place, and their products with rows of activations.

`Packed` is one matrix or a bank of them in slots. `matmul` and `experts` choose between the kernels that read packed
weights (few rows of activations) and blocks made float32 once for NumPy's BLAS (many).
"""

import functools
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import mlx.core as mx
import numpy as np

from ..errors import MimoError
from . import blas, digits, kernels
from .formats import AFFINE_BITS, FORMAT_BITS, lane_scales
from .pages import make_large

# Up to so many rows the kernels read packed weights, above, blocks are made float32 for BLAS: in float32, and where the
# products are in whole numbers.
FEW, FEW_WHOLE = 8, 64
PAIRS_AT_ONCE = 1024  # rows of x that go through their experts in one call
BLOCK_BYTES = 2**21  # of float32 weights at a time, so that they stay in cache
_KINDS = {mx.bfloat16: "bf16", mx.float16: "f16", mx.float32: "f32", mx.uint8: "e8m0"}
GROUPS = (32, 64, 128)
TOKENS = (4, 2, 1)  # how many a kernel takes at a time


def format_of(dtype: mx.Dtype, bits: int = 0, group_size: int = 0, mode: str = "affine") -> str | None:
    """The kernels' name for a format, bits 0 being an unquantised `dtype`; None for one that they do not know."""
    if not bits:
        kind = _KINDS.get(dtype)
        return kind if kind != "e8m0" else None
    if mode == "affine" and bits in AFFINE_BITS and group_size in GROUPS:
        return f"affine{bits}"
    return "mxfp4" if (mode, bits, group_size) == ("mxfp4", 4, 32) else None


@dataclass(frozen=True)
class _View:
    """An evaluated array's memory; it holds the array, so the address stays good."""

    array: mx.array
    host: np.ndarray

    @property
    def address(self) -> int:
        return self.host.ctypes.data


def _view(array: mx.array) -> _View:
    flat = mx.contiguous(array).view(mx.uint8)
    mx.eval(flat)
    return _View(flat, np.asarray(flat))


class Packed:
    """A matrix (rows, columns), or `slots` of them: weight (slots, rows, packed columns), scales and biases alike.

    `borrowed` says that the caller keeps the arrays for as long as this is used, so that it need not, and sees to their
    pages.

    Raises MimoError for a format without kernels (`format_of` tells beforehand).
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
        self.format = format_of(weight.dtype, bits, group_size, mode)
        if self.format is None:
            raise MimoError(f"{mode}, {bits} bits, groups of {group_size}: no CPU kernel; use MLX's own operations")
        self.rows = weight.shape[-2]
        self.columns = weight.shape[-1] * weight.dtype.size * 8 // FORMAT_BITS[self.format]
        self.slots = weight.shape[0] if weight.ndim == 3 else 1
        self.group_size = group_size
        self.scale = _KINDS[scales.dtype] if bits else ""
        if biases is not None and biases.dtype != scales.dtype:
            raise MimoError(f"scales are {scales.dtype}, biases {biases.dtype}; one type expected, convert again")
        views = [_view(part) if part is not None else None for part in (weight, scales, biases)]
        for view in views if not borrowed else ():
            if view:
                make_large(view.host)
        self.addresses = [view.address if view else 0 for view in views]
        self.row_bytes = [view.host.nbytes // (self.slots * self.rows) if view else 0 for view in views]
        self.views = [] if borrowed else views
        self.units = group_size // 32
        self.n = self.columns // group_size if group_size else self.columns
        self.whole = int(digits.take(self.format, self.columns))

    @property
    def few(self) -> int:
        """How many rows of activations are few; see FEW."""
        return FEW_WHOLE if self.whole else FEW

    @property
    def slot_bytes(self) -> int:
        return self.rows * sum(self.row_bytes)

    @property
    def kind(self) -> tuple:
        """Matrices of one kind take the same activations and the same kernel."""
        return (self.format, self.scale, self.group_size, *self.row_bytes)

    def pieces(self, height: int) -> np.ndarray:
        """Addresses (3, rows / height) of weight, scales and biases of every `height` rows of slot 0."""
        first = np.arange(0, self.rows, height)
        return np.stack([address + first * size for address, size in zip(self.addresses, self.row_bytes)])

    def places(self, slots: np.ndarray) -> list[np.ndarray]:
        """Addresses of weight, scales and biases of every slot."""
        return [address + slots * (size * self.rows) for address, size in zip(self.addresses, self.row_bytes)]

    def dequantised(self, slot: int, first: int, last: int, out: np.ndarray) -> np.ndarray:
        """Rows first..last of one slot as float32, in the memory of `out`: (last - first, columns)."""
        out = out[: (last - first) * self.columns].reshape(last - first, self.columns)
        at = slot * self.rows + first
        addresses = [address + at * size for address, size in zip(self.addresses, self.row_bytes)]
        lanes = _lanes(self.format)
        table = [*addresses, *self.row_bytes[:2], lanes.ctypes.data, out.ctypes.data, self.n, out.strides[0]]
        # By one thread: another that has just worked keeps a core busy waiting, and BLAS comes next and wants them all.
        kernels.run(kernels.dequantise(self.format, self.scale, self.units), table, last - first, 0)
        return out


_lanes = functools.cache(lane_scales)


class Activations:
    """x (T, columns) float32 as the kernels of one format and group size take it."""

    def __init__(self, x: np.ndarray, packed: Packed):
        self.key = self._key(packed)
        if not packed.group_size:
            self.scaled, self.sums = x, np.zeros((1, 1), np.float32)
            return
        if packed.whole:
            self.scaled = np.empty((len(x), digits.DIGITS * packed.columns), np.int8)
            self.sums = np.empty((len(x), 2 * packed.n), np.float32)  # and steps
            places = [v for a in (x, self.scaled, self.sums) for v in (a.ctypes.data, a.strides[0])]
            kernel = kernels.split_rows(digits.planes(packed.format), packed.units)
            kernels.run(kernel, [*places, packed.n], len(x), 0)
            return
        lanes = _lanes(packed.format)
        self.scaled = x if lanes[-1] == 1 else (x.reshape(-1, lanes.size) * lanes).reshape(x.shape)
        self.sums = x.reshape(len(x), -1, packed.group_size).sum(-1)

    def fit(self, packed: Packed) -> bool:
        return self.key == self._key(packed)

    @staticmethod
    def _key(packed: Packed) -> tuple:
        return (digits.planes(packed.format) if packed.whole else packed.format, packed.group_size)


@dataclass(frozen=True)
class Runs:
    """Consecutive rows of x through one slot, `tokens` at a time; int64 arrays, one entry a run."""

    tokens: int
    slots: np.ndarray
    x_rows: np.ndarray
    out_rows: np.ndarray


def singles(slots: np.ndarray, x_rows: np.ndarray) -> Runs:
    slots, x_rows = slots.astype(np.int64), x_rows.astype(np.int64)
    return Runs(1, slots, x_rows, np.arange(len(slots)))


def runs_of(spans: list[tuple[int, int, int]]) -> list[Runs]:
    """(slot, first row, last row + 1) → runs of 4, 2 and 1 rows."""
    found: dict[int, list[tuple[int, int]]] = {tokens: [] for tokens in TOKENS}
    for slot, first, last in spans:
        while first < last:
            tokens = next(t for t in found if t <= last - first)
            found[tokens].append((slot, first))
            first += tokens
    runs = []
    for tokens, starts in found.items():
        if starts:
            slots, rows = np.array(starts, np.int64).T.copy()
            runs.append(Runs(tokens, slots, rows, rows))
    return runs


def matmul(x: np.ndarray, packed: Packed, slot: int = 0) -> np.ndarray:
    """x (T, columns) float32, contiguous → (T, rows)."""
    out = np.empty((len(x), packed.rows), np.float32)
    if len(x) > packed.few:
        _many(x, packed, slot, out)
    elif len(x):
        _few(Activations(x, packed), [(packed, out)], runs_of([(slot, 0, len(x))]))
    return out


class Stack:
    """Matrices of one kind, one above the other: x goes through all of them in one call."""

    def __init__(self, matrices: list[Packed]):
        self.matrices = matrices
        self.ends = np.cumsum([matrix.rows for matrix in matrices]).tolist()
        # To the kernel they are pieces of equal height, wherever they lie.
        self._height = gcd(*(matrix.rows for matrix in matrices))
        pieces = [matrix.pieces(self._height) for matrix in matrices]
        self._pieces = np.concatenate(pieces, axis=1)
        self._out = np.arange(self._pieces.shape[1]) * (4 * self._height)

    @staticmethod
    def possible(matrices: list[Packed]) -> bool:
        return len({(matrix.kind, matrix.slots) for matrix in matrices}) == 1 and matrices[0].slots == 1

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """x (T, columns) float32, contiguous → (T, rows) for each matrix, parts of one array."""
        out = np.empty((len(x), self.ends[-1]), np.float32)
        parts = [out[:, end - matrix.rows : end] for end, matrix in zip(self.ends, self.matrices)]
        if len(x) > self.matrices[0].few:
            for part, matrix in zip(parts, self.matrices):
                _many(x, matrix, 0, part)
            return parts
        activations, first = Activations(x, self.matrices[0]) if len(x) else None, 0
        while first < len(x):
            tokens = next(t for t in TOKENS if t <= len(x) - first)
            rows = np.full(len(self._out), first)
            places = np.stack([*self._pieces, rows, out.ctypes.data + first * out.strides[0] + self._out])
            _launch(activations, self.matrices[0], self._height, places, tokens, out.strides[0])
            first += tokens
        return parts


def _few(activations: Activations, matrices: list[tuple[Packed, np.ndarray]], runs: list[Runs]) -> None:
    """Every run of x through each of some matrices of one kind and height, into the array beside it."""
    packed, out = matrices[0]
    for run in runs:
        places = [
            [*matrix.places(run.slots), run.x_rows, out.ctypes.data + run.out_rows * out.strides[0]]
            for matrix, out in matrices
        ]
        _launch(activations, packed, packed.rows, np.concatenate(places, axis=1), run.tokens, out.strides[0])


def _launch(activations: Activations, packed: Packed, rows: int, places: np.ndarray, tokens: int, out_row: int) -> None:
    """`places` (5, runs) are what `kernels.multiply` calls runs; each is of `rows` rows of weights like `packed`'s."""
    x, sums = activations.scaled, activations.sums
    weights = [places.ctypes.data, packed.row_bytes[0], packed.row_bytes[1], rows, packed.n]
    row_of_x = [x.ctypes.data, sums.ctypes.data, x.strides[0], sums.strides[0]]
    count = places.shape[1]
    kernel = kernels.multiply(packed.format, packed.scale, packed.units, tokens, packed.whole)
    items = count * -(-rows // kernels.rows_together(packed.format, packed.whole))
    kernels.run(kernel, [*weights, *row_of_x, out_row, count], items, count * rows * sum(packed.row_bytes))


def _many(x: np.ndarray, packed: Packed, slot: int, out: np.ndarray) -> None:
    step = max(1, BLOCK_BYTES // (4 * packed.columns))
    buffer = np.empty(min(step, packed.rows) * packed.columns, np.float32)
    with blas.limited(x.size * packed.rows):
        for first in range(0, packed.rows, step):
            last = min(first + step, packed.rows)
            out[:, first:last] = x @ packed.dequantised(slot, first, last, buffer).T


# ---- experts


@dataclass(frozen=True)
class Expert:
    """The three matrices of a bank of experts; slot s of each belongs to one expert."""

    gate: Packed
    up: Packed
    down: Packed


def experts(x: np.ndarray, slots: np.ndarray, bank: Expert, part: bool = False) -> np.ndarray:
    """x (T, hidden) float32 through the experts in slots (T, K) → (T, K, hidden): down(silu(gate x) * up x).

    `part` says that these are some pairs of a call of several tokens: computed as that call would compute them.
    """
    tokens, top_k = slots.shape
    if tokens == 1 and not part:
        return _one_token(x, slots[0], bank)[None]
    flat = slots.reshape(-1)
    order = np.argsort(flat, kind="stable")
    rows = np.ascontiguousarray(x[order // top_k])
    sorted_out = _sorted_experts(rows, flat[order], bank)
    out = np.empty_like(sorted_out)
    out[order] = sorted_out
    return out.reshape(tokens, top_k, -1)


def _one_token(x: np.ndarray, slots: np.ndarray, bank: Expert) -> np.ndarray:
    """x (1, hidden), slots (K,) → (K, hidden)."""
    inner = _gate_up(x, [singles(slots, np.zeros(len(slots)))], len(slots), bank)
    out = np.empty((len(slots), bank.down.rows), np.float32)
    _few(Activations(inner, bank.down), [(bank.down, out)], [singles(slots, np.arange(len(slots)))])
    return out


def _gate_up(x: np.ndarray, runs: list[Runs], outputs: int, bank: Expert) -> np.ndarray:
    """silu(gate x) * up x of every run of x: (outputs, inner)."""
    activations = Activations(x, bank.gate)
    gate, up = (np.zeros((outputs, bank.gate.rows), np.float32) for _ in range(2))
    if (bank.gate.kind, bank.gate.rows) == (bank.up.kind, bank.up.rows):
        _few(activations, [(bank.gate, gate), (bank.up, up)], runs)
    else:
        _few(activations, [(bank.gate, gate)], runs)
        _few(activations if activations.fit(bank.up) else Activations(x, bank.up), [(bank.up, up)], runs)
    return swiglu(gate, up)


def _sorted_experts(x: np.ndarray, slots: np.ndarray, bank: Expert) -> np.ndarray:
    """x (P, hidden), slots (P,) with equal ones adjacent → (P, hidden)."""
    bounds = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    spans = [(int(slots[a]), a, b) for a, b in pairwise(bounds)]
    out = np.empty((len(x), bank.down.rows), np.float32)
    few = min(bank.gate.few, bank.up.few, bank.down.few)
    for slot, a, b in spans:
        if b - a > few:
            inner = swiglu(matmul(x[a:b], bank.gate, slot), matmul(x[a:b], bank.up, slot))
            out[a:b] = matmul(inner, bank.down, slot)
    for batch in _batches([span for span in spans if span[2] - span[1] <= few]):
        rows = np.concatenate([np.arange(a, b) for _, a, b in batch])
        ends = np.cumsum([b - a for _, a, b in batch]).tolist()
        runs = runs_of([(slot, end - (b - a), end) for (slot, a, b), end in zip(batch, ends)])
        part = np.empty((len(rows), bank.down.rows), np.float32)
        _few(Activations(_gate_up(x[rows], runs, len(rows), bank), bank.down), [(bank.down, part)], runs)
        out[rows] = part
    return out


def _batches(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Spans (slot, first row, last row + 1) by the calls they are computed in, up to PAIRS_AT_ONCE rows in each."""
    batches: list[list[tuple[int, int, int]]] = []
    room = 0
    for span in spans:
        rows = span[2] - span[1]
        if rows > room:
            batches.append([])
            room = PAIRS_AT_ONCE
        batches[-1].append(span)
        room -= rows
    return batches


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, in the memory of `gate`."""
    with np.errstate(over="ignore"):  # exp(-gate) may overflow to infinity, which gives the right 0
        gate /= 1.0 + np.exp(-gate)
    gate *= up
    return gate
