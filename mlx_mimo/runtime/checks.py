"""What `doctor` looks at: each check gives one `Check` with a stable id. MLX is loaded only where Metal or CUDA is."""

import hashlib
import json
import os
import platform
import plistlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import MimoError
from ..experts.header import read_header
from ..experts.record import expert_files
from ..models.config import ModelArgs
from .budget import GB, format_size
from .machine import backend_and_limits, read_speed

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
LEAST_MEMORY = 16 * GB  # below this not even the trunk and the caches of the released model fit
SLOW_DISK = 1.0 * GB  # bytes a second
LEAST_OPEN_FILES = 256


@dataclass(frozen=True)
class Check:
    id: str
    status: str
    found: str
    hint: str = ""


def machine_checks() -> Iterator[Check]:
    yield _python()
    yield _package("mlx", "0.32.1", None)
    yield _package("mlx-lm", "0.32.2", "0.33")
    yield _package("transformers", "5.20", "6")
    backend, limits = _backend()
    yield _backend_check(backend)
    yield _memory()
    yield _working_set(backend, limits)
    yield _buffers(backend, limits)
    yield _open_files()


def directory_checks(directory: Path, deep: bool) -> Iterator[Check]:
    """The directory's disk, then its files. `deep` reads every byte."""
    yield disk_kind(directory)
    yield _disk_speed(directory)
    config = _config(directory)
    yield config
    if config.status == FAILED:
        return
    yield _guarded("model.files", lambda: _index(directory))
    yield _guarded("model.experts", lambda: _experts(directory))
    yield _guarded("model.manifest", lambda: _manifest(directory))
    yield _tokenizer(directory)
    yield _unfinished(directory)
    yield (
        _guarded("model.hashes", lambda: _hashes(directory))
        if deep
        else Check("model.hashes", SKIPPED, "not read", "give --deep to read and compare every byte")
    )


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except MimoError as error:
        return Check(name, FAILED, str(error), "run the same mlx_mimo convert again to mend it")


# The machine


def _python() -> Check:
    return Check("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _package(name: str, least: str, below: str | None) -> Check:
    wanted = f"{name}>={least}" + (f",<{below}" if below else "")
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, FAILED, "not installed", f"pip install '{wanted}'")
    if _numbers(found) < _numbers(least) or (below and _numbers(found) >= _numbers(below)):
        return Check(name, FAILED, found, f"pip install '{wanted}'")
    return Check(name, OK, found)


def _backend() -> tuple[str | None, dict]:
    try:
        return backend_and_limits()
    except (ImportError, RuntimeError):
        return None, {}


def _backend_check(backend: str | None) -> Check:
    if backend is None:
        return Check("backend", FAILED, "MLX cannot be loaded", "pip install --force-reinstall mlx")
    if backend != "cpu":
        return Check("backend", OK, backend)
    try:
        return Check("backend", OK, f"cpu, kernels by numba {version('numba')}")
    except PackageNotFoundError:
        return Check("backend", WARNING, "cpu without numba: many times slower", "pip install 'mlx-mimo[cpu]'")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{format_size(memory.total)}, {format_size(memory.available)} free"
    if memory.total < LEAST_MEMORY:
        return Check("memory", WARNING, found, "enough for the demo, not for MiMo-V2-Flash: see mlx_mimo plan --all")
    if memory.available < memory.total // 4:
        return Check("memory", WARNING, found, "close other programs: what is free holds experts")
    return Check("memory", OK, found)


def _working_set(backend: str | None, limits: dict) -> Check:
    size = limits.get("max_recommended_working_set_size")
    if backend != "metal" or not size:
        return Check("limits.working_set", SKIPPED, "Metal only")
    return Check("limits.working_set", OK, format_size(size))


def _buffers(backend: str | None, limits: dict) -> Check:
    size = limits.get("max_buffer_length")
    if backend != "metal" or not size:
        return Check("limits.buffer", SKIPPED, "Metal only")
    return Check("limits.buffer", OK, f"{format_size(size)} a buffer")


def _open_files() -> Check:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        return Check("limits.files", WARNING, f"{soft} open files", f"ulimit -n {LEAST_OPEN_FILES}")
    return Check(
        "limits.files", OK, "no limit of open files" if soft == resource.RLIM_INFINITY else f"{soft} open files"
    )


# The disk


