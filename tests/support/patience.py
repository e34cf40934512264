"""How long a test waits for what must happen: it ends when the thing has happened, however slow or busy the machine."""

import threading
import time
from collections.abc import Callable

DEADLINE = 300.0  # seconds; only a test that fails takes them


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether it came true before the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


class Clock:
    """Stands in for the module `time`: it goes on by what is slept, and by nothing else."""

    def __init__(self):
        self._now = 0.0
        self._lock = threading.Lock()

    def perf_counter(self) -> float:
        return self._now

    def thread_time(self) -> float:
        """No processor time passes: whoever sleeps uses none."""
        return 0.0

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds


class ClockOfEachThread(threading.local):
    """The same, and a thread's time goes on by its own sleep only: as if all slept at once."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
