"""The whole conversion: checks everything first, then writes file after file, config.json last."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx_mimo
from mlx_mimo.checkpoint import bridge_line
from mlx_mimo.checkpoint.directory import read_config
from mlx_mimo.checkpoint.index import INDEX
from mlx_mimo.checkpoint.layout import DirectoryLayout, Item, layout_of
from mlx_mimo.checkpoint.manifest import FORMAT, MANIFEST, read_manifest
from mlx_mimo.checkpoint.recipe import Recipe, named
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError, MimoError, UsageError

from . import manifest
from .compute import Computer, find_kv_maps, read_cells
from .fp8 import KvMap
from .journal import NAME as JOURNAL
from .journal import DirectoryLock, Journal
from .quantize import kernels_available
from .source import Source, open_source
from .writer import PART, STAGED, Piece, Report, source_names, write_file, write_whole

SUSPICIOUS = 0.05  # share of scales without a ±448 code above which a tensor kind is reported


@dataclass
class Prepared:
    """A conversion that has been checked and not begun."""

    source: Source
    layout: DirectoryLayout
    kv_maps: dict[int, KvMap]
    job: dict  # what an unfinished conversion in the same directory must have in common with this one


def convert_checkpoint(
    source: str | os.PathLike | Source,
    target: str | os.PathLike,
    *,
    recipe: str | Recipe = "4bit",
    kv_scales: str | None = None,
    progress: bool = True,
    threads: int | None = None,
) -> Path:
    """Converts an FP8 checkpoint into `target` and returns it. A call after an interrupted one goes on where that
    stopped.

    `source` is a directory or Hub repository; `recipe` a name, a TOML file or a Recipe; `kv_scales`, "chain" or "flat",
    overrides the test of how the K/V scales of the global layers are to be read. Raises MimoError, naming the file or
    the field; `target` holds no config.json then.
    """
    target = Path(target)
    prepared = prepare(source, recipe, kv_scales)
    if not check_target(target, prepared):
        _say(progress, f"{target}: already converted; nothing to do")
        return target
    target.mkdir(parents=True, exist_ok=True)
    try:
        with DirectoryLock(target):
            reports = _locked(target, prepared, progress, threads)
    except OSError as error:
        raise MimoError(
            f"{error.filename or target}: {error.strerror}; make room or mend the disk, then run the same command again"
        ) from error
    finally:
        prepared.source.close()
    warn_of_misfits(reports)
    return target


def _locked(target: Path, prepared: Prepared, progress: bool, threads: int | None) -> list[Report]:
    journal = Journal(target, prepared.job)
    try:
        check_sources(prepared.source, journal)
        check_space(target, space_needed(prepared, journal))
        source = prepared.source
        computer = Computer(source, source.config, prepared.kv_maps)
        reports = write_files(target, source, prepared.layout, computer.piece, journal, progress, threads)
        finish(target, prepared, reports)
        journal.remove()
    finally:
        journal.close()
    return reports


def prepare(source: str | os.PathLike | Source, recipe: str | Recipe, kv_scales: str | None) -> Prepared:
    """Checks a conversion: reads headers, scales and the global layers' K and V, and writes nothing.

    Raises FormatError for a checkpoint that cannot be converted, UsageError for a wrong argument.
    """
    if kv_scales not in (None, "chain", "flat"):
        raise UsageError(f"kv_scales {kv_scales!r}: chain or flat expected")
    source = source if isinstance(source, Source) else open_source(source)
    recipe = recipe if isinstance(recipe, Recipe) else named(recipe)
    if "quantization" in source.config:
        raise UsageError(f"{source.path}: an MLX directory already; mlx_mimo convert repack takes those")
    ModelArgs.from_dict(source.config)
    layout = layout_of(source.config, source.weight_map, recipe)
    source.check()
    for file in layout.files:
        for item in file.items:
            entry = source.entry(item.source.name)
            if entry.shape != item.source.shape:
                raise FormatError(
                    f"{source.weight_map[entry.name]}: {entry.name}: shape {list(entry.shape)} found, "
                    f"{list(item.source.shape)} expected from config.json"
                )
            if entry.dtype == "F8_E4M3" and source.local:  # over a network each is checked when it is used
                read_cells(source, entry.name)
    kv_maps = find_kv_maps(source, source.config, kv_scales)
    job = {
        "converter": f"mlx_mimo {mlx_mimo.__version__} format {FORMAT}",
        "recipe": recipe.as_json(),
        "config": source.config,
        "revision": [source.repo, source.revision],
        "index": hashlib.sha256(repr(sorted(source.weight_map.items())).encode()).hexdigest(),
        "K/V scale map": {str(layer): kv_map.as_json() for layer, kv_map in kv_maps.items()},
    }
    return Prepared(source, layout, kv_maps, job)


def check_target(target: Path, prepared: Prepared) -> bool:
    """Whether anything is left to write: False where `target` is the finished result of this conversion.

    Raises UsageError where `target` is a file or holds something else.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; name a new directory")
    if not target.exists() or (target / JOURNAL).exists():
        return True
    if all(path.name == JOURNAL + PART for path in target.iterdir()):  # killed before the journal had its name
        return True
    if not _is_result(target, prepared):
        raise UsageError(f"{target}: not empty and not an unfinished conversion; name a new directory")
    return False


