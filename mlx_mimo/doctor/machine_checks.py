"""The checks of a machine, each a `Check` with a stable id. MLX is imported only where there is Metal or CUDA."""

import os
import platform
import plistlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import device
from ..errors import MimoError, UsageError
from ..planning.backend import backend_and_limits
from ..planning.budget import CHUNK, estimate, item_bytes, usual_context
from ..planning.forecast import fit_on
from ..planning.machine import Given, Machine, imagined, machine_with, working_set
from ..units import format_size

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
LEAST_OPEN_FILES = 256
SMALLEST_RECIPE = "2bit"
SIMULATED = ", simulated"
UNKNOWN = "not known of another machine"
HERE = Given()
# The versions of which tests/server/test_mlx_lm_private.py knows the signatures that the server uses.
MLX_LM_LEAST, MLX_LM_BELOW = "0.32.2", "0.32.3"


@dataclass(frozen=True)
class Check:
    """One line of doctor's output."""

    id: str
    status: str  # OK, WARNING, FAILED or SKIPPED
    found: str
    hint: str = ""  # what to do about it


def machine_checks(given: Given = HERE) -> Iterator[Check]:
    """The checks of this installation, and of this machine or the given one."""
    yield _python()
    yield _package("mlx", "0.32.1", None)
    yield _package("mlx-lm", MLX_LM_LEAST, MLX_LM_BELOW)
    yield _package("transformers", "5.20", "6")
    if given.elsewhere:
        machine = machine_with(given)
        yield Check("backend", OK, machine.backend + SIMULATED)
        yield Check("blas", SKIPPED, UNKNOWN)
        yield _memory(machine.memory, machine.available, machine.backend, SIMULATED)
        yield _simulated_working_set(machine)
        yield Check("limits.buffer", SKIPPED, UNKNOWN)
    else:
        import psutil

        backend, limits, why_none = _backend()
        yield Check("backend", OK, given.backend + SIMULATED) if given.backend else _backend_check(backend, why_none)
        yield _blas(given.backend or backend)
        memory = psutil.virtual_memory()
        free = given.available or memory.available
        yield _memory(memory.total, free, given.backend or backend, SIMULATED if given.available else "")
        yield _working_set(backend, limits)
        yield _buffers(backend, limits)
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


def _backend() -> tuple[str | None, dict[str, Any], str]:
    """(name, limits, why there is none)"""
    try:
        return *backend_and_limits(), ""
    except UsageError as error:
        return None, {}, str(error)
    except (ImportError, RuntimeError):
        return None, {}, "MLX cannot be loaded"


def _backend_check(backend: str | None, why_none: str) -> Check:
    asked = device.asked()
    if backend is None:
        hint = f"unset {device.VARIABLE}" if asked == "gpu" else "pip install --force-reinstall mlx"
        return Check("backend", FAILED, why_none, hint)
    chosen = f", as {device.VARIABLE} says" if asked else ""
    if backend != "cpu":
        return Check("backend", OK, backend + chosen)
    try:
        return Check("backend", OK, f"cpu, kernels by numba {version('numba')}{chosen}")
    except PackageNotFoundError:
        return Check("backend", WARNING, f"cpu without numba: many times slower{chosen}", "pip install 'mlx-mimo[cpu]'")


def _blas(backend: str | None) -> Check:
    """Whether the kernels can keep NumPy's BLAS from taking their cores."""
    if backend != "cpu":
        return Check("blas", SKIPPED, "CPU only")
    try:
        from ..cpu.blas import limitable
    except ImportError:
        return Check("blas", SKIPPED, "without numba nothing limits it")
    if found := limitable():
        return Check("blas", OK, f"{', '.join(found)}: threads are limited while kernels run")
    return Check(
        "blas",
        WARNING,
        f"{numpy_blas()}: a library whose threads cannot be limited while kernels run",
        "before the start, VECLIB_MAXIMUM_THREADS limits Accelerate's",
    )


def numpy_blas() -> str:
    """The name that NumPy's build gives its BLAS."""
    import numpy as np

    return np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]


def _memory(total: int, available: int, backend: str | None, simulated: str) -> Check:
    found = f"{format_size(total)}, {format_size(available)} free{simulated}"
    if not _holds_the_release(total, backend or "cpu"):
        return Check("memory", WARNING, found, "enough for the demo, not for MiMo-V2-Flash: see mlx_mimo plan --all")
    if available < total // 4:
        return Check("memory", WARNING, found, "close other programs: what is free holds experts")
    return Check("memory", OK, found)


def _holds_the_release(total: int, backend: str) -> bool:
    """Whether `plan` finds room for MiMo-V2-Flash with the smallest recipe where little else runs."""
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


def _working_set(backend: str | None, limits: dict[str, Any]) -> Check:
    size = limits.get("max_recommended_working_set_size")
    if backend != "metal" or not size:
        return Check("limits.working_set", SKIPPED, "Metal only")
    return Check("limits.working_set", OK, format_size(size))


def _simulated_working_set(machine: Machine) -> Check:
    if machine.backend != "metal":
        return Check("limits.working_set", SKIPPED, "Metal only")
    return Check("limits.working_set", OK, format_size(working_set(machine.memory)) + SIMULATED)


def _buffers(backend: str | None, limits: dict[str, Any]) -> Check:
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
    """The check of a directory's disk: SSD or hard disk, internal or USB, and what is free on it."""
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


def mac_disk_kind(info: dict[str, Any]) -> str | None:
    """The kind of disk in the output of `diskutil info -plist`; None where it does not say."""
    if "SolidState" not in info:
        return None
    kind = "SSD" if info["SolidState"] else "hard disk"
    return f"{kind} on USB" if info.get("BusProtocol") == "USB" else kind
