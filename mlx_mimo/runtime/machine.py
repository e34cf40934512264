"""What a machine has: memory, limits, speeds. This one as the system tells, or another one by its numbers.

MLX is asked only on a Mac or where its CUDA build is installed, for the device and its limits; everything else comes
from the system.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from .. import device
from ..errors import UsageError
from .budget import GB, ItemBytes, available_memory, format_size, item_bytes

GIB = 2**30
ASSUMED_DISK = 3.0 * GB  # bytes a second, where nothing was measured
SYSTEM_BYTES = 3 * GIB  # what macOS and a few programs take on a machine that is only imagined
# Memory bandwidth in GB/s by chip, as Apple gives it; the larger where there are two.
CHIP_BANDWIDTH = {
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    "M5": 153, "M5 Pro": 307, "M5 Max": 614,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Bytes, and bytes a second."""

    name: str
    backend: str  # metal, cuda or cpu
    memory: int
    available: int  # free now, at most Metal's working set
    disk: float
    disk_from: str  # measured, given, typical or assumed
    bandwidth: float
    bandwidth_from: str

    @property
    def item_bytes(self) -> ItemBytes:
        """Of an activation, and of what is stored in 16 bits. Another machine is thought to have the CPU kernels if
        this one has."""
        return item_bytes(self.backend == "cpu")


@dataclass(frozen=True)
class Given:
    """What is said of a machine on the command line; None is what this one has."""

    memory: int | None = None
    available: int | None = None
    disk: float | None = None
    bandwidth: float | None = None
    backend: str | None = None

    @property
    def elsewhere(self) -> bool:
        """With other memory it is another machine: nothing of this one says anything about it."""
        return self.memory is not None


def working_set(memory: int) -> int:
    """Metal's recommended working set, as Macs of that memory report it: two thirds, three quarters above 36 GiB."""
    return memory * 2 // 3 if memory <= 36 * GIB else memory * 3 // 4


