"""A slower disk: positional reads held back to a given speed."""

import os
import threading
import time
from collections.abc import Sequence


class Throttle:
    """Replaces `os.preadv`: all threads together read at most `bytes_per_second`."""

    def __init__(self, bytes_per_second: float):
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the slower disk would have finished all reads so far

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        began = time.perf_counter()
        count = os.preadv(fd, buffers, offset)
        with self._lock:
            self._free_at = max(self._free_at, began) + count / self.bytes_per_second
            wait = self._free_at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        return count
