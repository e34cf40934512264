"""The table of `convert --dry-run` and `convert inspect`: bytes and bits per weight for each kind of tensor."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from mlx_mimo.checkpoint.layout import DirectoryLayout, Item


@dataclass
class KindSize:
    """The size of all tensors of one kind that are stored in one way. `nbytes` counts scales and biases too."""

    kind: str
    form: str  # such as "4-bit group 64"
    tensors: int = 0
    weights: int = 0
    nbytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


def stored_as(item: Item) -> str:
    if item.quantization:
        return str(item.quantization)
    return {"BF16": "bfloat16", "F32": "float32"}.get(item.stored[0].dtype, item.stored[0].dtype)


def rows_of(items: Iterable[Item]) -> list[KindSize]:
    rows: dict[tuple[str, str], KindSize] = {}
    for item in items:
        row = rows.setdefault((item.source.kind, stored_as(item)), KindSize(item.source.kind, stored_as(item)))
        row.tensors += 1
        row.weights += prod(item.source.shape)
        row.nbytes += item.nbytes
    return list(rows.values())


def layout_rows(layout: DirectoryLayout) -> list[KindSize]:
    return rows_of(item for file in layout.files for item in file.items)


def total(rows: list[KindSize]) -> KindSize:
    return KindSize(
        "all", "", sum(row.tensors for row in rows), sum(row.weights for row in rows), sum(row.nbytes for row in rows)
    )


def render(rows: list[KindSize]) -> str:
    """The rows as a table of plain text, with their sum as its last line."""
    lines = [("kind", "stored as", "tensors", "weights", "bytes", "bits per weight")]
    for row in [*rows, total(rows)]:
        counts = (f"{row.tensors:,}", f"{row.weights:,}", f"{row.nbytes:,}", f"{row.bits_per_weight:.2f}")
        lines.append((row.kind, row.form, *counts))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        text.append("  ".join(left + right).rstrip())
    return "\n".join(text)


def as_json(rows: list[KindSize]) -> list[dict]:
    return [vars(row) | {"bits_per_weight": round(row.bits_per_weight, 4)} for row in [*rows, total(rows)]]
