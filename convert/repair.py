"""`convert repair`: mends K and V of the global layers where the converter read the scale chain as flat rows.

Each such weight is code · S_flat instead of code · S_chain. A group of columns lies in one scale block, so multiplying
its scale and bias by S_chain / S_flat corrects it. Only the small scale tensors of the source are read.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlx_mimo.checkpoint.bridge_line import sha256
from mlx_mimo.checkpoint.manifest import MANIFEST
from mlx_mimo.checkpoint.quantization import Quantization
from mlx_mimo.checkpoint.shapes import global_layers
from mlx_mimo.errors import FormatError, MimoError

from . import fp8, manifest
from .compute import kv_names, kv_scales
from .converted import ConvertedSource, quantization_in
from .journal import DirectoryLock
from .quantize import bfloat16, from_bfloat16
from .remote import RemoteSource
from .source import Source, is_repo
from .writer import flush_directory, write_whole

OLD = "mlx_mimo-repair-old.bin"  # the old bytes, until their replacement has been checked
FULL_SCALE = 448
NEAR = 0.1  # the largest weight of a group is at most so far from its true value, relatively, at 2 bits and more


@dataclass(frozen=True)
class Finding:
    """How one global layer was converted.

    `reads` is {map: cells of the chain whose largest code is 448 if the layer was made with that map}.
    """

    layer: int
    made_with: str  # "chain" or "flat"
    cells: int
    reads: dict[str, int]
    error_before: dict[str, float] | None = None  # {"k" or "v": relative error}, where it was measured
    error_after: dict[str, float] | None = None


@dataclass(frozen=True)
class Change:
    """Bytes that are to be written into a file at an offset."""

    file: str
    offset: int
    data: bytes


def examine(stored: ConvertedSource, source: Source) -> list[Finding]:
    """A Finding for each global layer. Raises FormatError where a layer fits neither the chain nor the flat map."""
    return [_examine(stored, source, layer) for layer in global_layers(stored.config)]


def _examine(stored: ConvertedSource, source: Source, layer: int) -> Finding:
    maps = kv_scales(source, source.config, layer)
    if "chain" not in maps or "flat" not in maps:
        raise FormatError(f"model.layers.{layer}: the source's K/V scales are not those of a chain; nothing to repair")
    values = [stored.values(name, quantization_of(stored, name), 0, _rows(stored, name)) for name in kv_names(layer)]
    chain = maps["chain"]
    cells = chain[0].cells.shape
    reads = {}
    for name in ("chain", "flat"):
        largest = np.zeros(cells, np.float32)
        for value, used, own in zip(values, maps[name], chain):
            scale = _per_column(used, value.shape[1])
            codes = np.abs(np.divide(value, scale, out=np.zeros_like(value), where=scale > 0))
            starts = np.arange(0, value.shape[1], fp8.BLOCK)
            np.maximum.at(largest, own.row_map, np.maximum.reduceat(codes, starts, axis=1))
        reads[name] = int(np.count_nonzero(np.abs(largest / FULL_SCALE - 1) < NEAR))
    count = cells[0] * cells[1]
    made_with = max(reads, key=reads.__getitem__)
    if reads[made_with] < 0.8 * count or reads["chain"] == reads["flat"]:
        raise FormatError(
            f"model.layers.{layer}.self_attn: neither made with the chain nor with flat scales (largest code 448 in "
            f"{reads['chain']} and {reads['flat']} of {count} cells): another source, or another fault"
        )
    return Finding(layer, made_with, count, reads)


def _per_column(scales: fp8.Scales, columns: int) -> np.ndarray:
    """(R, C) float32: the scale of every weight."""
    return scales.cells[scales.row_map][:, np.arange(columns) // fp8.BLOCK]


def _rows(stored: ConvertedSource, name: str) -> int:
    return stored.entry(name).shape[0]


def quantization_of(stored: ConvertedSource, name: str) -> Quantization | None:
    """How a weight is quantised, None if it is not. Raises FormatError for a mode that cannot be mended."""
    base = name.removesuffix(".weight")
    if f"{base}.scales" not in stored.weight_map:
        return None
    fields = stored.config.get("quantization") or {}
    found = quantization_in(base, fields[base] if isinstance(fields.get(base), dict) else fields)
    if found.mode != "affine":
        raise FormatError(f"{base}: {found.mode} has scales that are powers of two and cannot be mended; convert again")
    return found


def changes(stored: ConvertedSource, source: Source, layer: int) -> list[Change]:
    """What to write for one layer: new scales and biases of its K and V, or new weights where these are unquantised."""
    found = []
    maps = kv_scales(source, source.config, layer)
    for name, chain, flat in zip(kv_names(layer), maps["chain"], maps["flat"]):
        quantization = quantization_of(stored, name)
        base = name.removesuffix(".weight")
        for part in ("scales", "biases") if quantization else ("weight",):
            entry = stored.entry(f"{base}.{part}")
            group = quantization.group_size if quantization else 1
            right, wrong = (_per_column(scales, entry.shape[1] * group)[:, ::group] for scales in (chain, flat))
            ratio = np.divide(right, wrong, out=np.ones_like(right), where=wrong > 0)
            old = stored.read(entry.name)
            found.append(Change(stored.weight_map[entry.name], entry.offset, _times(old, entry.dtype, ratio)))
    return found


def _times(old: np.ndarray, dtype: str, ratio: np.ndarray) -> bytes:
    if dtype == "BF16":
        return bfloat16((from_bfloat16(old) * ratio).astype(np.float32)).tobytes()
    values = old.view(np.float16) if dtype == "F16" else old
    return (values.astype(np.float32) * ratio).astype(values.dtype).tobytes()


def relative_errors(stored: ConvertedSource, source: Source, layer: int) -> dict[str, float]:
    """{"k": relative error, "v": …} of one layer, against the source read by the chain."""
    errors = {}
    for which, name, scales in zip("kv", kv_names(layer), kv_scales(source, source.config, layer)["chain"]):
        wanted = fp8.dequantize(source.read(name), scales).astype(np.float64)
        found = stored.values(name, quantization_of(stored, name), 0, _rows(stored, name))
        errors[which] = manifest.relative(float(np.square(found - wanted).sum()), float(np.square(wanted).sum()))
    return errors


def repair(directory: str | Path, source: Source, *, measure: bool = False) -> list[Finding]:
    """Mends the layers of `directory` that were read as flat, in place. Returns a Finding for each global layer.

    An interrupted repair is undone first. `measure` adds the errors before and after, for which the source's weights
    are read. Raises MimoError; the old bytes are in place then.
    """
    directory = Path(directory)
    with DirectoryLock(directory):
        restore(directory)
        stored = ConvertedSource(directory)
        findings = examine(stored, source)
        faulty = [finding for finding in findings if finding.made_with == "flat"]
        layers = {finding.layer for finding in faulty}
        before = {n: relative_errors(stored, source, n) for n in layers} if measure else {}
        if faulty:
            todo = [change for layer in sorted(layers) for change in changes(stored, source, layer)]
            replace_bytes(directory, todo)
            left = [finding.layer for finding in examine(stored, source) if finding.made_with == "flat"]
            if left:
                restore(directory)
                raise MimoError(f"{directory}: layers {left} still read as flat after mending; the old bytes are back")
            _mend_manifest(stored, {change.file for change in todo}, layers)
            (directory / OLD).unlink()
        after = {n: relative_errors(stored, source, n) for n in layers} if measure else {}
    return [
        Finding(**(asdict(f) | {"error_before": before.get(f.layer), "error_after": after.get(f.layer)}))
        for f in findings
    ]


def replace_bytes(directory: Path, todo: list[Change]) -> None:
    """Makes the changes, after saving the old bytes to the disk, from which `restore` puts them back."""
    rows, old = [], []
    for change in todo:
        with open(directory / change.file, "rb") as file:
            file.seek(change.offset)
            data = file.read(len(change.data))
        rows.append([change.file, change.offset, len(data)])
        old.append(data)
    head = json.dumps(rows).encode()
    write_whole(directory / OLD, len(head).to_bytes(8, "little") + head + b"".join(old))
    _write(directory, todo)


def restore(directory: Path) -> bool:
    """Undoes an interrupted repair. Returns whether there was one."""
    path = directory / OLD
    if not path.exists():
        return False
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    place, todo = 8 + length, []
    for file, offset, nbytes in json.loads(data[8:place]):
        todo.append(Change(file, offset, data[place : place + nbytes]))
        place += nbytes
    _write(directory, todo)
    path.unlink()
    flush_directory(directory)
    return True


def _write(directory: Path, todo: list[Change]) -> None:
    for change in todo:
        handle = os.open(directory / change.file, os.O_WRONLY)
        try:
            os.pwrite(handle, change.data, change.offset)
            os.fsync(handle)
        finally:
            os.close(handle)


def _mend_manifest(stored: ConvertedSource, files: set[str], layers: set[int]) -> None:
    if stored.manifest is None:
        return
    fields = stored.manifest.fields
    for file in files & set(fields.get("files", {})):
        fields["files"][file]["sha256"] = sha256(stored.path / file)
    for layer in layers & {int(key) for key in fields.get("kv_scales", {})}:
        fields["kv_scales"][str(layer)] |= {"map": "chain", "repaired_from": "flat"}
    for which in ("global.k_proj", "global.v_proj"):
        fields.get("relative_error", {}).pop(which, None)
    write_whole(stored.path / MANIFEST, manifest.dump(fields))


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mlx_mimo convert repair", description=__doc__)
    parser.add_argument("directory", metavar="DIR", help="a quantised MLX directory")
    parser.add_argument("--source", required=True, metavar="DIR_OR_REPO", help="the FP8 checkpoint it was made from")
    parser.add_argument("--revision")
    parser.add_argument("--check", action="store_true", help="only say whether it has the fault (exit code 1 if so)")
    parser.add_argument("--measure", action="store_true", help="errors before and after; reads the source's K and V")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if not Path(arguments.directory).is_dir():
        parser.error(f"{arguments.directory}: no such directory")
    remote = is_repo(arguments.source)
    source = RemoteSource(arguments.source, arguments.revision) if remote else Source(arguments.source)
    if arguments.check:
        findings = examine(ConvertedSource(arguments.directory), source)
    else:
        findings = repair(arguments.directory, source, measure=arguments.measure or not remote)
    faulty = [finding for finding in findings if finding.made_with == "flat"]
    if arguments.json:
        print(json.dumps({"layers": [asdict(finding) for finding in findings]}))
    for finding in [] if arguments.json else faulty:
        line = f"layer {finding.layer}: {'read' if arguments.check else 'mended: was read'} as flat"
        before, after = finding.error_before, finding.error_after
        if before and after:
            line += "".join(f"; {which.upper()} error {before[which]:.4f} → {after[which]:.4f}" for which in "kv")
        print(line)
    if not faulty and not arguments.json:
        print(f"{arguments.directory}: K and V of its global layers were read by the chain; nothing to do")
    return 1 if arguments.check and faulty else 0
