"""Expert memory that yields: where other programs want memory the experts give some back, and take it again later."""

import logging
import threading
from collections.abc import Callable

from ...planning.memory import available_memory
from ...units import format_size
from ..engine.worker import Worker

SECONDS = 2.0  # between two looks
LEAST_CHANGE = 16  # a change below this part of all slots is not worth moving them


def wanted_bytes(now: int, least: int, most: int, available: int, floor: int) -> int:
    """What the experts should take, of `now` bytes, while `available` bytes are free.

    Below `floor` they give up what brings half as much again, down to `least`. Above twice the floor they grow towards
    `most` as far as that much stays free, the copy that moving takes included (a quarter of the slots, see
    Banks.resize).
    """
    enough = floor + floor // 2
    if available < floor:
        return min(now, max(least, now - (enough - available)))
    if available > 2 * floor and now < most:
        more = min(most - now, (4 * (available - enough) - now) // 5)
        return now + more if more >= most // LEAST_CHANGE or now + more == most else now
    return now


class Pressure:
    """A thread that looks at free memory and asks the generation thread for another budget of experts.

    `floor` is in bytes; 0 keeps the experts' memory as it is. `available` says how many bytes are free.
    """

    def __init__(self, worker: Worker, floor: int, available: Callable[[], int] = available_memory):
        self.worker = worker
        self.floor = floor
        self.available = available
        self._most = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-pressure", daemon=True)

    def start(self) -> None:
        if self.floor:
            self._thread.start()

    def stop(self) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._left.wait(SECONDS):
            if self.worker.is_healthy:
                self.look()

    def look(self) -> None:
        """One look: asks for another budget where the present one is too large, or could be larger again."""
        residency = None if self.worker.loaded is None else self.worker.loaded.residency
        if residency is None or residency.all_resident:
            return
        counters, available = residency.counters, self.available()
        now = counters.slots * counters.slot_bytes
        self._most = max(self._most, now)
        least = min(now, residency.demand_slots * counters.slot_bytes)
        wanted = wanted_bytes(now, least, self._most, available, self.floor)
        if wanted != now:
            logging.info(
                "%s of memory are free: experts take %s instead of %s",
                *map(format_size, (available, wanted, now)),
            )
            residency.request_resize(wanted)
            self.worker.ask(residency.apply_resize)  # where nothing runs; a run does it before its next token
