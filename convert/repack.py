"""`convert repack`: makes a directory that mlx-lm wrote expert-major. Every stored value stays as it is.

mlx-lm stacks the experts of a layer; repacking puts the tensors of one expert side by side. In place, each old file is
deleted after the last read from it.
"""

import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_mimo.checkpoint import shapes
from mlx_mimo.checkpoint.bridge_line import FILE as BRIDGE
from mlx_mimo.checkpoint.directory import MTP_FILE, Directory
from mlx_mimo.checkpoint.header import Header, TensorEntry
from mlx_mimo.checkpoint.index import INDEX
from mlx_mimo.checkpoint.layout import DirectoryLayout, Item, OutputFile, StoredTensor, trunk_file_name
from mlx_mimo.checkpoint.manifest import FORMAT
from mlx_mimo.checkpoint.recipe import Recipe
from mlx_mimo.checkpoint.record import TENSOR_ORDER, expert_file_name, expert_tensor_name
from mlx_mimo.checkpoint.shapes import Shape
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError, MimoError, UsageError

from . import manifest
from .convert import check_sources, check_space, write_files, write_small_files
from .journal import NAME as JOURNAL
from .journal import DirectoryLock, Journal
from .quantize import Encoded
from .source import Source, open_source
from .writer import Piece, source_names, write_whole

STATE = "mlx_mimo-repack.json"  # config, index and headers that an unfinished repacking in place began with
_STACKED = re.compile(r"model\.layers\.(\d+)\.mlp\.switch_mlp\.(\w+_proj\.\w+)")
_SINGLE = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+_proj\.\w+)")


@dataclass(frozen=True)
class Copy(Item):
    """A tensor of the source that is stored as it is, or one expert's part of a stack."""

    expert: int | None = None  # of the stack; None: the whole tensor


class InPlace(Source):
    """A directory that is being repacked in place: its files are deleted one after another, so config, index and
    headers come from the state file."""

    def __init__(self, directory: Path):
        fields = json.loads((directory / STATE).read_text(encoding="utf-8"))
        Directory.__init__(self, directory, fields["config"], fields["weight_map"])
        for file, (data_offset, file_bytes, tensors) in fields["headers"].items():
            entries = {name: TensorEntry(name, t[0], tuple(t[1]), t[2], t[3]) for name, t in tensors.items()}
            self._headers[file] = Header(directory / file, data_offset, file_bytes, entries, {})

    @staticmethod
    def begin(source: Source) -> None:
        """Writes the state file of a directory."""
        headers = {}
        for file in source.files:
            header = source.header(file)
            tensors = {e.name: [e.dtype, e.shape, e.offset, e.nbytes] for e in header.tensors.values()}
            headers[file] = [header.data_offset, header.file_bytes, tensors]
        fields = {"config": source.config, "weight_map": source.weight_map, "headers": headers}
        write_whole(source.path / STATE, json.dumps(fields).encode())

    def identity(self, file: str) -> list:
        return [self.header(file).file_bytes]

    def release(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)


def repack(directory: str | Path, target: str | Path | None, *, progress: bool = True) -> Path:
    """Writes `directory` expert-major into `target`, or in place where that is None. Returns where it was written.

    A call after an interrupted one goes on where that stopped. Raises MimoError; nothing is lost then, and the same
    call goes on.
    """
    in_place = target is None
    directory = Path(directory)
    target = directory if target is None else Path(target)
    source = InPlace(directory) if in_place and (directory / STATE).exists() else open_source(directory)
    ModelArgs.from_dict(source.config)
    if not isinstance(source, InPlace):
        source.check()
    layout = repack_layout(source)
    if layout is None:
        (target / JOURNAL).unlink(missing_ok=True)
        return target
    if not in_place and target.exists() and any(target.iterdir()) and not (target / JOURNAL).exists():
        raise UsageError(f"{target}: not empty and not an unfinished repacking; name a new directory")
    target.mkdir(parents=True, exist_ok=True)
    try:
        with DirectoryLock(target):
            _locked(source, target, layout, in_place, progress)
    except OSError as error:
        raise MimoError(f"{error.filename or target}: {error.strerror}; then run the same command again") from error
    return target


def _locked(source: Source, target: Path, layout: DirectoryLayout, in_place: bool, progress: bool) -> None:
    index = hashlib.sha256(repr(sorted(source.weight_map.items())).encode()).hexdigest()
    journal = Journal(target, {"repack": index, "config": source.config})
    try:
        check_space(target, space_needed(source, layout, journal, in_place))
        if in_place and not isinstance(source, InPlace):
            InPlace.begin(source)
            source = InPlace(target)
        if in_place:
            for name in ("config.json", INDEX):
                (target / name).unlink(missing_ok=True)  # not loadable until it is done
        check_sources(source, journal)
        reports = write_files(target, source, layout, lambda item, begin, end: _piece(source, item, begin, end),
                              journal, progress)  # fmt: skip
        if in_place:
            for file in source.files:
                source.release(file)
        fields = manifest.manifest_json(layout, {"repo": None, "revision": None}, reports, {})
        config = source.config | {"mlx_mimo": {"format": FORMAT, "recipe": layout.recipe.name}}
        if not in_place and config.get("model_file") == BRIDGE:
            del config["model_file"]  # that file is not taken over
        write_small_files(target, source, layout, config, fields)
        (target / STATE).unlink(missing_ok=True)
        journal.remove()
    finally:
        journal.close()


