"""The files beside the weights: config.json, the index, the manifest. The same input gives the same bytes."""

import json
from collections import Counter
from math import sqrt

import mlx_mimo
from mlx_mimo.checkpoint.layout import Plan, module_path

from .fp8 import KvMap
from .writer import Report

NAME = "mlx_mimo.json"
FORMAT = 1
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


def config_json(plan: Plan) -> dict:
    """The checkpoint's config.json with mlx-lm's `quantization`: the commonest form, and each path that differs."""
    config = {key: value for key, value in plan.config.items() if key not in ("quantization_config", "quantization")}
    paths = {}
    for file in plan.files:
        for item in file.items:
            if item.quantisation:
                paths[module_path(item.source)] = item.quantisation
    if paths:
        commonest = Counter(q for path, q in paths.items() if ".switch_mlp." in path) or Counter(paths.values())
        default = commonest.most_common(1)[0][0]
        quantization = default.as_json() | {path: q.as_json() for path, q in paths.items() if q != default}
        config["quantization"] = quantization
        config["quantization_config"] = quantization  # the Hub reads this name
    config["mlx_mimo"] = {"format": FORMAT, "recipe": plan.recipe.name}
    return config


def index_json(plan: Plan) -> dict:
    weight_map = {tensor.name: file.name for file in plan.files for item in file.items for tensor in item.stored}
    return {"metadata": {"total_size": plan.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def manifest_json(plan: Plan, source: dict, reports: list[Report], kv_maps: dict[int, KvMap]) -> dict:
    """`source` is {"repo", "revision"}; the files that hold no weights are added when they are written."""
    errors: dict[str, list[float]] = {}
    cells: dict[str, list[int]] = {}
    for report in reports:
        for into, found in ((errors, report.errors), (cells, report.cells)):
            for kind, (a, b) in found.items():
                total = into.setdefault(kind, [0, 0])
                total[0] += a
                total[1] += b
    return {
        "format": FORMAT,
        "converter": f"mlx_mimo {mlx_mimo.__version__}",
        "source": source,
        "recipe": plan.recipe.as_json(),
        "kv_scales": {str(layer): kv_map.as_json() for layer, kv_map in sorted(kv_maps.items())},
        "relative_error": {kind: relative(*errors[kind]) for kind in sorted(errors)},
        "scales_without_448": {kind: {"scales": n, "without": w} for kind, (n, w) in sorted(cells.items())},
        "files": {report.name: {"bytes": report.nbytes, "sha256": report.sha256} for report in reports},
    }


def relative(squared_error: float, squared_weight: float) -> float:
    return float(f"{sqrt(squared_error / squared_weight):.6g}") if squared_weight else 0.0


def dump(fields: dict) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
