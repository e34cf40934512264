"""What `doctor` looks at in a model directory: its disk, its files, and what they would do on a machine.

Each header is read once, whatever many checks ask for it: of the released model that is most of the time.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from ..checkpoint.bridge_line import sha256, size
from ..checkpoint.header import Header, read_header
from ..checkpoint.record import ExpertFile, expert_file_of
from ..config.model_args import ModelArgs
from ..errors import MimoError
from ..planning.budget import CHUNK, Budget, budget_of, usual_context
from ..planning.forecast import Forecast, fit_on, forecast
from ..planning.machine import Given, Machine, machine_with
from ..units import GB, format_size
from .machine_checks import FAILED, HERE, OK, SIMULATED, SKIPPED, WARNING, Check, disk_kind

SLOW_DISK = 1.0 * GB  # bytes a second
SLOW_DECODE = 1.0  # tokens a second


class Headers:
    """The headers of a directory's files, each read when it is first asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._read: dict[str, Header] = {}

    def __getitem__(self, name: str) -> Header:
        if name not in self._read:
            self._read[name] = read_header(self.directory / name)
        return self._read[name]

    def weights(self) -> list[Header]:
        return [self[path.name] for path in sorted(self.directory.glob("model*.safetensors"))]

    @cached_property
    def experts(self) -> dict[int, ExpertFile]:
        """{layer: its file}, checked against the format of records; empty where experts are stacked."""
        layers = {
            int(match[1]): path.name
            for path in self.directory.glob("model-experts-*.safetensors")
            if (match := re.fullmatch(r"model-experts-(\d+)\.safetensors", path.name))
        }
        return {layer: expert_file_of(self[name], layer) for layer, name in sorted(layers.items())}

    def budget(self, args: ModelArgs, *item_bytes: int) -> Budget:
        """What loading would take, as `budget.measure` counts it."""
        many = {file.path.name: file.num_experts for file in self.experts.values()}
        tensors = []
        for header in self.weights():
            name = header.path.name
            if name in many:  # its experts are alike, as was checked
                tensors += ((e, many[name]) for e in header.tensors.values() if ".mlp.experts.0." in e.name)
            elif not name.startswith("model-mtp"):
                tensors += ((entry, 1) for entry in header.tensors.values())
        return budget_of(tensors, args, usual_context(args), CHUNK, *item_bytes)


def directory_checks(directory: Path, deep: bool, given: Given = HERE) -> Iterator[Check]:
    """The directory's disk, then its files, then what they would do here. `deep` reads every byte."""
    machine = _machine(directory, given)
    simulated = given.elsewhere or given.disk is not None
    yield Check("disk.kind", SKIPPED, "of another machine") if simulated else disk_kind(directory)
    yield _disk_speed(machine)
    config, args = _config(directory)
    yield config
    if args is None:
        return
    headers = Headers(directory)
    yield _guarded("model.files", lambda: _index(headers))
    yield _guarded("model.experts", lambda: _experts(headers))
    yield _guarded("model.manifest", lambda: _manifest(directory))
    yield _tokenizer(directory)
    yield _unfinished(directory)
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
    yield from _fit(headers, args, machine)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except MimoError as error:
        return Check(name, FAILED, str(error), "run the same mlx_mimo convert again to mend it")


def _machine(directory: Path, given: Given) -> Machine | None:
    """The machine the directory is for, its disk measured on the directory; None where MLX cannot be loaded."""
    try:
        return machine_with(given, sorted(directory.glob("model*.safetensors")))
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


def _config(directory: Path) -> tuple[Check, ModelArgs | None]:
    from ..checkpoint.directory import Directory, read_config

    name = "model.config"
    try:
        config = read_config(directory)
        args = ModelArgs.from_dict(config)
    except MimoError as error:
        return Check(name, FAILED, str(error), "give a converted directory of MiMo-V2-Flash"), None
    if Directory(directory, config).is_fp8:
        hint = f"mlx_mimo convert --hf-path {directory} --mlx-path {directory.resolve().name}-4bit"
        return Check(name, WARNING, "an FP8 checkpoint, to be converted first", hint), args
    found = f"{args.num_hidden_layers} layers, {args.n_routed_experts} experts in each MoE layer"
    return Check(name, OK, found), args


