"""Where one expert's bytes lie: the format of `model-experts-L.safetensors`.

A record is one expert's tensors side by side, in the order of `TENSOR_ORDER`; a layer's file holds its experts'
records in order, so that one positional read fetches an expert. `convert` writes this, the reader reads it.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError
from .header import Header, TensorEntry, read_header

ALIGNMENT = 16384  # expert 0 begins on a page of Apple silicon; readers assume no alignment
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "scales", "biases")
TENSOR_ORDER = tuple(f"{projection}.{part}" for projection in PROJECTIONS for part in PARTS)

_FILE = re.compile(r"model-experts-(\d+)\.safetensors")
_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.((?:gate|up|down)_proj\.(?:weight|scales|biases))")


def expert_file_name(layer: int) -> str:
    return f"model-experts-{layer}.safetensors"


def expert_tensor_name(layer: int, expert: int, tensor: str) -> str:
    """`tensor` is one of TENSOR_ORDER, such as "gate_proj.weight"."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{tensor}"


@dataclass(frozen=True)
class RecordTensor:
    """One tensor of a record; `offset` counts from the record's first byte."""

    name: str  # one of TENSOR_ORDER
    dtype: str  # as safetensors writes it: U32, U8, BF16, F16, F32
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RecordLayout:
    """The shape of a record. Equal layouts are interchangeable: their layers can share a pool."""

    tensors: tuple[RecordTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def of(cls, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> "RecordLayout":
        """The layout of the given tensors: {name in TENSOR_ORDER: (dtype, shape, nbytes)}. mxfp4 has no biases."""
        rows, offset = [], 0
        for name in TENSOR_ORDER:
            if name in tensors:
                dtype, shape, nbytes = tensors[name]
                rows.append(RecordTensor(name, dtype, tuple(shape), offset, nbytes))
                offset += nbytes
        return cls(tuple(rows))


@dataclass(frozen=True)
class ExpertFile:
    """One layer's experts on disk: record `e` lies at `data_offset + e * layout.nbytes`."""

    path: Path
    layer: int
    num_experts: int
    data_offset: int
    layout: RecordLayout

    def offset(self, expert: int) -> int:
        """The first byte of an expert's record, counted from the start of the file. Raises IndexError."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts} in {self.path.name}")
        return self.data_offset + expert * self.layout.nbytes


def open_expert_file(path: str | os.PathLike[str]) -> ExpertFile:
    """The ExpertFile of a path, checked against the format. Raises FormatError naming the file and the tensor."""
    path = Path(path)
    match = _FILE.fullmatch(path.name)
    if not match:
        raise FormatError(f"{path.name}: an expert file is named model-experts-L.safetensors")
    return expert_file_of(read_header(path), int(match[1]))


def expert_file_of(header: Header, layer: int) -> ExpertFile:
    """The ExpertFile that a header describes. Raises FormatError naming the file and the tensor."""
    path = header.path
    experts: dict[int, dict[str, TensorEntry]] = {}
    for entry in header.tensors.values():
        match = _NAME.fullmatch(entry.name)
        if not match or int(match[1]) != layer:
            raise FormatError(f"{path.name}: {entry.name} is not a tensor of an expert of layer {layer}")
        experts.setdefault(int(match[2]), {})[match[3]] = entry
    if sorted(experts) != list(range(len(experts))) or not experts:
        raise FormatError(f"{path.name}: experts 0 to N - 1 expected, {len(experts)} found with gaps; convert again")
    layout = RecordLayout.of({n: (e.dtype, e.shape, e.nbytes) for n, e in experts[0].items()})
    file = ExpertFile(path, layer, len(experts), header.data_offset, layout)
    for expert, tensors in experts.items():
        if len(tensors) != len(layout.tensors):
            raise FormatError(
                f"{path.name}: expert {expert} has {len(tensors)} tensors, expert 0 has {len(layout.tensors)}"
            )
        begin = file.offset(expert)
        for want in layout.tensors:
            found = tensors.get(want.name)
            if found is None or (found.dtype, found.shape) != (want.dtype, want.shape):
                raise FormatError(f"{path.name}: expert {expert} {want.name} differs from expert 0's; convert again")
            if found.offset != begin + want.offset:
                raise FormatError(
                    f"{path.name}: expert {expert} {want.name} lies at byte {found.offset:,}, "
                    f"{begin + want.offset:,} expected: not expert-major; run mlx_mimo convert repack"
                )
    return file


def expert_files(
    directory: str | os.PathLike[str], header: Callable[[str], Header] | None = None
) -> dict[int, ExpertFile]:
    """{layer: ExpertFile} of a converted directory; empty where it holds none.

    `header` returns the header of a file by its name; by default it is read from `directory`. Raises FormatError for a
    file that is not whole or not in the format of records.
    """
    folder = Path(directory)
    names = {
        int(match[1]): path.name
        for path in folder.glob("model-experts-*.safetensors")
        if (match := _FILE.fullmatch(path.name))
    }
    read = header or (lambda name: read_header(folder / name))
    return {layer: expert_file_of(read(name), layer) for layer, name in sorted(names.items())}