def imagined(
    name: str,
    memory: int,
    disk: float | None = None,
    bandwidth: float | None = None,
    available: int | None = None,
    backend: str = "metal",
    origin: str = "given",
) -> Machine:
    """A machine by its numbers; what is left out is assumed."""
    if available is None:
        available = max(memory // 2, memory - SYSTEM_BYTES)
        if backend == "metal":
            available = min(available, working_set(memory))
    return Machine(
        name,
        backend,
        memory,
        available,
        disk or ASSUMED_DISK,
        origin if disk else "assumed",
        bandwidth or (200.0 if backend == "metal" else 30.0) * GB,
        origin if bandwidth else "assumed",
    )


def _mac(name: str, gib: int, disk: float) -> Machine:
    chip = " ".join(word for word in name.split() if word in ("Pro", "Max", "Ultra") or word[1:].isdigit())
    chip = chip.removeprefix("Pro ") if name.startswith("MacBook Pro") else chip
    return imagined(f"{name} {gib} GB", gib * GIB, disk * GB, CHIP_BANDWIDTH[chip] * GB, origin="typical")


# Disk speeds are what users report for large reads on the internal SSD, in GB/s.
MACS: Sequence[Machine] = (
    _mac("MacBook Air M2", 16, 2.5),
    _mac("MacBook Air M3", 24, 2.8),
    _mac("MacBook Air M4", 32, 2.9),
    _mac("MacBook Pro M5", 32, 6.0),
    _mac("MacBook Pro M3 Pro", 36, 5.0),
    _mac("Mac mini M4 Pro", 48, 6.0),
    _mac("MacBook Pro M5 Pro", 48, 17.0),
    _mac("MacBook Pro M1 Max", 64, 5.5),
    _mac("Mac mini M4 Pro", 64, 6.0),
    _mac("MacBook Pro M5 Pro", 64, 17.0),
    _mac("MacBook Pro M2 Max", 96, 6.0),
    _mac("MacBook Pro M3 Max", 128, 6.5),
    _mac("MacBook Pro M4 Max", 128, 7.0),
    _mac("MacBook Pro M5 Max", 128, 17.0),
    _mac("Mac Studio M2 Ultra", 192, 6.5),
    _mac("Mac Studio M3 Ultra", 256, 7.0),
    _mac("Mac Studio M3 Ultra", 512, 7.0),
)


def this_machine(files: Sequence[Path] = ()) -> Machine:
    """The machine this runs on; its disk is measured for a fraction of a second on `files`, where there are any."""
    import psutil

    memory = psutil.virtual_memory()
    backend, limits = backend_and_limits()
    available = available_memory(limits.get("max_recommended_working_set_size"))
    disk = read_speed(files) if files else None
    chip = chip_name()
    known = CHIP_BANDWIDTH.get(chip.removeprefix("Apple "))
    return Machine(
        f"this machine ({chip})",
        backend,
        memory.total,
        available,
        disk or ASSUMED_DISK,
        "measured" if disk else "assumed",
        known * GB if known else copy_speed(),
        "typical" if known else "measured",
    )


def machine_with(given: Given, files: Sequence[Path] = ()) -> Machine:
    """The machine that is described, else this one; its disk is measured on `files` unless it is given.

    Raises UsageError where more is free than there is.
    """
    if given.elsewhere:
        _check_free(given.available, given.memory)
        name = f"a machine of {format_size(given.memory)}"
        backend = given.backend or "metal"
        return imagined(name, given.memory, given.disk, given.bandwidth, given.available, backend)
    machine = this_machine(() if given.disk else files)
    _check_free(given.available, machine.memory)
    changes = {name: getattr(given, name) for name in ("available", "disk", "bandwidth", "backend")}
    changes |= {f"{name}_from": "given" for name in ("disk", "bandwidth") if changes[name]}
    return replace(machine, **{name: value for name, value in changes.items() if value is not None})


def _check_free(available: int | None, memory: int) -> None:
    if available is not None and available > memory:
        raise UsageError(
            f"--available: {format_size(available)} of {format_size(memory)} of memory cannot be free; at most "
            "--memory expected"
        )


def backend_and_limits() -> tuple[str, dict]:
    """("metal", MLX's device information) on a Mac; ("cpu", {}) or ("cuda", …) elsewhere, or where the environment
    chooses the CPU. Raises UsageError where it chooses a GPU and there is none.
    """
    asked = device.asked()
    if asked == "cpu":
        return "cpu", {}
    if platform.system() != "Darwin" and not _cuda_wheel():
        if asked == "gpu":
            raise UsageError(device.NO_GPU)
        return "cpu", {}
    import mlx.core as mx

    device.choose()
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu", {}
    return ("metal" if mx.metal.is_available() else "cuda"), mx.device_info()


def _cuda_wheel() -> bool:
    # By the folders' names: importlib.metadata would read a file of every package that is installed.
    return any(
        name.startswith("mlx_cuda") and name.endswith("-info")
        for path in sys.path
        if os.path.isdir(path)
        for name in os.listdir(path)
    )


def chip_name() -> str:
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "Mac"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def peak_memory_bytes() -> int:
    """The most memory that this process had so far.

    Linux keeps ru_maxrss across an exec, so there a program begins with the peak of the one that started it.
    """
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (FileNotFoundError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def copy_speed(nbytes: int = 1 << 26, repeats: int = 3) -> float:
    """Bytes a second that all cores together read and write when they copy, the median: a lower bound of the memory's
    bandwidth."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    cores = os.cpu_count() or 1
    sources, targets = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    pieces = list(zip(np.array_split(targets, cores), np.array_split(sources, cores)))
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            list(pool.map(lambda piece: np.copyto(*piece), pieces))
            seconds.append(time.perf_counter() - began)
    return 2 * nbytes / median(seconds[1:])  # the first touches the pages, which costs more than the copy


def read_speed(files: Sequence[Path], seconds: float = 0.15, piece: int = 1 << 22, threads: int = 4) -> float | None:
    """Bytes a second of parallel reads from `files`, past the page cache where the system allows it.

    None where there is too little to measure, or nothing that can be read. Stops after `seconds`; each thread reads one
    piece at least.
    """
    from concurrent.futures import ThreadPoolExecutor

    work = [(file, start) for file in files for start in range(0, max(0, _size_of(file) - piece + 1), piece)]
    if not work:
        return None
    stride = max(1, len(work) // 1024)  # spread over the files, as experts are
    began = time.perf_counter()
    end = began + seconds

    def read(mine: list) -> int:
        done, buffer = 0, bytearray(piece)
        for file, start in mine:
            if done and time.perf_counter() > end:  # a busy machine may not come here any sooner
                break
            try:
                done += _read_past_cache(file, start, buffer)
            except OSError:
                break  # what is wrong with a file, doctor's checks and loading say
        return done

    pieces = work[::stride]
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, [pieces[i::threads] for i in range(threads)]))
    return total / (time.perf_counter() - began) if total else None


def _size_of(path: Path) -> int:
    """0 for a link that leads nowhere or a file that may not be opened: such a file says nothing of the disk."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError:
        return 0


def _read_past_cache(path: Path, start: int, buffer: bytearray) -> int:
    handle = os.open(path, os.O_RDONLY)
    try:
        if platform.system() == "Darwin":
            import fcntl

            fcntl.fcntl(handle, 48, 1)  # F_NOCACHE
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, start, len(buffer), os.POSIX_FADV_DONTNEED)
        return os.preadv(handle, [buffer], start)
    finally:
        os.close(handle)
