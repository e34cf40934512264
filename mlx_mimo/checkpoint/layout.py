"""The layout of a converted directory: every output file, its tensors in order, and their sizes.

It follows from config.json, the names in the index, and a recipe; no weight is read.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError
from . import shapes
from .directory import MTP_FILE
from .index import INDEX
from .quantization import Quantization
from .recipe import Recipe
from .record import ALIGNMENT, PARTS, expert_file_name
from .shapes import Shape

TRUNK_FILE_BYTES = 2_000_000_000  # of data, at most, unless one tensor is larger
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class Item:
    """One tensor of the source checkpoint, and the tensors that it is stored as."""

    source: Shape
    quantization: Quantization | None  # None: stored as it is, or in bfloat16
    stored: tuple[StoredTensor, ...]  # the weight; its scales and biases if it is quantised

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file; the data of its items follow one another in their order."""

    name: str
    items: tuple[Item, ...]

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to its data. Expert files pad it so that expert 0 begins on a page."""
        fields: dict[str, dict[str, Any]] = {"__metadata__": {"format": "mlx"}}
        offset = 0
        for item in self.items:
            for tensor in item.stored:
                fields[tensor.name] = {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "data_offsets": [offset, offset + tensor.nbytes],
                }
                offset += tensor.nbytes
        text = json.dumps(fields, separators=(",", ":")).encode()
        alignment = ALIGNMENT if self.name.startswith("model-experts-") else 8
        text += b" " * (-(len(text) + 8) % alignment)
        return len(text).to_bytes(8, "little") + text

    @property
    def data_bytes(self) -> int:
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class DirectoryLayout:
    """All files of weights of a converted directory."""

    recipe: Recipe
    files: tuple[OutputFile, ...]
    config: dict[str, Any]  # the source's

    @property
    def data_bytes(self) -> int:
        return sum(file.data_bytes for file in self.files)


def layout_of(config: dict[str, Any], tensor_names: Iterable[str], recipe: Recipe) -> DirectoryLayout:
    """The layout that converting a checkpoint by `recipe` gives; the checkpoint's index names `tensor_names`.

    Raises FormatError where the index lacks a tensor that config.json asks for, or names one that it does not know.
    """
    names = set(tensor_names)
    unknown = {name for name in names if not name.endswith(shapes.SCALE)}
    groups: list[tuple[str | int, list[Shape]]] = [("trunk", shapes.trunk_shapes(config))]
    groups += [(layer, shapes.expert_shapes(config, layer)) for layer in shapes.moe_layers(config)]
    mtp: list[Shape] = []
    layer = 0
    while any(shape.name in names for shape in shapes.mtp_shapes(config, layer)):
        mtp += shapes.mtp_shapes(config, layer)
        layer += 1
    if mtp:
        groups.append(("mtp", mtp))
    files: list[OutputFile] = []
    for group, wanted in groups:
        items = tuple(_item(shape, recipe) for shape in wanted)
        for shape in wanted:
            if shape.name not in names:
                raise FormatError(f"{INDEX}: {shape.name} is missing; fetch the checkpoint again")
            unknown.discard(shape.name)
        if isinstance(group, int):
            files.append(OutputFile(expert_file_name(group), items))
        elif group == "mtp":
            files.append(OutputFile(MTP_FILE, items))
        else:
            files += _trunk_files(items)
    if unknown:
        raise FormatError(
            f"{INDEX}: {min(unknown)} ({len(unknown)} in all) is not a tensor of the model that config.json describes"
        )
    return DirectoryLayout(recipe, tuple(files), config)


def recipe_path(shape: Shape) -> str:
    """The module path that a recipe's patterns are matched with: one for all experts of a layer."""
    parts = shape.name.removesuffix(".weight").split(".")
    if "experts" in parts:
        del parts[parts.index("experts") + 1]
    return ".".join(parts)


def module_path(shape: Shape) -> str:
    """The module path in mlx-lm's model, under which config.json says how the module is quantised."""
    return recipe_path(shape).replace(".mlp.experts.", ".mlp.switch_mlp.")


def _item(shape: Shape, recipe: Recipe) -> Item:
    if shape.kind in ("router", "norm", "sink", "mtp.norm") or len(shape.shape) != 2:
        return Item(shape, None, (StoredTensor(shape.name, shape.dtype, shape.shape),))
    chosen = recipe.of(recipe_path(shape))
    rows, columns = shape.shape
    expert = shape.kind.startswith("experts.")
    if chosen and shape.name.startswith(shapes.MTP) and chosen.bits < 8:
        chosen = Quantization(8, 64)  # drafts of coarser weights are hardly ever accepted
    if chosen and columns % chosen.group_size:
        if expert:
            raise FormatError(
                f"{shape.name}: {columns} columns are not a multiple of the group size {chosen.group_size}; "
                f"choose another --q-group-size (32, 64, 128) or the recipe bf16"
            )
        chosen = None  # as mlx_lm.convert does, a matrix that does not divide stays in bfloat16
    if chosen is None:
        return Item(shape, None, (StoredTensor(shape.name, "BF16", shape.shape),))
    base = shape.name.removesuffix(".weight")
    groups = (rows, columns // chosen.group_size)
    stored = [StoredTensor(f"{base}.{PARTS[0]}", "U32", (rows, columns * chosen.bits // 32))]
    if chosen.mode == "affine":
        stored += [
            StoredTensor(f"{base}.{PARTS[1]}", "BF16", groups),
            StoredTensor(f"{base}.{PARTS[2]}", "BF16", groups),
        ]
    else:
        stored.append(StoredTensor(f"{base}.{PARTS[1]}", "U8", groups))
    return Item(shape, chosen, tuple(stored))


def trunk_file_name(number: int) -> str:
    """Trunk files are numbered from 1."""
    return f"model-trunk-{number:05}.safetensors"


def _trunk_files(items: tuple[Item, ...]) -> list[OutputFile]:
    parts: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if parts[-1] and size + item.nbytes > TRUNK_FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.nbytes
    return [OutputFile(trunk_file_name(n), tuple(part)) for n, part in enumerate(parts, 1)]