def _is_result(target: Path, prepared: Prepared) -> bool:
    written = read_manifest(target)
    if written is None or not (target / "config.json").exists():
        return False
    wanted = manifest.manifest_json(prepared.layout, source_json(prepared.source), [], prepared.kv_maps)
    same = (written.fields.get(key) == wanted[key] for key in ("format", "converter", "source", "recipe", "kv_scales"))
    return all(same) and read_config(target) == manifest.config_json(prepared.layout)


def check_sources(source: Source, journal: Journal) -> None:
    """Raises MimoError where a file has changed since finished files were made from it."""
    for report in journal.finished.values():
        for file, identity in report.sources.items():
            if source.identity(file) != identity:
                raise MimoError(
                    f"{file}: changed since {report.name} was made from it; delete {journal.path.parent} to begin anew"
                )


def space_needed(prepared: Prepared, journal: Journal) -> int:
    """Bytes still to be written, and with --stream those of the files that are fetched meanwhile."""
    left = [file for file in prepared.layout.files if file.name not in journal.finished]
    source = prepared.source
    staged = max((source.staging_bytes(source_names(file, source.weight_map)) for file in left), default=0)
    return sum(len(file.header) + file.data_bytes for file in left) + 2 * staged


def check_space(target: Path, needed: int) -> None:
    """Raises MimoError where the target's disk has less room."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise MimoError(
            f"{target}: {needed / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free; make room, name another disk or "
            f"choose a smaller recipe"
        )


def write_files(
    target: Path,
    source: Source,
    layout: DirectoryLayout,
    piece: Callable[[Item, int, int], Piece],
    journal: Journal,
    progress: bool,
    threads: int | None = None,
) -> list[Report]:
    """Writes the files of `layout` that the journal does not have yet. Returns the reports of all of them.

    `piece(item, begin, end)` computes rows of an item, in several threads. Raises MimoError where a source file changes
    meanwhile.
    """
    threads = threads or (min(os.cpu_count() or 1, 16) if kernels_available() else 1)
    sources = {output.name: source_names(output, source.weight_map) for output in layout.files}
    left = [output for output in layout.files if output.name not in journal.finished]
    with ThreadPoolExecutor(threads) as pool, _Progress(layout, journal, progress) as bar:
        while left:
            output = left.pop(0)
            names = sources[output.name]
            source.need(sorted(names), sorted(sources[left[0].name]) if left else ())
            before = {file: source.identity(file) for file in names}
            bar.file(output.name)
            report = write_file(target, output, piece, pool, 2 * threads + 1, bar.advance)
            for file in sorted(names):
                if source.identity(file) != before[file]:
                    raise MimoError(f"{file}: changed while {output.name} was made from it; run the same command again")
            report.sources = {file: before[file] for file in sorted(names)}
            journal.add(report)
            for file in names.difference(*(sources[later.name] for later in left)):
                source.release(file)
    return [journal.finished[output.name] for output in layout.files]


def finish(target: Path, prepared: Prepared, reports: list[Report]) -> None:
    source, layout = prepared.source, prepared.layout
    fields = manifest.manifest_json(layout, source_json(source), reports, prepared.kv_maps)
    write_small_files(target, source, layout, manifest.config_json(layout), fields)


def write_small_files(target: Path, source: Source, layout: DirectoryLayout, config: dict, fields: dict) -> None:
    """Writes every file that holds no weights, config.json last: with it the directory can be loaded.

    `fields` is the manifest; the sizes and hashes of these files are added to it.
    """
    found = {name: source.text(name) for name in manifest.TOKENIZER_FILES}
    small = {name: data for name, data in found.items() if data is not None}
    small[INDEX] = manifest.dump(manifest.index_json(layout))
    small["config.json"] = manifest.dump(config)
    # The bridge may be on in a directory that was repacked in place.
    written = small | {"config.json": bridge_line.without(small["config.json"])}
    sizes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in written.items()}
    fields["files"] = dict(sorted((fields["files"] | sizes).items()))
    last = small.pop("config.json")
    for name, data in small.items():
        write_whole(target / name, data)
    write_whole(target / MANIFEST, manifest.dump(fields))
    for leftover in (*target.glob("*" + PART), *target.glob(STAGED + "*")):
        leftover.unlink()
    write_whole(target / "config.json", last)


def source_json(source: Source) -> dict:
    return {"repo": source.repo, "revision": source.revision}


def warn_of_misfits(reports: list[Report]) -> None:
    """Warns of each kind of tensor with many scales that have no ±448 code: it was misread or is damaged."""
    cells: dict[str, list[int]] = {}
    for report in reports:
        for kind, (count, without) in report.cells.items():
            total = cells.setdefault(kind, [0, 0])
            total[0] += count
            total[1] += without
    for kind, (count, without) in cells.items():
        if without > SUSPICIOUS * count:
            print(
                f"warning: {kind}: {without:,} of {count:,} scales have no ±448 code: misread or damaged tensors?",
                file=sys.stderr,
            )


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr)


class _Progress:
    """A progress bar over the bytes that are written."""

    def __init__(self, layout: DirectoryLayout, journal: Journal, shown: bool):
        from tqdm import tqdm

        total = sum(file.data_bytes for file in layout.files)
        done = sum(file.data_bytes for file in layout.files if file.name in journal.finished)
        self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=not shown, desc="convert")
        self.advance: Callable[[int], None] = self._bar.update

    def file(self, name: str) -> None:
        self._bar.set_postfix_str(name, refresh=False)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()
