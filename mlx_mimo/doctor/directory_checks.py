"""The checks of a model directory: its disk, its files, and what they would do on a machine.

All checks share one Directory, which reads each header once: at the released model's size that is most of the time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ..checkpoint.directory import Directory, weight_files
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.record import ALIGNMENT
from ..config.model_args import ModelArgs
from ..errors import MimoError
from ..planning.budget import CHUNK, Budget, measure, usual_context
from ..planning.forecast import Forecast, fit_on, forecast
from ..planning.machine import Given, Machine, machine_with
from ..units import GB, format_size
from .machine_checks import FAILED, HERE, OK, SIMULATED, SKIPPED, WARNING, Check, disk_kind

SLOW_DISK = 1.0 * GB  # bytes a second
SLOW_DECODE = 1.0  # tokens a second


def directory_checks(path: Path, deep: bool, given: Given = HERE) -> Iterator[Check]:
    """The checks of the directory's disk, of its files, and of what they would do on this machine or the given one.

    `deep` reads every byte.
    """
    directory, machine = Directory(path), _machine(path, given)
    simulated = given.elsewhere or given.disk is not None
    yield Check("disk.kind", SKIPPED, "of another machine") if simulated else disk_kind(path)
    yield _disk_speed(machine)
    config, args = _config(directory)
    yield config
    if args is None:
        return
    yield _guarded("model.files", lambda: _files(directory))
    yield _guarded("model.experts", lambda: _experts(directory))
    yield _guarded("model.manifest", lambda: _manifest(directory))
    yield _tokenizer(path)
    yield _unfinished(path)
    yield (
        _guarded("model.hashes", lambda: _hashes(directory))
        if deep
        else Check("model.hashes", SKIPPED, "not read", "give --deep to read and compare every byte")
    )
    if config.status != OK or machine is None:
        found = "the backend is not known" if config.status == OK else "of the converted directory only"
        yield Check("model.memory", SKIPPED, found)
        yield Check("model.speed", SKIPPED, found)
        return
    yield from _fit(directory, args, machine)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except MimoError as error:
        return Check(name, FAILED, str(error), "run the same mlx_mimo convert again to mend it")


def _machine(directory: Path, given: Given) -> Machine | None:
    """The machine to check for, its disk measured on the directory's files; None where MLX cannot be loaded."""
    try:
        return machine_with(given, weight_files(directory))
    except (ImportError, RuntimeError):
        return None  # the check `backend` says so


def _disk_speed(machine: Machine | None) -> Check:
    name = "disk.speed"
    if machine is None:
        return Check(name, SKIPPED, "the backend is not known")
    speed = f"{format_size(int(machine.disk))}/s"
    if machine.disk_from == "assumed":
        return Check(name, SKIPPED, f"not measured, {speed} assumed", "the files are too small to measure; give --ssd")
    if machine.disk_from == "given":
        found = speed + SIMULATED
    else:
        found = f"{speed}, 4 MiB pieces of the model's files, 4 threads"
    if machine.disk < SLOW_DISK:
        return Check(name, WARNING, found, "a miss will be slow: use a faster disk or more --expert-memory")
    return Check(name, OK, found)


# The files


def _config(directory: Directory) -> tuple[Check, ModelArgs | None]:
    name = "model.config"
    try:
        args = ModelArgs.from_dict(directory.config)
    except MimoError as error:
        return Check(name, FAILED, str(error), "give a converted directory of MiMo-V2-Flash"), None
    if directory.is_fp8:
        path = directory.path
        hint = f"mlx_mimo convert --hf-path {path} --mlx-path {path.resolve().name}-4bit"
        return Check(name, WARNING, "an FP8 checkpoint, to be converted first", hint), args
    found = f"{args.num_hidden_layers} layers, {args.n_routed_experts} experts in each MoE layer"
    return Check(name, OK, found), args


def _files(directory: Directory) -> Check:
    """Every file that the index names is there, whole, and holds its tensors."""
    name = "model.files"
    for problem in directory.problems():
        return Check(name, FAILED, problem, "run the same mlx_mimo convert again, or fetch the model again")
    nbytes = format_size(sum(directory.header(file).file_bytes for file in directory.files))
    if not directory.has_index:
        return Check(name, OK, f"{len(directory.files)} files without an index, {nbytes}")
    return Check(name, OK, f"{len(directory.files)} files, {len(directory.weight_map):,} tensors, {nbytes}")