def _index(headers: Headers) -> Check:
    """Every file that the index names is there, whole, and holds its tensors."""
    name, index = "model.files", headers.directory / "model.safetensors.index.json"
    if not index.exists():
        files = headers.weights()
        if not files:
            return Check(name, FAILED, "no model*.safetensors", "run mlx_mimo convert, or fetch the model again")
        nbytes = sum(header.file_bytes for header in files)
        return Check(name, OK, f"{len(files)} files without an index, {format_size(nbytes)}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            wanted.setdefault(_text(file), set()).add(tensor)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return Check(name, FAILED, f"{index.name}: not an index ({error!r})", "run mlx_mimo convert again")
    nbytes = 0
    for file, names in sorted(wanted.items()):
        header = headers[file]
        nbytes += header.file_bytes
        absent = names - header.tensors.keys()
        if absent:
            return Check(name, FAILED, f"{file}: {min(absent)} is missing", "run the same mlx_mimo convert again")
    return Check(name, OK, f"{len(wanted)} files, {len(weight_map):,} tensors, {format_size(nbytes)}")


def _text(file) -> str:
    if not isinstance(file, str):
        raise TypeError(f"{file!r} is no file's name")
    return file


def _experts(headers: Headers) -> Check:
    name, files = "model.experts", headers.experts
    if not files:
        hint = f"to stream experts: mlx_mimo convert repack {headers.directory} --in-place"
        return Check(name, WARNING, "stacked: all experts must fit into memory", hint)
    sizes = sorted({file.layout.nbytes for file in files.values()})
    aligned = all(file.data_offset % 16384 == 0 for file in files.values())
    found = f"expert-major, {len(files)} layers, {' or '.join(format_size(size) for size in sizes)} an expert"
    return Check(name, OK, found + (", on pages" if aligned else ""))


def _manifest_of(directory: Path) -> dict | None:
    try:
        fields = json.loads((directory / "mlx_mimo.json").read_text(encoding="utf-8"))
        return {file: (int(row["bytes"]), str(row["sha256"])) for file, row in fields["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MimoError(f"mlx_mimo.json: not a manifest ({error!r})") from None


def _manifest(directory: Path) -> Check:
    """The sizes of all files as the conversion left them."""
    name, files = "model.manifest", _manifest_of(directory)
    if files is None:
        return Check(name, WARNING, "no mlx_mimo.json: not converted by mlx-mimo", "its files cannot be compared")
    for file, (nbytes, _) in files.items():
        path = directory / file
        found = size(path) if path.exists() else 0
        if found != nbytes:
            return Check(
                name,
                FAILED,
                f"{file}: {nbytes:,} bytes expected, {found:,} found",
                "run the same mlx_mimo convert again",
            )
    return Check(name, OK, f"{len(files)} files of the expected size")


def _hashes(directory: Path) -> Check:
    name, files = "model.hashes", _manifest_of(directory)
    if files is None:
        return Check(name, SKIPPED, "no mlx_mimo.json to compare with")
    for file, (_, expected) in files.items():
        try:
            found = sha256(directory / file)
        except OSError as error:
            return Check(name, FAILED, f"{file}: {error.strerror}", "run the same mlx_mimo convert again")
        if found != expected:
            return Check(name, FAILED, f"{file}: other bytes than were written", "delete the file and convert again")
    return Check(name, OK, f"{len(files)} files, every byte as it was written")


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
            template = False  # unreadable is as good as none: chat cannot use it
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


def _fit(headers: Headers, args: ModelArgs, machine: Machine) -> Iterator[Check]:
    """How many experts `--expert-memory auto` would keep, and how fast that would be."""
    hint = f"what would help: mlx_mimo plan --model {headers.directory}, with the same flags for the machine"
    try:
        streamed, budget = bool(headers.experts), headers.budget(args, *machine.item_bytes)
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
