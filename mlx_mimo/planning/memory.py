"""Memory of this process and this machine, as the system tells."""

import platform


def available_memory(working_set: int | None = None, held: int = 0) -> int:
    """Bytes that a model may take: what is free, and the `held` bytes that it has already, at most `working_set`,
    Metal's recommended limit for all that a process keeps, where there is one."""
    import psutil

    available = psutil.virtual_memory().available + held
    return min(available, working_set) if working_set else available


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