def _piece(source: Source, item: Item, begin: int, end: int) -> Piece:
    if isinstance(item, Copy) and item.expert is not None:
        begin, end = item.expert, item.expert + 1
    return Piece(Encoded({"weight": source.read(item.source.name, begin, end)}, 0.0, 0.0))


def space_needed(source: Source, layout: DirectoryLayout, journal: Journal, in_place: bool) -> int:
    """Bytes that must be free. In place: the most by which the new files exceed the old ones deleted by then."""
    left = [file for file in layout.files if file.name not in journal.finished]
    needed = most = 0
    for number, output in enumerate(left):
        needed += len(output.header) + output.data_bytes
        most = max(most, needed)
        if in_place:
            later = (source_names(other, source.weight_map) for other in left[number + 1 :])
            done = source_names(output, source.weight_map).difference(*later)
            needed -= sum(source.header(file).file_bytes for file in done)
    return most


def repack_layout(source: Source) -> DirectoryLayout | None:
    """The files to write, in an order that frees old ones early; None where the directory is expert-major already.

    Raises FormatError for a directory that mlx-lm did not write or that lacks experts, UsageError for an FP8 one.
    """
    names = set(source.weight_map)
    if any(name.endswith(shapes.SCALE) for name in names):
        raise UsageError(f"{source.path}: an FP8 checkpoint; mlx_mimo convert takes those")
    layers = shapes.moe_layers(source.config)
    if all(
        source.weight_map.get(f"model.layers.{n}.mlp.experts.0.up_proj.weight") == expert_file_name(n) for n in layers
    ):
        return None
    count = shapes.size(source.config, "n_routed_experts")
    outputs = [_expert_output(source, layer, count) for layer in layers]
    number = 0
    for file in source.files:
        rest = [e for e in source.header(file).tensors.values() if not _is_expert(e.name)]
        for mtp in (False, True):
            items = tuple(_copy(entry, entry.name) for entry in rest if entry.name.startswith(shapes.MTP) == mtp)
            if items:
                number += not mtp
                outputs.append(OutputFile(MTP_FILE if mtp else trunk_file_name(number), items))
    place = {file: n for n, file in enumerate(source.files)}
    outputs.sort(key=lambda output: max(place[file] for file in source_names(output, source.weight_map)))
    return DirectoryLayout(Recipe("as stored", ()), tuple(outputs), source.config)


def _is_expert(name: str) -> bool:
    return bool(_STACKED.fullmatch(name) or _SINGLE.fullmatch(name))


def _expert_output(source: Source, layer: int, count: int) -> OutputFile:
    items = []
    for expert in range(count):
        for tensor in TENSOR_ORDER:
            stacked = f"model.layers.{layer}.mlp.switch_mlp.{tensor}"
            name = expert_tensor_name(layer, expert, tensor)
            if stacked in source.weight_map:
                entry = source.entry(stacked)
                if len(entry.shape) != 3 or entry.shape[0] != count:
                    raise FormatError(f"{stacked}: shape {list(entry.shape)} found, {count} experts expected")
                items.append(_copy(entry, name, expert))
            elif name in source.weight_map:
                items.append(_copy(source.entry(name), name))
            elif tensor.endswith(".weight"):
                raise FormatError(f"{INDEX}: neither {stacked} nor {name} is there: not a directory of mlx-lm's")
    return OutputFile(expert_file_name(layer), tuple(items))


def _copy(entry: TensorEntry, name: str, expert: int | None = None) -> Copy:
    if entry.dtype not in ("U32", "U8", "BF16", "F16", "F32"):
        raise FormatError(f"{entry.name}: dtype {entry.dtype} is not one that mlx-lm writes")
    shape = entry.shape if expert is None else entry.shape[1:]
    read = entry.shape if expert is None else (1, *shape)
    return Copy(Shape(entry.name, read, "copy", entry.dtype), None, (StoredTensor(name, entry.dtype, shape),), expert)


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mlx_mimo convert repack", description=__doc__)
    parser.add_argument("directory", metavar="DIR_OR_REPO", help="as mlx_lm.convert writes it")
    parser.add_argument("--mlx-path", metavar="DIR", help="where to write")
    parser.add_argument("--in-place", action="store_true", help="file by file in DIR itself; needs little free space")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args(argv)
    if bool(arguments.mlx_path) == arguments.in_place:
        parser.error("one of --mlx-path and --in-place")
    directory = arguments.directory
    if not os.path.isdir(directory) and not arguments.in_place:
        directory = open_source(directory).path
    if not os.path.isdir(directory):
        parser.error(f"{directory}: no such directory")
    print(repack(directory, arguments.mlx_path, progress=not arguments.quiet))
    return 0
