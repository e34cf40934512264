"""What callers write into a table is what kernels read from it, field by field."""

import numpy as np
import pytest

pytest.importorskip("numba")

import numba

from mlx_mimo.cpu import kernels
from mlx_mimo.cpu.codegen import row_kernels
from mlx_mimo.cpu.codegen.intrinsics import load_word
from mlx_mimo.cpu.tables import DequantiseTable, MultiplyTable, RunTable, SplitTable, positions, words

TABLES = [MultiplyTable, RunTable, DequantiseTable, SplitTable]


@numba.njit
def read(address, position):
    return load_word(address, position)


@pytest.mark.parametrize("table", TABLES)
def test_generated_code_reads_each_field_where_callers_write_it(table):
    values = {name: 1000 + 7 * i for i, name in enumerate(sorted(table._fields))}
    content = words(table(**values))
    at = positions(table)
    found = {name: read(content.ctypes.data, getattr(at, name)) for name in table._fields}
    assert found == values


def test_a_run_table_is_read_by_field_and_run():
    runs = RunTable(*(np.arange(3) + 100 * i for i in range(len(RunTable._fields))))
    content = words(runs)
    at = positions(RunTable)
    for name, column in runs._asdict().items():
        for run in range(3):
            assert read(content.ctypes.data, run + getattr(at, name) * 3) == column[run]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_with_two_fields_swapped_is_read_wrongly(table):
    """What the first test would report if callers and kernels disagreed on the order."""
    first, second, *rest = table._fields
    values = dict(zip(table._fields, range(10, 10 + len(table._fields))))
    content = np.array([values[name] for name in (second, first, *rest)], np.int64)
    at = positions(table)
    assert read(content.ctypes.data, getattr(at, first)) == values[second]
    assert read(content.ctypes.data, getattr(at, second)) == values[first]


def test_a_kernel_refuses_the_table_of_another_kernel():
    kernel = row_kernels.dequantise("affine4", "bf16", 2)
    table = SplitTable(*range(len(SplitTable._fields)))
    with pytest.raises(TypeError, match="SplitTable given to a kernel that reads DequantiseTable"):
        kernels.run(kernel, table, 1, 0)
