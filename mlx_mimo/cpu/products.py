"""Products of packed matrices with rows of activations, and experts made of three of them.

A product with up to `Packed.max_kernel_rows` rows of activations goes through kernels that read packed weights; with
more, blocks of weights are dequantised for NumPy's BLAS.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

from . import blas, int8_products, kernels
from .codegen import row_kernels
from .packed import Addresses, Packed, lanes_of
from .tables import MultiplyTable, RunTable, SplitTable, words

RUN_LENGTHS = (4, 2, 1)  # rows of activations that a kernel takes at a time
PAIRS_AT_ONCE = 1024  # rows of activations that go through their experts in one call
BLOCK_BYTES = 2**21  # of float32 weights at a time, so that they stay in cache


class Activations:
    """x (T, columns) float32 as the kernels for one format and group size take it."""

    def __init__(self, x: np.ndarray, packed: Packed):
        self.key = self._key(packed)
        if not packed.group_size:
            self.scaled, self.sums = x, np.zeros((1, 1), np.float32)
            return
        if packed.int8:
            self.scaled = np.empty((len(x), int8_products.ACTIVATION_BYTES * packed.columns), np.int8)
            self.sums = np.empty((len(x), 2 * packed.length), np.float32)  # and steps
            table = SplitTable(
                x=x.ctypes.data,
                x_row_bytes=x.strides[0],
                signed_bytes=self.scaled.ctypes.data,
                signed_bytes_row_bytes=self.scaled.strides[0],
                sums=self.sums.ctypes.data,
                sums_row_bytes=self.sums.strides[0],
                groups=packed.length,
            )
            kernel = row_kernels.split_rows(int8_products.planes(packed.format), packed.units)
            kernels.run(kernel, table, len(x), 0)
            return
        lanes = lanes_of(packed.format)
        self.scaled = x if lanes[-1] == 1 else (x.reshape(-1, lanes.size) * lanes).reshape(x.shape)
        self.sums = x.reshape(len(x), -1, packed.group_size).sum(-1)

    def fit(self, packed: Packed) -> bool:
        """Whether `packed` takes its activations in this form."""
        return self.key == self._key(packed)

    @staticmethod
    def _key(packed: Packed) -> tuple[str | int, int]:
        return (int8_products.planes(packed.format) if packed.int8 else packed.format, packed.group_size)


@dataclass(frozen=True)
class Runs:
    """Runs of `tokens` consecutive rows of x through one slot each; int64 arrays (runs,)."""

    tokens: int  # one of RUN_LENGTHS
    slots: np.ndarray
    x_rows: np.ndarray
    out_rows: np.ndarray


def single_rows(slots: np.ndarray, x_rows: np.ndarray) -> Runs:
    """Runs of one row: row x_rows[i] through slots[i], output i."""
    slots, x_rows = slots.astype(np.int64), x_rows.astype(np.int64)
    return Runs(1, slots, x_rows, np.arange(len(slots)))


Span = tuple[int, int, int]  # (slot, first row of x, last row + 1)


def runs_of(spans: list[Span]) -> list[Runs]:
    """The rows of each span as runs of 4, 2 and 1 rows."""
    found: dict[int, list[tuple[int, int]]] = {tokens: [] for tokens in RUN_LENGTHS}
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
    if len(x) > packed.max_kernel_rows:
        _multiply_by_blas(x, packed, slot, out)
    elif len(x):
        _multiply_by_kernels(Activations(x, packed), [(packed, out)], runs_of([(slot, 0, len(x))]))
    return out


class Stack:
    """Matrices of one kind, stacked: x goes through all of them in one call."""

    def __init__(self, matrices: list[Packed]):
        self.matrices = matrices
        self.ends = np.cumsum([matrix.rows for matrix in matrices]).tolist()
        # The kernel sees pieces of equal height, wherever they lie.
        self._height = gcd(*(matrix.rows for matrix in matrices))
        pieces = [matrix.row_addresses(np.arange(0, matrix.rows, self._height)) for matrix in matrices]
        self._pieces = Addresses(*(np.concatenate(parts) for parts in zip(*pieces)))
        self._out = np.arange(len(self._pieces.weight)) * (4 * self._height)

    @staticmethod
    def possible(matrices: list[Packed]) -> bool:
        """Whether these matrices can be stacked."""
        return len({(matrix.kind, matrix.slots) for matrix in matrices}) == 1 and matrices[0].slots == 1

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """x (T, columns) float32, contiguous → (T, rows) for each matrix, views of one array."""
        out = np.empty((len(x), self.ends[-1]), np.float32)
        parts = [out[:, end - matrix.rows : end] for end, matrix in zip(self.ends, self.matrices)]
        if not len(x):
            return parts
        if len(x) > self.matrices[0].max_kernel_rows:
            for part, matrix in zip(parts, self.matrices):
                _multiply_by_blas(x, matrix, 0, part)
            return parts
        activations, first = Activations(x, self.matrices[0]), 0
        while first < len(x):
            tokens = next(t for t in RUN_LENGTHS if t <= len(x) - first)
            runs = RunTable(
                weight=self._pieces.weight,
                scales=self._pieces.scales,
                biases=self._pieces.biases,
                x_row=np.full(len(self._out), first),
                out=out.ctypes.data + first * out.strides[0] + self._out,
            )
            _multiply_runs(activations, self.matrices[0], self._height, words(runs), tokens, out.strides[0])
            first += tokens
        return parts


def _multiply_by_kernels(activations: Activations, matrices: list[tuple[Packed, np.ndarray]], runs: list[Runs]) -> None:
    """Every run of x through each of some matrices of one kind and height; writes into the array beside the matrix."""
    packed, out = matrices[0]
    for run in runs:
        tables = []
        for matrix, out in matrices:
            start = matrix.slot_addresses(run.slots)
            table = RunTable(
                weight=start.weight,
                scales=start.scales,
                biases=start.biases,
                x_row=run.x_rows,
                out=out.ctypes.data + run.out_rows * out.strides[0],
            )
            tables.append(words(table))
        run_words = np.concatenate(tables, axis=1) if len(tables) > 1 else tables[0]
        _multiply_runs(activations, packed, packed.rows, run_words, run.tokens, out.strides[0])


def _multiply_runs(
    activations: Activations, packed: Packed, rows: int, runs: np.ndarray, tokens: int, out_row_bytes: int
) -> None:
    """Calls the kernel. `runs` are the words of a RunTable; each run takes `rows` rows of weights like `packed`'s."""
    x, sums, count = activations.scaled, activations.sums, runs.shape[1]
    table = MultiplyTable(
        runs=runs.ctypes.data,
        run_count=count,
        weight_row_bytes=packed.row_bytes.weight,
        scales_row_bytes=packed.row_bytes.scales,
        rows=rows,
        length=packed.length,
        x=x.ctypes.data,
        x_row_bytes=x.strides[0],
        sums=sums.ctypes.data,
        sums_row_bytes=sums.strides[0],
        out_row_bytes=out_row_bytes,
    )
    kernel = row_kernels.multiply(packed.format, packed.scale, packed.units, tokens, packed.int8)
    items = count * -(-rows // row_kernels.rows_together(packed.format, packed.int8))
    kernels.run(kernel, table, items, count * rows * sum(packed.row_bytes))


def _multiply_by_blas(x: np.ndarray, packed: Packed, slot: int, out: np.ndarray) -> None:
    """out = x · slot's matrix, whose rows are dequantised a block at a time."""
    step = max(1, BLOCK_BYTES // (4 * packed.columns))
    buffer = np.empty(min(step, packed.rows) * packed.columns, np.float32)
    with blas.limited(x.size * packed.rows):
        for first in range(0, packed.rows, step):
            last = min(first + step, packed.rows)
            out[:, first:last] = x @ packed.dequantised(slot, first, last, buffer).T


# ---- experts


@dataclass(frozen=True)
class ExpertMatrices:
    """The three matrices of a bank of experts; slot s of each belongs to one expert."""

    gate: Packed
    up: Packed
    down: Packed


def run_experts(x: np.ndarray, slots: np.ndarray, bank: ExpertMatrices, part: bool = False) -> np.ndarray:
    """x (T, hidden) float32 through the experts in slots (T, K) → (T, K, hidden): down(silu(gate x) * up x).

    Pass `part` where these are some pairs of a call of several tokens: they are computed as that call computes them.
    """
    tokens, top_k = slots.shape
    if tokens == 1 and not part:
        return _run_one_token(x, slots[0], bank)[None]
    flat = slots.reshape(-1)
    order = np.argsort(flat, kind="stable")
    rows = np.ascontiguousarray(x[order // top_k])
    sorted_out = _run_sorted(rows, flat[order], bank)
    out = np.empty_like(sorted_out)
    out[order] = sorted_out
    return out.reshape(tokens, top_k, -1)


def _run_one_token(x: np.ndarray, slots: np.ndarray, bank: ExpertMatrices) -> np.ndarray:
    """x (1, hidden), slots (K,) → (K, hidden)."""
    inner = _gate_up(x, [single_rows(slots, np.zeros(len(slots)))], len(slots), bank)
    out = np.empty((len(slots), bank.down.rows), np.float32)
    _multiply_by_kernels(Activations(inner, bank.down), [(bank.down, out)], [single_rows(slots, np.arange(len(slots)))])
    return out


def _gate_up(x: np.ndarray, runs: list[Runs], outputs: int, bank: ExpertMatrices) -> np.ndarray:
    """silu(gate x) * up x for every run of x: (outputs, inner)."""
    activations = Activations(x, bank.gate)
    gate, up = (np.zeros((outputs, bank.gate.rows), np.float32) for _ in range(2))
    if (bank.gate.kind, bank.gate.rows) == (bank.up.kind, bank.up.rows):
        _multiply_by_kernels(activations, [(bank.gate, gate), (bank.up, up)], runs)
    else:
        _multiply_by_kernels(activations, [(bank.gate, gate)], runs)
        if not activations.fit(bank.up):
            activations = Activations(x, bank.up)
        _multiply_by_kernels(activations, [(bank.up, up)], runs)
    return swiglu(gate, up)


def _run_sorted(x: np.ndarray, slots: np.ndarray, bank: ExpertMatrices) -> np.ndarray:
    """x (P, hidden), slots (P,) with equal ones adjacent → (P, hidden)."""
    bounds = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    spans = [(int(slots[a]), a, b) for a, b in pairwise(bounds)]
    out = np.empty((len(x), bank.down.rows), np.float32)
    most = min(bank.gate.max_kernel_rows, bank.up.max_kernel_rows, bank.down.max_kernel_rows)
    for slot, a, b in spans:
        if b - a > most:
            inner = swiglu(matmul(x[a:b], bank.gate, slot), matmul(x[a:b], bank.up, slot))
            out[a:b] = matmul(inner, bank.down, slot)
    for batch in _batches([span for span in spans if span[2] - span[1] <= most]):
        rows = np.concatenate([np.arange(a, b) for _, a, b in batch])
        ends = np.cumsum([b - a for _, a, b in batch]).tolist()
        runs = runs_of([(slot, end - (b - a), end) for (slot, a, b), end in zip(batch, ends)])
        part = np.empty((len(rows), bank.down.rows), np.float32)
        inner = _gate_up(x[rows], runs, len(rows), bank)
        _multiply_by_kernels(Activations(inner, bank.down), [(bank.down, part)], runs)
        out[rows] = part
    return out


def _batches(spans: list[Span]) -> list[list[Span]]:
    """The spans of each call of the kernels, up to PAIRS_AT_ONCE rows in each."""
    batches: list[list[Span]] = []
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
