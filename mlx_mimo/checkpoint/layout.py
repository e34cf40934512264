"""What a conversion writes: every output file, its tensors in order, and their sizes. Nothing is read for it but
config.json and the index.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import FormatError
from . import shapes
from .recipe import Quantisation, Recipe
from .record import ALIGNMENT, PARTS, expert_file_name
from .shapes import Shape

TRUNK_FILE_BYTES = 2_000_000_000
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class Stored:
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
    """One tensor of the checkpoint and what becomes of it: one stored tensor, or two or three if quantised."""

    source: Shape
    quantisation: Quantisation | None
    stored: tuple[Stored, ...]  # weight, scales, biases

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)


@dataclass(frozen=True)
class OutputFile:
    name: str
    items: tuple[Item, ...]

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to its data. Expert files pad it so that expert 0 begins on a page."""
        fields, offset = {"__metadata__": {"format": "mlx"}}, 0
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
class Plan:
    recipe: Recipe
    files: tuple[OutputFile, ...]
    config: dict

    @property
    def data_bytes(self) -> int:
        return sum(file.data_bytes for file in self.files)


def make_plan(config: dict, names: Iterable[str], recipe: Recipe) -> Plan:
    """The plan for a checkpoint of which the index names `names`.

    Raises FormatError where the index lacks a tensor that config.json asks for, or names one that it does not know.
    """
    names = set(names)
    unknown = {name for name in names if not name.endswith(shapes.SCALE)}
    groups = [("trunk", shapes.trunk_shapes(config))]
    groups += [(layer, shapes.expert_shapes(config, layer)) for layer in shapes.moe_layers(config)]
    mtp, layer = [], 0
    while any(shape.name in names for shape in shapes.mtp_shapes(config, layer)):
        mtp += shapes.mtp_shapes(config, layer)
        layer += 1
    if mtp:
        groups.append(("mtp", mtp))
    files = []
    for group, wanted in groups:
        items = tuple(_item(shape, recipe) for shape in wanted)
        for shape in wanted:
            if shape.name not in names:
                raise FormatError(f"model.safetensors.index.json: {shape.name} is missing; fetch the checkpoint again")
            unknown.discard(shape.name)
        if group == "trunk":
            files += _split(items)
        elif group == "mtp":
            files.append(OutputFile("model-mtp.safetensors", items))
        else:
            files.append(OutputFile(expert_file_name(group), items))
    if unknown:
        raise FormatError(
            f"model.safetensors.index.json: {min(unknown)} ({len(unknown)} in all) is not a tensor of the model that "
            f"config.json describes"
        )
    return Plan(recipe, tuple(files), config)


def recipe_path(shape: Shape) -> str:
    """The path that a recipe sees: one for all experts of a layer."""
    parts = shape.name.removesuffix(".weight").split(".")
    if "experts" in parts:
        del parts[parts.index("experts") + 1]
    return ".".join(parts)


def module_path(shape: Shape) -> str:
    """The module's path in mlx-lm's model, under which config.json says how it is quantised."""
    return recipe_path(shape).replace(".mlp.experts.", ".mlp.switch_mlp.")


def _item(shape: Shape, recipe: Recipe) -> Item:
    if shape.kind in ("router", "norm", "sink", "mtp.norm") or len(shape.shape) != 2:
        return Item(shape, None, (Stored(shape.name, shape.dtype, shape.shape),))
    chosen = recipe.of(recipe_path(shape))
    rows, columns = shape.shape
    expert = shape.kind.startswith("experts.")
    if chosen and shape.name.startswith(shapes.MTP) and chosen.bits < 8:
        chosen = Quantisation(8, 64)  # drafts of coarser weights are hardly ever accepted
    if chosen and columns % chosen.group_size:
        if expert:
            raise FormatError(
                f"{shape.name}: {columns} columns are not a multiple of the group size {chosen.group_size}; "
                f"choose another --q-group-size (32, 64, 128) or the recipe bf16"
            )
        chosen = None  # as mlx_lm.convert does, a matrix that does not divide stays in bfloat16
    if chosen is None:
        return Item(shape, None, (Stored(shape.name, "BF16", shape.shape),))
    base = shape.name.removesuffix(".weight")
    groups = (rows, columns // chosen.group_size)
    stored = [Stored(f"{base}.{PARTS[0]}", "U32", (rows, columns * chosen.bits // 32))]
    if chosen.mode == "affine":
        stored += [Stored(f"{base}.{PARTS[1]}", "BF16", groups), Stored(f"{base}.{PARTS[2]}", "BF16", groups)]
    else:
        stored.append(Stored(f"{base}.{PARTS[1]}", "U8", groups))
    return Item(shape, chosen, tuple(stored))


def _split(items: tuple[Item, ...]) -> list[OutputFile]:
    parts, size = [[]], 0
    for item in items:
        if parts[-1] and size + item.nbytes > TRUNK_FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.nbytes
    return [OutputFile(f"model-trunk-{n:05}.safetensors", tuple(part)) for n, part in enumerate(parts, 1)]
