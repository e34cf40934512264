"""The conversion as a whole: check everything, then write file after file, config.json last."""

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
from mlx_mimo.checkpoint.layout import Item, Plan, make_plan
from mlx_mimo.checkpoint.recipe import Recipe, named
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError, MimoError, UsageError

from . import manifest
from .compute import Computer, find_kv_maps, read_cells
from .fp8 import KvMap
from .journal import NAME as JOURNAL
from .journal import DirectoryLock, Journal
from .quantise import kernels_available
from .source import INDEX, Source, open_source, read_json
from .writer import PART, STAGED, Piece, Report, source_names, write_file, write_whole

SUSPICIOUS = 0.05  # share of scales without a ±448 code above which a tensor kind is reported


@dataclass
class Prepared:
    """A conversion of which everything that can be checked beforehand has been."""

    source: Source
    plan: Plan
    kv_maps: dict[int, KvMap]
    job: dict  # what the journal compares


def convert_checkpoint(
    source: str | os.PathLike | Source,
    target: str | os.PathLike,
    *,
    recipe: str | Recipe = "4bit",
    kv_scales: str | None = None,
    progress: bool = True,
    threads: int | None = None,
) -> Path:
    """Converts an FP8 checkpoint into `target`, or goes on where an interrupted call of the same kind stopped.

    `source` is a directory or Hub repository; `recipe` a name, a TOML file or a Recipe; `kv_scales` "chain" or "flat"
    overrides what the scales of the global layers' K and V show. Raises MimoError, naming file or field; `target` holds
    no config.json then.
    """
    target = Path(target)
    prepared = prepare(source, recipe, kv_scales)
    created = check_target(target, prepared)
    if created is None:
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
        reports = write_files(target, source, prepared.plan, computer.piece, journal, progress, threads)
        finish(target, prepared, reports)
        journal.remove()
    finally:
        journal.close()
    return reports


def prepare(source: str | os.PathLike | Source, recipe: str | Recipe, kv_scales: str | None) -> Prepared:
    """Reads headers, scales and the global layers' K and V; writes nothing."""
    if kv_scales not in (None, "chain", "flat"):
        raise UsageError(f"kv_scales {kv_scales!r}: chain or flat expected")
    source = source if isinstance(source, Source) else open_source(source)
    recipe = recipe if isinstance(recipe, Recipe) else named(recipe)
    if "quantization" in source.config:
        raise UsageError(f"{source.directory}: an MLX directory already; mlx_mimo convert repack takes those")
    ModelArgs.from_dict(source.config)
    plan = make_plan(source.config, source.weight_map, recipe)
    source.check_files()
    for file in plan.files:
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
        "converter": f"mlx_mimo {mlx_mimo.__version__} format {manifest.FORMAT}",
        "recipe": recipe.as_json(),
        "config": source.config,
        "revision": [source.repo, source.revision],
        "index": hashlib.sha256(repr(sorted(source.weight_map.items())).encode()).hexdigest(),
        "K/V scale map": {str(layer): kv_map.as_json() for layer, kv_map in kv_maps.items()},
    }
    return Prepared(source, plan, kv_maps, job)


def check_target(target: Path, prepared: Prepared) -> bool | None:
    """Whether there is something to do; None where `target` is this very conversion, complete."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; name a new directory")
    if not target.exists() or (target / JOURNAL).exists():
        return True
    if all(path.name == JOURNAL + PART for path in target.iterdir()):  # killed before the journal had its name
        return True
    same = (target / manifest.NAME).exists() and (target / "config.json").exists()
    if same:
        fields = read_json(target / manifest.NAME)
        wanted = manifest.manifest_json(prepared.plan, source_json(prepared.source), [], prepared.kv_maps)
        same = all(fields.get(key) == wanted[key] for key in ("format", "converter", "source", "recipe", "kv_scales"))
        same = same and read_json(target / "config.json") == manifest.config_json(prepared.plan)
    if not same:
        raise UsageError(f"{target}: not empty and not an unfinished conversion; name a new directory")
    return None


def check_sources(source: Source, journal: Journal) -> None:
    """What finished files were made from must not have changed since."""
    for report in journal.finished.values():
        for file, identity in report.sources.items():
            if source.identity(file) != identity:
                raise MimoError(
                    f"{file}: changed since {report.name} was made from it; delete {journal.path.parent} to begin anew"
                )


def space_needed(prepared: Prepared, journal: Journal) -> int:
    """Bytes still to be written, and in streaming those of the files fetched meanwhile."""
    left = [file for file in prepared.plan.files if file.name not in journal.finished]
    source = prepared.source
    staged = max((source.staging_bytes(source_names(file, source.weight_map)) for file in left), default=0)
    return sum(len(file.header) + file.data_bytes for file in left) + 2 * staged


def check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise MimoError(
            f"{target}: {needed / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free; make room, name another disk or "
            f"choose a smaller recipe"
        )


def write_files(
    target: Path,
    source: Source,
    plan: Plan,
    piece: Callable[[Item, int, int], Piece],
    journal: Journal,
    progress: bool,
    threads: int | None = None,
) -> list[Report]:
    """Writes the files of `plan` that the journal does not have yet. `piece` computes rows of an item."""
    threads = threads or (min(os.cpu_count() or 1, 16) if kernels_available() else 1)
    sources = {output.name: source_names(output, source.weight_map) for output in plan.files}
    left = [output for output in plan.files if output.name not in journal.finished]
    with ThreadPoolExecutor(threads) as pool, _Progress(plan, journal, progress) as bar:
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
    return [journal.finished[output.name] for output in plan.files]


def finish(target: Path, prepared: Prepared, reports: list[Report]) -> None:
    source, plan = prepared.source, prepared.plan
    fields = manifest.manifest_json(plan, source_json(source), reports, prepared.kv_maps)
    write_small_files(target, source, plan, manifest.config_json(plan), fields)


def write_small_files(target: Path, source: Source, plan: Plan, config: dict, fields: dict) -> None:
    """All but the weights, config.json last: with it the directory becomes loadable. `fields` is the manifest, to which
    the small files are added.
    """
    small = {name: source.text(name) for name in manifest.TOKENIZER_FILES}
    small = {name: data for name, data in small.items() if data is not None}
    small[INDEX] = manifest.dump(manifest.index_json(plan))
    small["config.json"] = manifest.dump(config)
    # A directory that was repacked in place may have the bridge on.
    written = small | {"config.json": bridge_line.without(small["config.json"])}
    sizes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in written.items()}
    fields["files"] = dict(sorted((fields["files"] | sizes).items()))
    last = small.pop("config.json")
    for name, data in small.items():
        write_whole(target / name, data)
    write_whole(target / manifest.NAME, manifest.dump(fields))
    for leftover in (*target.glob("*" + PART), *target.glob(STAGED + "*")):
        leftover.unlink()
    write_whole(target / "config.json", last)


def source_json(source: Source) -> dict:
    return {"repo": source.repo, "revision": source.revision}


def warn_of_misfits(reports: list[Report]) -> None:
    """A right reading leaves hardly any scale without a ±448 code; many mean a misread or damaged file."""
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
    """A bar over the bytes that are written."""

    def __init__(self, plan: Plan, journal: Journal, shown: bool):
        from tqdm import tqdm

        total = sum(file.data_bytes for file in plan.files)
        done = sum(file.data_bytes for file in plan.files if file.name in journal.finished)
        self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=not shown, desc="convert")
        self.advance: Callable[[int], None] = self._bar.update

    def file(self, name: str) -> None:
        self._bar.set_postfix_str(name, refresh=False)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()