def disk_kind(directory: Path) -> Check:
    """SSD or hard disk, internal or USB, and what is free on it."""
    name = "disk.kind"
    try:
        free = format_size(shutil.disk_usage(directory).free)
        kind = _mac_disk(directory) if platform.system() == "Darwin" else _linux_disk(directory)
    except (OSError, subprocess.SubprocessError, plistlib.InvalidFileException) as error:
        return Check(name, SKIPPED, f"not known ({error})")
    found = f"{kind or 'not known'}, {free} free"
    if kind and "USB" in kind:
        return Check(name, WARNING, found, "experts are read all the time: use the internal disk")
    if kind and "hard disk" in kind:
        return Check(name, WARNING, found, "experts are read in random order: use an SSD")
    return Check(name, OK if kind else SKIPPED, found)


def _linux_disk(directory: Path) -> str | None:
    number = os.stat(directory).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        return None  # a network or layered file system
    device = device.resolve()
    rotational = next(
        (p for p in (device / "queue/rotational", device.parent / "queue/rotational") if p.exists()), None
    )
    if rotational is None:
        return None
    kind = "hard disk" if rotational.read_text().strip() == "1" else "SSD"
    return f"{kind} on USB" if "/usb" in str(device) else kind


def _mac_disk(directory: Path) -> str | None:
    command = ["/usr/sbin/diskutil", "info", "-plist", _device_of(directory)]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=5)
    return mac_disk_kind(plistlib.loads(answer.stdout))


def _device_of(directory: Path) -> str:
    answer = subprocess.run(["/bin/df", str(directory)], capture_output=True, check=True, timeout=5)
    return answer.stdout.decode().splitlines()[-1].split()[0]


def mac_disk_kind(info: dict) -> str | None:
    """From what `diskutil info -plist` says."""
    if "SolidState" not in info:
        return None
    kind = "SSD" if info["SolidState"] else "hard disk"
    return f"{kind} on USB" if info.get("BusProtocol") == "USB" else kind


def _disk_speed(directory: Path) -> Check:
    files = sorted(directory.glob("model*.safetensors"))
    speed = read_speed(files, seconds=0.15)
    if speed is None:
        return Check("disk.speed", SKIPPED, "the files are too small to measure")
    found = f"{format_size(int(speed))}/s, 4 MiB pieces of the model's files, 4 threads"
    if speed < SLOW_DISK:
        return Check("disk.speed", WARNING, found, "a miss will be slow: use a faster disk or more --expert-memory")
    return Check("disk.speed", OK, found)


# The files


def _config(directory: Path) -> Check:
    from .source import Directory, read_config

    try:
        config = read_config(directory)
        args = ModelArgs.from_dict(config)
    except MimoError as error:
        return Check("model.config", FAILED, str(error), "give a converted directory of MiMo-V2-Flash")
    if Directory(directory, config).is_fp8:
        hint = f"mlx_mimo convert --hf-path {directory} --mlx-path {directory.resolve().name}-4bit"
        return Check("model.config", WARNING, "an FP8 checkpoint, to be converted first", hint)
    return Check(
        "model.config", OK, f"{args.num_hidden_layers} layers, {args.n_routed_experts} experts in each MoE layer"
    )


def _index(directory: Path) -> Check:
    """Every file that the index names is there, whole, and holds its tensors."""
    name, index = "model.files", directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            return Check(name, FAILED, "no model*.safetensors", "run mlx_mimo convert, or fetch the model again")
        nbytes = sum(read_header(file).file_bytes for file in files)
        return Check(name, OK, f"{len(files)} files without an index, {format_size(nbytes)}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            wanted.setdefault(file, set()).add(tensor)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return Check(name, FAILED, f"{index.name}: not an index ({error!r})", "run mlx_mimo convert again")
    nbytes = 0
    for file, names in sorted(wanted.items()):
        header = read_header(directory / file)
        nbytes += header.file_bytes
        absent = names - header.tensors.keys()
        if absent:
            return Check(name, FAILED, f"{file}: {min(absent)} is missing", "run the same mlx_mimo convert again")
    return Check(name, OK, f"{len(wanted)} files, {len(weight_map):,} tensors, {format_size(nbytes)}")


def _experts(directory: Path) -> Check:
    name, files = "model.experts", expert_files(directory)
    if not files:
        hint = f"to stream experts: mlx_mimo convert repack {directory} --in-place"
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
        found = path.stat().st_size if path.exists() else 0
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
            with open(directory / file, "rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
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
