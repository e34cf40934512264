"""What a kernel is given: tables of int64 words, with a name for each word.

Whoever calls a kernel makes the NamedTuple with every field named and gives it to `kernels.run`, which writes `words`.
The generated code reads the same fields at `positions`. Both come from one class, so the order of its fields is free.
"""

from typing import NamedTuple, TypeVar

import numpy as np

Table = TypeVar("Table", bound=NamedTuple)


class MultiplyTable(NamedTuple):
    """Rows of weights times rows of activations, for every column of a RunTable."""

    runs: int  # address of the RunTable's words
    run_count: int
    weight_row_bytes: int
    scales_row_bytes: int  # also of the biases
    rows: int  # of weights, in every run
    length: int  # groups in a row of weights; weights in it where they are not quantised
    x: int  # address of the first row of activations
    x_row_bytes: int
    sums: int  # address of the first row of the activations' sums (and steps, for int8 products)
    sums_row_bytes: int
    out_row_bytes: int


class RunTable(NamedTuple):
    """Runs: consecutive rows of activations through the same rows of weights. Each field is (runs,) int64."""

    weight: np.ndarray  # address of the first row
    scales: np.ndarray
    biases: np.ndarray
    x_row: np.ndarray  # number of the first row of activations
    out: np.ndarray  # address of the first output


class DequantiseTable(NamedTuple):
    """Rows of weights to be written as float32."""

    weight: int  # addresses of the first row
    scales: int
    biases: int
    weight_row_bytes: int
    scales_row_bytes: int
    lane_scales: int  # address of formats.lane_scales
    length: int  # as in MultiplyTable
    out: int
    out_row_bytes: int


class SplitTable(NamedTuple):
    """Rows of activations to be written as signed bytes for int8 products."""

    x: int  # address of the first row, float32
    x_row_bytes: int
    signed_bytes: int  # address of the first row of signed bytes
    signed_bytes_row_bytes: int
    sums: int  # address of the first row of sums and steps
    sums_row_bytes: int
    groups: int


def words(table: NamedTuple) -> np.ndarray:
    """The table as the kernels read it: int64 (fields,), or (fields, runs) for a RunTable."""
    return np.array(table, np.int64)


def positions(table: type[Table]) -> Table:
    """A table that holds, for each field, its row in `words`."""
    return table(*range(len(table._fields)))
