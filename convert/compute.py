"""Computes the bytes to store from rows of a checkpoint's tensor and its scales; finds the map of the K/V scales."""

from threading import Lock

import numpy as np

from mlx_mimo.checkpoint import shapes
from mlx_mimo.checkpoint.layout import Item
from mlx_mimo.errors import FormatError

from . import fp8
from .fp8 import KvMap, Scales
from .quantize import Encoded, bfloat16, encode, from_bfloat16
from .source import Source
from .writer import Piece


class Computer:
    """Computes the pieces of a conversion. Several threads may call `piece` at once."""

    def __init__(self, source: Source, config: dict, kv_maps: dict[int, KvMap]):
        self.source = source
        self.config = config
        self.kv_maps = kv_maps
        self._scales: tuple[str, Scales] | None = None
        self._lock = Lock()

    def piece(self, item: Item, begin: int, end: int) -> Piece:
        name = item.source.name
        raw = self.source.read(name, begin, end)
        dtype = self.source.entry(name).dtype
        if raw.ndim == 1 or item.source.dtype == "F32":
            return Piece(Encoded({"weight": _as(raw, dtype, item.stored[0].dtype, name)}, 0.0, 0.0))
        if dtype != "F8_E4M3":
            if dtype == item.stored[0].dtype:
                return Piece(Encoded({"weight": raw}, 0.0, 0.0))
            values = _as(raw, dtype, "F32", name)
            return Piece(encode(values, item.quantization))
        scales = self.scales(name)
        part = scales.rows(begin, end)
        found = scales.cells == 0
        fp8.mark_full_scale(name, raw, part, found)
        if _global_kv(name, self.kv_maps)[0] is not None:
            found = None  # counted with both tensors in view when the map was chosen
        return Piece(encode(fp8.dequantize(raw, part), item.quantization), found)

    def scales(self, name: str) -> Scales:
        """The scales of one FP8 weight. The latest are kept, since a weight's pieces follow one another."""
        with self._lock:
            latest = self._scales
        if latest and latest[0] == name:
            return latest[1]
        scales = self._find_scales(name)
        with self._lock:
            self._scales = (name, scales)
        return scales

    def _find_scales(self, name: str) -> Scales:
        layer, what = _global_kv(name, self.kv_maps)
        if layer is not None:
            return kv_scales(self.source, self.config, layer)[self.kv_maps[layer].name][what]
        cells = read_cells(self.source, name)
        return fp8.aligned(name, self.source.entry(name).shape, cells)


def read_cells(source: Source, name: str) -> np.ndarray:
    entry = source.entry(name + shapes.SCALE)
    if entry.dtype != "F32" or len(entry.shape) != 2:
        raise FormatError(f"{entry.name}: {entry.dtype} {list(entry.shape)} found, an F32 matrix expected")
    cells = source.read(entry.name)
    fp8.check_cells(name, cells)
    return cells


def kv_names(layer: int) -> tuple[str, str]:
    prefix = f"model.layers.{layer}.self_attn"
    return f"{prefix}.k_proj.weight", f"{prefix}.v_proj.weight"


def kv_scales(source: Source, config: dict, layer: int) -> dict[str, tuple[Scales, Scales]]:
    """{candidate map: (scales of K, scales of V)} of a global layer; both index K's cells followed by V's."""
    k_cells, v_cells = (read_cells(source, name) for name in kv_names(layer))
    heads = shapes.heads_of(config, sliding=False)
    if k_cells.shape[1] != v_cells.shape[1]:
        raise FormatError(f"model.layers.{layer}.self_attn: the scales of K and V have different numbers of columns")
    cells = np.concatenate([k_cells, v_cells])
    maps = fp8.kv_row_maps(heads.kv_heads, heads.head_dim, heads.v_head_dim, len(k_cells), len(v_cells))
    return {name: (Scales(cells, k_map), Scales(cells, v_map)) for name, (k_map, v_map) in maps.items()}


def find_kv_maps(source: Source, config: dict, wanted: str | None = None) -> dict[int, KvMap]:
    """{global layer: KvMap}, the same map for all. Layers whose K is not FP8 are left out.

    Raises FormatError where no map is clearly best.
    """
    per_layer: dict[int, tuple[int, dict[str, int]]] = {}
    for layer in shapes.global_layers(config):
        names = kv_names(layer)
        if source.entry(names[0]).dtype != "F8_E4M3":
            continue
        counts = {}
        codes = [source.read(name) for name in names]
        for candidate, pair in kv_scales(source, config, layer).items():
            cells = pair[0].cells
            found = np.zeros(cells.shape, np.bool_)
            for name, code, scales in zip(names, codes, pair):
                fp8.mark_full_scale(name, code, scales, found)
            counts[candidate] = int(np.count_nonzero((cells != 0) & ~found))
        if not counts:
            raise FormatError(f"model.layers.{layer}.self_attn: K/V scales of a shape that no known map fits")
        per_layer[layer] = int(np.count_nonzero(cells)), counts
    if not per_layer:
        return {}
    common = set.intersection(*(set(counts) for _, counts in per_layer.values()))
    total = {c: sum(counts[c] for _, counts in per_layer.values()) for c in fp8.CANDIDATES if c in common}
    best = fp8.choose(total, sum(cells for cells, _ in per_layer.values()), wanted)
    return {layer: KvMap(layer, best, cells, counts) for layer, (cells, counts) in per_layer.items()}


def _global_kv(name: str, kv_maps: dict[int, KvMap]) -> tuple[int | None, int]:
    for layer in kv_maps:
        if name in kv_names(layer):
            return layer, kv_names(layer).index(name)
    return None, 0


def _as(raw: np.ndarray, dtype: str, wanted: str, name: str) -> np.ndarray:
    """The values as `wanted`, BF16 or F32. Raises FormatError for a dtype other than BF16, F16 and F32."""
    if dtype == wanted:
        return raw
    if dtype not in ("BF16", "F16", "F32"):
        raise FormatError(f"{name}: dtype {dtype} found, {wanted} expected")
    values = from_bfloat16(raw) if dtype == "BF16" else (raw.view(np.float16) if dtype == "F16" else raw)
    values = values.astype(np.float32)
    return values if wanted == "F32" else bfloat16(values)
