"""A converted directory that is read back: how each matrix is quantised, and its values in NumPy."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_mimo.checkpoint.layout import DirectoryLayout, layout_of
from mlx_mimo.checkpoint.quantization import Quantization
from mlx_mimo.checkpoint.recipe import Recipe
from mlx_mimo.errors import FormatError

from .quantize import from_bfloat16
from .source import Source

_EXPERT = re.compile(r"\.mlp\.experts\.")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@dataclass(frozen=True)
class StoredRecipe(Recipe):
    """A recipe read off a directory: its config.json's `quantization` and its tensors' names, as mlx-lm reads them."""

    paths: dict[str, Quantization]  # those that differ from the default
    default: Quantization | None
    quantized: set[str]

    @classmethod
    def read(cls, config: dict[str, Any], names: set[str]) -> "StoredRecipe":
        """Raises FormatError for a wrong `quantization`."""
        fields = config.get("quantization") or {}
        if not isinstance(fields, dict):
            raise FormatError("config.json: quantization must be an object")
        paths = {path: quantization_in(path, value) for path, value in fields.items() if isinstance(value, dict)}
        default = quantization_in("quantization", fields) if fields else None
        quantized = {_path(name.removesuffix(".scales")) for name in names if name.endswith(".scales")}
        return cls("as stored", (), paths, default, quantized)

    def of(self, path: str) -> Quantization | None:
        """As Recipe.of: `path` is without the expert's number."""
        if path not in self.quantized:
            return None
        return self.paths.get(_EXPERT.sub(".mlp.switch_mlp.", path), self.default)


def _path(base: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.", base)


def quantization_in(where: str, fields: dict[str, Any]) -> Quantization:
    """The Quantization in an object of config.json. Raises FormatError, which names it by `where`."""
    bits, group = fields.get("bits"), fields.get("group_size")
    if not isinstance(bits, int) or not isinstance(group, int):
        raise FormatError(f"config.json: quantization of {where}: bits and group_size must be whole numbers")
    return Quantization(bits, group, fields.get("mode", "affine"))


class ConvertedSource(Source):
    """A converted directory as the source of its own tensors."""

    def layout(self) -> DirectoryLayout:
        """What the directory should hold, by its config.json and index. Raises FormatError where these disagree."""
        names = {re.sub(r"\.(scales|biases)$", ".weight", name) for name in self.weight_map}
        return layout_of(self.config, names, StoredRecipe.read(self.config, set(self.weight_map)))

    def values(self, name: str, quantization: Quantization | None, begin: int, end: int) -> np.ndarray:
        """Rows [begin, end) of a weight as (R, C) float32, dequantised."""
        entry = self.entry(name)
        raw = self.read(name, begin, end)
        if quantization is None:
            return from_bfloat16(raw) if entry.dtype == "BF16" else raw.astype(np.float32)
        base = name.removesuffix(".weight")
        scales = self.read(f"{base}.scales", begin, end)
        codes = unpack(raw.view(np.uint8), quantization.bits)
        groups = codes.reshape(len(codes), -1, quantization.group_size)
        if quantization.mode == "mxfp4":
            values = np.where(groups & 8, -FP4[groups & 7], FP4[groups & 7])
            return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(codes.shape).astype(np.float32)
        biases = from_bfloat16(self.read(f"{base}.biases", begin, end))
        values = groups * from_bfloat16(scales)[..., None] + biases[..., None]
        return values.reshape(codes.shape).astype(np.float32)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """(R, B) uint8 → (R, B·8/bits) uint8: the codes of `bits` bits, which lie one after another, the least significant
    first."""
    if bits == 8:
        return packed
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream.reshape(len(packed), -1, bits) * weights).sum(axis=2, dtype=np.uint8)
