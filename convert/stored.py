"""A directory in MLX's format as it lies on disk: which form each matrix has, and its values in NumPy."""

import os
import re
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.layout import Plan, make_plan
from mlx_mimo.checkpoint.recipe import Quantisation
from mlx_mimo.errors import FormatError

from . import manifest
from .quantise import from_bfloat16
from .source import Source, read_json

_EXPERT = re.compile(r"\.mlp\.experts\.")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


class StoredRecipe:
    """The recipe that a directory's config.json and tensor names amount to, as mlx-lm reads them."""

    name = "as stored"

    def __init__(self, config: dict, names: set[str]):
        fields = config.get("quantization") or {}
        if not isinstance(fields, dict):
            raise FormatError("config.json: quantization must be an object")
        self._paths = {path: _form(path, form) for path, form in fields.items() if isinstance(form, dict)}
        self._default = _form("quantization", fields) if fields else None
        self._quantised = {_path(name.removesuffix(".scales")) for name in names if name.endswith(".scales")}

    def of(self, path: str) -> Quantisation | None:
        """`path` as recipes see it: without the expert's number."""
        if path not in self._quantised:
            return None
        return self._paths.get(_EXPERT.sub(".mlp.switch_mlp.", path), self._default)


def _path(base: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.", base)


def _form(where: str, fields: dict) -> Quantisation:
    bits, group = fields.get("bits"), fields.get("group_size")
    if not isinstance(bits, int) or not isinstance(group, int):
        raise FormatError(f"config.json: quantization of {where}: bits and group_size must be whole numbers")
    return Quantisation(bits, group, fields.get("mode", "affine"))


class Stored(Source):
    """A converted directory."""

    def __init__(self, directory: str | os.PathLike):
        super().__init__(directory)
        path = Path(directory) / manifest.NAME
        self.manifest = read_json(path) if path.exists() else None

    def plan(self) -> Plan:
        """What this directory should hold, from config.json and the index."""
        names = {re.sub(r"\.(scales|biases)$", ".weight", name) for name in self.weight_map}
        return make_plan(self.config, names, StoredRecipe(self.config, set(self.weight_map)))

    def values(self, name: str, quantisation: Quantisation | None, begin: int, end: int) -> np.ndarray:
        """Rows of a weight as (R, C) float32, dequantised."""
        entry = self.entry(name)
        raw = self.read(name, begin, end)
        if quantisation is None:
            return from_bfloat16(raw) if entry.dtype == "BF16" else raw.astype(np.float32)
        base = name.removesuffix(".weight")
        scales = self.read(f"{base}.scales", begin, end)
        codes = unpack(raw.view(np.uint8), quantisation.bits)
        groups = codes.reshape(len(codes), -1, quantisation.group_size)
        if quantisation.mode == "mxfp4":
            values = np.where(groups & 8, -FP4[groups & 7], FP4[groups & 7])
            return np.ldexp(values, scales.astype(np.int32)[..., None] - 127).reshape(codes.shape).astype(np.float32)
        biases = from_bfloat16(self.read(f"{base}.biases", begin, end))
        values = groups * from_bfloat16(scales)[..., None] + biases[..., None]
        return values.reshape(codes.shape).astype(np.float32)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """(R, B) uint8 → (R, B·8/bits) uint8 codes: `bits` each, least significant first, in one stream."""
    if bits == 8:
        return packed
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream.reshape(len(packed), -1, bits) * weights).sum(axis=2, dtype=np.uint8)
