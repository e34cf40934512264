"""`convert inspect DIR`: prints what a converted directory holds, from its config, manifest and headers alone."""

import argparse
import json
from collections import Counter
from pathlib import Path

from mlx_mimo.checkpoint import shapes

from . import table
from .converted import ConvertedSource


def describe(directory: str | Path) -> dict:
    """The JSON object of `convert inspect --json`, and the text's table under "table".

    Raises FormatError for files that cannot be read.
    """
    stored = ConvertedSource(directory)
    layout = stored.layout()
    rows = table.layout_rows(layout)
    manifest = stored.manifest
    return {
        "directory": str(directory),
        "layers": shapes.size(stored.config, "num_hidden_layers"),
        "global_layers": shapes.global_layers(stored.config),
        "moe_layers": len(shapes.moe_layers(stored.config)),
        "experts": shapes.size(stored.config, "n_routed_experts"),
        "mtp_layers": len({s.split(".")[3] for s in stored.weight_map if s.startswith(shapes.MTP)}),
        "expert_major": stored.is_streamable,
        "recipe": manifest.recipe_name if manifest else None,
        "source": manifest.fields.get("source") if manifest else None,
        "kv_scale_maps": dict(Counter(found["map"] for found in manifest.kv_scales.values())) if manifest else {},
        "kinds": table.as_json(rows),
        "table": table.render(rows),
    }


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mlx_mimo convert inspect", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    found = describe(arguments.directory)
    text = found.pop("table")
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    source = found["source"] or {}
    maps = ", ".join(f"{name} in {count} layers" for name, count in found["kv_scale_maps"].items())
    print(
        f"{found['directory']}\n"
        f"layers           {found['layers']} ({len(found['global_layers'])} global, {found['moe_layers']} with "
        f"{found['experts']} experts), {found['mtp_layers']} of multi-token prediction\n"
        f"expert-major     {'yes' if found['expert_major'] else 'no: run mlx_mimo convert repack'}\n"
        f"recipe           {found['recipe'] or 'unknown (no manifest)'}\n"
        f"source           {source.get('repo') or 'a local directory'} {source.get('revision') or ''}\n"
        f"K/V scale map    {maps or 'unknown'}\n\n{text}"
    )
    return 0
