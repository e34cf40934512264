"""What `doctor` looks at on a machine: each check gives one `Check` with a stable id. MLX is loaded only where Metal or
CUDA is."""

import os
import platform
import plistlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import MimoError
from ..planning.backend import backend_and_limits
from ..planning.budget import CHUNK, estimate, item_bytes, usual_context
from ..planning.forecast import fit_on
from ..planning.machine import Given, Machine, imagined, machine_with, working_set
from ..units import format_size

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
LEAST_OPEN_FILES = 256
SMALLEST_RECIPE = "2bit"
SIMULATED = ", simulated"
HERE = Given()
# The versions of which tests/server/test_mlx_lm_private.py knows the signatures that the server uses.
MLX_LM_LEAST, MLX_LM_BELOW = "0.32.2", "0.32.3"


@dataclass(frozen=True)
class Check:
    id: str
    status: str
    found: str
    hint: str = ""


def machine_checks(given: Given = HERE) -> Iterator[Check]:
    """This installation, and this machine or the one that is described."""
    yield _python()
    yield _package("mlx", "0.32.1", None)
    yield _package("mlx-lm", MLX_LM_LEAST, MLX_LM_BELOW)
    yield _package("transformers", "5.20", "6")
    if given.elsewhere:
        machine = machine_with(given)
        backend, limits = machine.backend, {}
        yield Check("backend", OK, backend + SIMULATED)
        yield _memory(machine.memory, machine.available, backend, SIMULATED)
        yield _simulated_working_set(machine)
    else:
        import psutil

        backend, limits = _backend()
        yield Check("backend", OK, given.backend + SIMULATED) if given.backend else _backend_check(backend)
        memory = psutil.virtual_memory()
        free = given.available or memory.available
        yield _memory(memory.total, free, given.backend or backend, SIMULATED if given.available else "")
        yield _working_set(backend, limits)
    yield (
        Check("limits.buffer", SKIPPED, "not known of another machine")
        if given.elsewhere
        else _buffers(backend, limits)
    )
    yield _open_files()


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


def _memory(total: int, available: int, backend: str | None, simulated: str) -> Check:
    found = f"{format_size(total)}, {format_size(available)} free{simulated}"
    if not _holds_the_release(total, backend or "cpu"):
        return Check("memory", WARNING, found, "enough for the demo, not for MiMo-V2-Flash: see mlx_mimo plan --all")
    if available < total // 4:
        return Check("memory", WARNING, found, "close other programs: what is free holds experts")
    return Check("memory", OK, found)


def _holds_the_release(total: int, backend: str) -> bool:
    """Whether plan finds room for MiMo-V2-Flash at the smallest recipe where little else runs."""
    from ..checkpoint.recipe import named
    from ..config import released
    from ..config.model_args import ModelArgs

    args = ModelArgs.from_dict(released.CONFIG)
    sizes = (args, usual_context(args), CHUNK, *item_bytes(backend == "cpu"))
    try:
        fit_on(estimate(released.CONFIG, named(SMALLEST_RECIPE), *sizes), imagined("", total, backend=backend))
    except MimoError:
        return False
    return True


def _working_set(backend: str | None, limits: dict) -> Check:
    size = limits.get("max_recommended_working_set_size")
    if backend != "metal" or not size:
        return Check("limits.working_set", SKIPPED, "Metal only")
    return Check("limits.working_set", OK, format_size(size))


def _simulated_working_set(machine: Machine) -> Check:
    if machine.backend != "metal":
        return Check("limits.working_set", SKIPPED, "Metal only")
    return Check("limits.working_set", OK, format_size(working_set(machine.memory)) + SIMULATED)


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
