"""The memory of this process and of this machine, as the system reports it."""

import platform


def available_memory(working_set: int | None = None, held: int = 0) -> int:
    """Bytes that a model may take: those that are free, and the `held` bytes that it has already.

    `working_set`, Metal's recommended limit for all that a process keeps, bounds it where there is one.
    """
    import psutil

    available: int = psutil.virtual_memory().available + held
    return min(available, working_set) if working_set else available


def peak_memory_bytes() -> int:
    """The most memory that this process has had so far.

    Linux keeps ru_maxrss across an exec, so that a program would begin with the peak of the one that started it;
    /proc/self/status is read there.
    """
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (FileNotFoundError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024