def _experts(directory: Directory) -> Check:
    name, files = "model.experts", directory.expert_files
    if not files:
        hint = f"to stream experts: mlx_mimo convert repack {directory.path} --in-place"
        return Check(name, WARNING, "stacked: all experts must fit into memory", hint)
    sizes = sorted({file.layout.nbytes for file in files.values()})
    aligned = all(file.data_offset % ALIGNMENT == 0 for file in files.values())
    found = f"expert-major, {len(files)} layers, {' or '.join(format_size(size) for size in sizes)} an expert"
    return Check(name, OK, found + (", on pages" if aligned else ""))


def _manifest(directory: Directory) -> Check:
    """Every file has the size that the conversion wrote."""
    name = "model.manifest"
    for problem in directory.manifest_problems(deep=False):
        return Check(name, FAILED, problem, "run the same mlx_mimo convert again")
    if directory.manifest is None:
        return Check(name, WARNING, f"no {MANIFEST}: not converted by mlx-mimo", "its files cannot be compared")
    return Check(name, OK, f"{len(directory.manifest.files)} files of the expected size")


def _hashes(directory: Directory) -> Check:
    """Every file has the bytes that the conversion wrote."""
    name = "model.hashes"
    for problem in directory.manifest_problems(deep=True):
        return Check(name, FAILED, problem, "delete the file and run the same mlx_mimo convert again")
    if directory.manifest is None:
        return Check(name, SKIPPED, f"no {MANIFEST} to compare with")
    return Check(name, OK, f"{len(directory.manifest.files)} files, every byte as it was written")


def _tokenizer(directory: Path) -> Check:
    name = "model.tokenizer"
    if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
        return Check(name, FAILED, "no tokenizer.json", "copy the tokenizer's files from the model's repo")
    template = (directory / "chat_template.jinja").exists()
    if not template:
        try:
            fields = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
            template = bool(fields.get("chat_template"))
        except (OSError, ValueError, AttributeError):
            template = False  # chat cannot use a file that cannot be read
    if not template:
        return Check(name, WARNING, "no chat template", "chat and server need one; copy chat_template.jinja")
    return Check(name, OK, "with a chat template")


def _unfinished(directory: Path) -> Check:
    from ..convert.journal import NAME

    left = sorted(path.name for path in (*directory.glob("*.part"), *directory.glob(NAME)))
    if left:
        return Check(
            "model.complete", WARNING, f"{left[0]}: a conversion was interrupted", "run the same mlx_mimo convert again"
        )
    return Check("model.complete", OK, "no interrupted conversion")


# Both together


def _fit(directory: Directory, args: ModelArgs, machine: Machine) -> Iterator[Check]:
    """The checks of how many experts `--expert-memory auto` would keep, and of the speed that plan forecasts."""
    hint = f"what would help: mlx_mimo plan --model {directory.path}, with the same flags for the machine"
    try:
        streamed = directory.is_streamable
        budget = measure(directory, args, usual_context(args), CHUNK, *machine.item_bytes)
    except MimoError:  # the checks of the files say what is wrong
        yield Check("model.memory", SKIPPED, "not known while files are damaged")
        yield Check("model.speed", SKIPPED, "not known while files are damaged")
        return
    try:
        room = fit_on(budget, machine, streamed=streamed)
        found = forecast(args, room.budget, machine, room.expert_bytes, room.chunk)
    except MimoError as error:
        yield Check("model.memory", FAILED, str(error), hint)
        yield Check("model.speed", SKIPPED, "it does not fit")
        return
    yield _resident(args, room.budget, found, hint)
    speed = found.decode_tps
    text = f"decode {speed.expected:.1f} tokens/s expected ({speed.low:.1f}–{speed.high:.1f}), a forecast"
    yield Check("model.speed", WARNING if speed.expected < SLOW_DECODE else OK, text, hint)


def _resident(args: ModelArgs, budget: Budget, found: Forecast, hint: str) -> Check:
    name, wanted = "model.memory", len(args.moe_layers) * args.num_experts_per_tok
    text = (
        f"{found.slots:,} of {budget.num_experts:,} experts resident ({found.share:.0%}), "
        f"{format_size(found.total_bytes)} in all with {budget.context:,} tokens of context"
    )
    if found.slots < wanted:
        return Check(name, WARNING, f"{text}; one token uses {wanted:,}", hint)
    return Check(name, OK, text)
