"""`convert verify DIR`: checks that a converted directory is whole and is what its config.json says.

With `--deep` it also prints how far every kind of matrix is from the source.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.layout import DirectoryLayout, Item
from mlx_mimo.checkpoint.manifest import MANIFEST
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError, MimoError

from . import manifest
from .compute import Computer, find_kv_maps
from .converted import ConvertedSource
from .fp8 import dequantize
from .journal import NAME as JOURNAL
from .quantize import from_bfloat16
from .source import Source, open_source
from .writer import PART, row_ranges

CHUNK_BYTES = 1 << 22


def verify(directory: str | Path) -> list[str]:
    """The problems of a converted directory, one line each; empty where there are none."""
    directory = Path(directory)
    if (directory / JOURNAL).exists():
        return [f"{JOURNAL}: an unfinished conversion; run the same mlx_mimo convert again"]
    try:
        stored = ConvertedSource(directory)
        ModelArgs.from_dict(stored.config)
        stored.check()
        layout = stored.layout()
    except MimoError as error:
        return [str(error)]
    problems = [f"{path.name}: left over; delete it" for path in sorted(directory.glob("*" + PART))]
    problems += _manifest_problems(stored)
    misshapen = [*_shape_problems(stored, layout), *_name_problems(stored)]
    problems += misshapen or _value_problems(stored, layout)
    return problems


def _manifest_problems(stored: ConvertedSource) -> Iterator[str]:
    yield from stored.manifest_problems(deep=True)
    try:
        manifest = stored.manifest
    except FormatError:  # which is among the problems above
        return
    if manifest is None:
        yield f"{MANIFEST}: missing; sizes and sha256 cannot be checked"
        return
    for path in stored.weight_files:
        if path.name not in manifest.files:
            yield f"{path.name}: not in the manifest, yet mlx-lm would load it"
    for layer, found in manifest.kv_scales.items():
        counts, cells = found.get("cells_without_448", {}), found.get("cells", 0)
        if counts.get(found.get("map"), 0) > 0.02 * cells:
            yield f"{MANIFEST}: layer {layer}: the K/V map {found.get('map')} leaves {counts} of {cells} scales"


def _shape_problems(stored: ConvertedSource, layout: DirectoryLayout) -> Iterator[str]:
    for file in layout.files:
        for item in file.items:
            for want in item.stored:
                if want.name not in stored.weight_map:
                    yield f"{want.name}: missing from the index"
                    continue
                entry = stored.entry(want.name)
                if entry.shape != want.shape or entry.dtype not in (want.dtype, "F16", "F32", "BF16"):
                    yield (
                        f"{stored.weight_map[want.name]}: {want.name}: {entry.dtype} {list(entry.shape)} found, "
                        f"{want.dtype} {list(want.shape)} expected from config.json"
                    )
    try:
        _ = stored.expert_files  # which checks them
    except FormatError as error:
        yield str(error)


def _name_problems(stored: ConvertedSource) -> Iterator[str]:
    for file in stored.files:
        for name in stored.header(file).tensors:
            if stored.weight_map.get(name) != file:
                yield f"{file}: {name} is not in the index"


def _value_problems(stored: ConvertedSource, layout: DirectoryLayout) -> Iterator[str]:
    """Tensors of floats, scales and biases among them, with values that are not finite."""
    for file in layout.files:
        for item in file.items:
            for tensor in item.stored:
                dtype = stored.entry(tensor.name).dtype
                if dtype == "U32":
                    continue
                for begin, end in _rows(tensor.shape):
                    raw = stored.read(tensor.name, begin, end)
                    if dtype == "U8":
                        bad = int(np.count_nonzero(raw == 255))
                    else:
                        values = from_bfloat16(raw) if dtype == "BF16" else raw
                        values = values.view(np.float16) if dtype == "F16" else values
                        bad = int(np.count_nonzero(~np.isfinite(values)))
                    if bad:
                        yield f"{stored.weight_map[tensor.name]}: {tensor.name}: {bad} values are not finite"


def _rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:]))))
    return ((begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step))


def compare(directory: str | Path, source: Source) -> list[dict]:
    """[{"layer", "kind", "relative_error"}]: how far the matrices are from the source's, by layer and kind."""
    stored = ConvertedSource(directory)
    layout = stored.layout()
    computer = Computer(source, source.config, find_kv_maps(source, source.config, _known_map(stored)))
    totals: dict[tuple, list[float]] = {}
    for file in layout.files:
        for item in file.items:
            if len(item.source.shape) != 2:
                continue
            total = totals.setdefault((_layer(item), item.source.kind), [0.0, 0.0])
            for begin, end in row_ranges(item):
                wanted = _source_values(computer, item, begin, end).astype(np.float64)
                found = stored.values(item.source.name, item.quantization, begin, end)
                total[0] += float(np.square(found - wanted).sum())
                total[1] += float(np.square(wanted).sum())
    return [
        {"layer": layer, "kind": kind, "relative_error": manifest.relative(*total)}
        for (layer, kind), total in sorted(totals.items())
    ]


def _known_map(stored: ConvertedSource) -> str | None:
    maps = {found["map"] for found in stored.manifest.kv_scales.values()} if stored.manifest else set()
    return maps.pop() if len(maps) == 1 and maps <= {"chain", "flat"} else None


def _layer(item: Item) -> int:
    """The layer's number; −1 for a tensor of no layer. Layers of multi-token prediction are counted from 0 again."""
    parts = item.source.name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _source_values(computer: Computer, item: Item, begin: int, end: int) -> np.ndarray:
    name = item.source.name
    raw, dtype = computer.source.read(name, begin, end), computer.source.entry(name).dtype
    if dtype == "F8_E4M3":
        return dequantize(raw, computer.scales(name).rows(begin, end))
    return from_bfloat16(raw) if dtype == "BF16" else raw


def error_table(rows: list[dict]) -> str:
    """A table of text: for each kind of matrix the mean, smallest and largest error over its layers."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row["relative_error"])
    width = max(len(kind) for kind in kinds)
    lines = [f"{'kind':{width}}  layers      mean   smallest   largest"]
    for kind, errors in kinds.items():
        lines.append(
            f"{kind:{width}}  {len(errors):6}  {np.mean(errors):8.5f}   {min(errors):8.5f}  {max(errors):8.5f}"
        )
    return "\n".join(lines)


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mlx_mimo convert verify", description=__doc__)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--deep", action="store_true", help="dequantise everything and compare with --source")
    parser.add_argument("--source", metavar="DIR_OR_REPO")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.deep and not arguments.source:
        parser.error("--deep compares with a --source")
    if not Path(arguments.directory).is_dir():
        parser.error(f"{arguments.directory}: no such directory")
    problems = verify(arguments.directory)
    errors = compare(arguments.directory, open_source(arguments.source)) if arguments.deep and not problems else []
    if arguments.json:
        print(json.dumps({"problems": problems, "errors": errors, "kinds": len({row["kind"] for row in errors})}))
    else:
        for problem in problems:
            print(problem)
        if errors:
            print(error_table(errors))
        print(f"{arguments.directory}: {f'{len(problems)} problems' if problems else 'whole'}")
    return 1 if problems else 0
