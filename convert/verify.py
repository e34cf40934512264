"""`convert verify DIR`: is it whole, is it what its config says, and with `--deep` how far it is from the source."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.bridge_line import sha256, size
from mlx_mimo.checkpoint.layout import Item, Plan
from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError, MimoError

from . import manifest
from .compute import Computer, find_kv_maps
from .fp8 import dequantise
from .journal import NAME as JOURNAL
from .quantise import from_bfloat16
from .source import Source, open_source
from .stored import Stored
from .writer import PART, row_ranges

CHUNK_BYTES = 1 << 22


def verify(directory: str | Path) -> list[str]:
    """Everything that is wrong with a converted directory, one line each; empty where nothing is."""
    directory = Path(directory)
    if (directory / JOURNAL).exists():
        return [f"{JOURNAL}: an unfinished conversion; run the same mlx_mimo convert again"]
    try:
        stored = Stored(directory)
        ModelArgs.from_dict(stored.config)
        stored.check_files()
        plan = stored.plan()
    except MimoError as error:
        return [str(error)]
    problems = [f"{path.name}: left over; delete it" for path in sorted(directory.glob("*" + PART))]
    problems += _manifest_problems(directory, stored.manifest)
    misshapen = [*_shape_problems(stored, plan), *_name_problems(stored)]
    problems += misshapen or _value_problems(stored, plan)
    problems += _kv_problems(stored)
    return problems


def _manifest_problems(directory: Path, fields: dict | None) -> Iterator[str]:
    if fields is None:
        yield f"{manifest.NAME}: missing; sizes and sha256 cannot be checked"
        return
    if fields.get("format") != manifest.FORMAT or not isinstance(fields.get("files"), dict):
        yield f"{manifest.NAME}: format {fields.get('format')!r} found, {manifest.FORMAT} expected"
        return
    for name, wanted in fields["files"].items():
        path = directory / name
        if not path.is_file():
            yield f"{name}: missing"
        elif size(path) != wanted["bytes"]:
            yield f"{name}: {wanted['bytes']:,} bytes expected, {size(path):,} found; convert again"
        elif sha256(path) != wanted["sha256"]:
            yield f"{name}: its bytes are not those that were written (sha256); convert again"
    for path in sorted(directory.glob("model*.safetensors")):
        if path.name not in fields["files"]:
            yield f"{path.name}: not in the manifest, yet mlx-lm would load it"


def _shape_problems(stored: Stored, plan: Plan) -> Iterator[str]:
    for file in plan.files:
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
        expert_files(stored.directory)
    except FormatError as error:
        yield str(error)


def _name_problems(stored: Stored) -> Iterator[str]:
    for file in stored.files:
        for name in stored.header(file).tensors:
            if stored.weight_map.get(name) != file:
                yield f"{file}: {name} is not in the index"


def _value_problems(stored: Stored, plan: Plan) -> Iterator[str]:
    """Scales, biases and everything else that is a float must be finite."""
    for file in plan.files:
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


def _kv_problems(stored: Stored) -> Iterator[str]:
    maps = (stored.manifest or {}).get("kv_scales")
    for layer, found in (maps or {}).items():
        counts, cells = found.get("cells_without_448", {}), found.get("cells", 0)
        if counts.get(found.get("map"), 0) > 0.02 * cells:
            yield f"{manifest.NAME}: layer {layer}: the K/V map {found.get('map')} leaves {counts} of {cells} scales"


def compare(directory: str | Path, source: Source) -> list[dict]:
    """How far every matrix is from the source: [{layer, kind, relative_error}], by layer and kind."""
    stored = Stored(directory)
    plan = stored.plan()
    computer = Computer(source, source.config, find_kv_maps(source, source.config, _known_map(stored)))
    totals: dict[tuple, list[float]] = {}
    for file in plan.files:
        for item in file.items:
            if len(item.source.shape) != 2:
                continue
            total = totals.setdefault((_layer(item), item.source.kind), [0.0, 0.0])
            for begin, end in row_ranges(item):
                wanted = _source_values(computer, item, begin, end).astype(np.float64)
                found = stored.values(item.source.name, item.quantisation, begin, end)
                total[0] += float(np.square(found - wanted).sum())
                total[1] += float(np.square(wanted).sum())
    return [
        {"layer": layer, "kind": kind, "relative_error": manifest.relative(*total)}
        for (layer, kind), total in sorted(totals.items())
    ]


def _known_map(stored: Stored) -> str | None:
    maps = {found["map"] for found in ((stored.manifest or {}).get("kv_scales") or {}).values()}
    return maps.pop() if len(maps) == 1 and maps <= {"chain", "flat"} else None


def _layer(item: Item) -> int:
    """−1 for what lies in no layer; layers of multi-token prediction count on their own."""
    parts = item.source.name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _source_values(computer: Computer, item: Item, begin: int, end: int) -> np.ndarray:
    name = item.source.name
    raw, dtype = computer.source.read(name, begin, end), computer.source.entry(name).dtype
    if dtype == "F8_E4M3":
        return dequantise(raw, computer.scales(name).rows(begin, end))
    return from_bfloat16(raw) if dtype == "BF16" else raw


def error_table(rows: list[dict]) -> str:
    """Kinds down, with the smallest, largest and mean error over their layers."""
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
