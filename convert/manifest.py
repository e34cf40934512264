"""The files beside the weights that a conversion writes: config.json, the index, the manifest.

The same input gives the same bytes.
"""

import json
from collections import Counter
from math import sqrt
from typing import TypeVar

import mlx_mimo
from mlx_mimo.checkpoint.layout import DirectoryLayout, module_path
from mlx_mimo.checkpoint.manifest import FORMAT

from .fp8 import KvMap
from .writer import Report

Number = TypeVar("Number", int, float)

# Taken over from the checkpoint where it has them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def config_json(layout: DirectoryLayout) -> dict:
    """The source's config.json with mlx-lm's `quantization`: the experts' commonest one, and each path that differs."""
    config = {key: value for key, value in layout.config.items() if key not in ("quantization_config", "quantization")}
    paths = {}
    for file in layout.files:
        for item in file.items:
            if item.quantization:
                paths[module_path(item.source)] = item.quantization
    if paths:
        commonest = Counter(q for path, q in paths.items() if ".switch_mlp." in path) or Counter(paths.values())
        default = commonest.most_common(1)[0][0]
        quantization = default.as_json() | {path: q.as_json() for path, q in paths.items() if q != default}
        config["quantization"] = quantization
        config["quantization_config"] = quantization  # the Hub reads this name
    config["mlx_mimo"] = {"format": FORMAT, "recipe": layout.recipe.name}
    return config


def index_json(layout: DirectoryLayout) -> dict:
    """The index of the output files."""
    weight_map = {tensor.name: file.name for file in layout.files for item in file.items for tensor in item.stored}
    return {"metadata": {"total_size": layout.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def manifest_json(layout: DirectoryLayout, source: dict, reports: list[Report], kv_maps: dict[int, KvMap]) -> dict:
    """The manifest. `source` is {"repo", "revision"}; the caller adds to "files" those that hold no weights."""
    errors: dict[str, list[float]] = {}
    cells: dict[str, list[int]] = {}
    for report in reports:
        _add(errors, report.errors)
        _add(cells, report.cells)
    return {
        "format": FORMAT,
        "converter": f"mlx_mimo {mlx_mimo.__version__}",
        "source": source,
        "recipe": layout.recipe.as_json(),
        "kv_scales": {str(layer): kv_map.as_json() for layer, kv_map in sorted(kv_maps.items())},
        "relative_error": {kind: relative(*errors[kind]) for kind in sorted(errors)},
        "scales_without_448": {kind: {"scales": n, "without": w} for kind, (n, w) in sorted(cells.items())},
        "files": {report.name: {"bytes": report.nbytes, "sha256": report.sha256} for report in reports},
    }


def _add(totals: dict[str, list[Number]], found: dict[str, list[Number]]) -> None:
    for kind, (a, b) in found.items():
        total = totals.setdefault(kind, [0, 0])
        total[0] += a
        total[1] += b


def relative(squared_error: float, squared_weight: float) -> float:
    """The relative error of sums of squares, to six digits."""
    return float(f"{sqrt(squared_error / squared_weight):.6g}") if squared_weight else 0.0


def dump(fields: dict) -> bytes:
    """The bytes of a JSON file."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
