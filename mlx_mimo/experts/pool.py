"""The cache manager: experts of several layers in the slots of one memory, read when they are missing.

`Residents` says what to read, evict and compute; a pool does it with banks and a reader. Calls come from one thread,
the one that runs the model.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..checkpoint.record import ExpertFile, RecordLayout
from ..errors import MimoError
from .banks import Banks
from .policy import DEFAULT_HALF_LIFE_TOKENS, make_policy
from .reader import Batch, ExpertReader, Request
from .residents import Compute, Need, Read, Residents

PRELOAD_EXPERTS = 32  # read between two looks at the progress callback


@dataclass
class Counters:
    """What residency did so far. An access is one expert that one call of one layer needs, by however many tokens."""

    policy: str = "lfu"
    slots: int = 0
    slot_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0  # wall time during which at least one read was running
    preloaded: int = 0  # experts read on behalf of a profile
    lookahead_reads: int = 0  # experts read on a guess; each used one counts as a hit when it is needed
    lookahead_used: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among accesses; 1.0 before the first."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 1.0


@dataclass
class _Reading:
    """Records of one layer on their way into slots; `guess` is the expert's number where it is one."""

    layer: int
    slots: np.ndarray
    batch: Batch
    guess: int = -1
    settling: bool = field(default=False)


class Pool:
    """`slots` slots shared by the layers of `files`, all of one record layout."""

    def __init__(
        self,
        files: dict[int, ExpertFile],
        slots: int,
        reader: ExpertReader,
        policy: str = "lfu",
        half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS,
        widen: bool = False,
        in_place: bool | None = None,
    ):
        self.layout, self.num_experts = _common(files)
        keys = len(files) * self.num_experts
        self.files = files
        self.reader = reader
        self.residents = Residents(
            list(files), self.num_experts, slots, make_policy(policy, keys, len(files), half_life_tokens)
        )
        self.banks = Banks(self.layout, slots, widen, in_place)
        self.preloaded = self.lookahead_reads = self.lookahead_used = 0
        self._lazy: list[mx.array] = []  # outputs that may not have been computed yet
        self._reading: deque[_Reading] = deque()  # of the call that is served
        self._guesses: list[_Reading] = []
        self._guessed: dict[int, set[int]] = {}  # by layer: experts read on a guess and not asked for since
        self._open = self._guessing = False  # while slots may be promised whose reads nobody has taken over

    @property
    def slots(self) -> int:
        return self.residents.slots

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The banks by tensor name, each (slots, *shape)."""
        return self.banks.arrays

    def slots_of(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Slots of resident experts, in the shape of `experts`."""
        return self.residents.slot_of[experts + self.residents.base[layer]]

    def serve(self, need: Need, split: bool = False, hold: bool = False) -> Iterator[Compute]:
        """Brings the experts of a call into slots and yields what can be computed now; see Residents.schedule.

        Unless a step is the `last`, its outputs must have been evaluated before the next is asked for: its slots may
        be written then. Close the iterator whatever happens (contextlib.closing). Raises MimoError when a record
        cannot be read; residents and counters are then as if its read had not been tried.
        """
        self._evaluate()  # done long since in a model's run: the router that asks now has seen it
        self._begin()
        self._settle_guesses(need)
        if self._guessed:
            self._count_guesses(need.layer, need.experts)
        steps = self.residents.schedule(need, split, hold)
        reading = self._reading
        known = False  # where everything is, whether or not it went well
        try:
            for step in steps:
                if isinstance(step, Read):
                    reading.append(self._read(need.layer, step.experts, step.slots))
                    continue
                for _ in range(step.reads):
                    self._settle(reading[0])
                    reading.popleft()
                yield step
            known = True
        except (MimoError, GeneratorExit):
            known = True
            raise
        finally:
            if not known:
                self._mend()
            for left in reading:
                self._settle(left, quiet=True)
            reading.clear()
            steps.close()
            self._open = False

    def lazily(self, output: mx.array) -> None:
        """`output` may still have to read slots: it is evaluated before a slot is written or another call served."""
        self._lazy.append(output)

    def guess(self, layer: int, experts: np.ndarray) -> None:
        """Reads guessed experts of a layer ahead, only while the reader is idle, evicting only what is worth less.

        Outputs that are computed meanwhile must hold their slots (`serve` with `hold`).
        """
        if not self.reader.idle or self._guesses:
            return
        base = self.residents.base[layer]
        self._guessing = True
        keys, slots = self.residents.guess(experts + base)
        for key, slot in zip(keys, slots):
            batch = self.reader.submit([self._request(layer, int(key - base), int(slot))], background=True)
            self._guesses.append(_Reading(layer, np.array([slot]), batch, int(key - base)))
            self._guessed.setdefault(layer, set()).add(int(key - base))
            self.lookahead_reads += 1
        self._guessing = False

    def preload(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Fills free slots with the experts of highest score; returns how many were read.

        `progress(done, wanted)` is called after each batch; a KeyboardInterrupt ends the preloading, not the program.
        """
        table = self.residents
        absent = np.flatnonzero((table.slot_of < 0) & (table.uses > 0))
        order = absent[np.argsort(-table.policy.score[absent], kind="stable")]
        wanted = order[: self.slots - table.resident]
        done = 0
        try:
            for start in range(0, wanted.size, PRELOAD_EXPERTS):
                keys = wanted[start : start + PRELOAD_EXPERTS]
                self._fill(keys)
                done += keys.size
                self.preloaded += keys.size
                if progress:
                    progress(done, wanted.size)
        except KeyboardInterrupt:
            pass  # what is loaded stays; the rest comes when it is needed
        return done

    def _fill(self, keys: np.ndarray) -> None:
        """Reads absent experts into free slots and waits for them."""
        self._begin()
        table = self.residents
        slots = table.fill(keys)
        readings = [
            self._read(layer, keys[mine] - base, slots[mine])
            for layer, base in table.base.items()
            if (mine := (keys >= base) & (keys < base + self.num_experts)).any()
        ]
        try:
            for reading in readings:
                self._settle(reading, read=False)
        finally:
            for reading in readings:
                self._settle(reading, quiet=True, read=False)
            table.settled(slots)
        self._open = False

    def resize(self, slots: int) -> None:
        """Another number of slots, between calls; those worth most stay. See Banks.resize for the peak."""
        if slots == self.slots == self.banks.slots:
            return
        self._mend()
        self._settle_guesses()
        self._evaluate()
        # An allocation that fails leaves some banks longer than the table, never shorter: the pool stays right, and
        # the same call may be tried again.
        if slots <= self.slots:
            self.banks.move(self.residents.resize(slots))
            self.banks.resize(slots)
        else:
            self.banks.resize(slots)
            self.residents.resize(slots)

    def _begin(self) -> None:
        self._mend()
        self._open = True

    def _mend(self) -> None:
        """Puts in order what an interrupt left of the call before, wherever it struck."""
        if self._open or self._guessing:
            self.reader.drain()
            for reading in self._reading:
                self.residents.drop(reading.slots, read=False)
            self._reading.clear()
            self._guesses.clear()
            self._guessed.clear()
            self.banks.abandon_all()
            self.residents.recover()
            self._open = self._guessing = False

    def _read(self, layer: int, experts: np.ndarray, slots: np.ndarray) -> _Reading:
        self._evaluate()
        requests = [self._request(layer, int(e), int(s)) for e, s in zip(experts, slots)]
        return _Reading(layer, slots, self.reader.submit(requests))

    def _request(self, layer: int, expert: int, slot: int) -> Request:
        return Request(layer, expert, self.banks.buffers(slot))

    def _settle(self, reading: _Reading, quiet: bool = False, read: bool = True) -> None:
        """Waits for the reads; what failed leaves the table. Raises the first error unless `quiet`."""
        errors = reading.batch.wait()
        if reading.slots.size == 0:
            return
        if reading.settling:  # an interrupt came in the middle of this: trust none of it
            good, bad = reading.slots[:0], reading.slots
        else:
            failed = np.array([error is not None for error in errors])
            good, bad = reading.slots[~failed], reading.slots[failed]
        reading.settling = True
        self.banks.landed(good)
        if bad.size:
            self.banks.abandon(bad)
            self.residents.drop(bad, read)
        reading.slots = reading.slots[:0]
        first = next((error for error in errors if error is not None), None)
        if first is not None and not quiet:
            raise first

    def _settle_guesses(self, need: Need | None = None) -> None:
        """Waits for the guesses that `need` wants, or for all where it may want their slots; others read on."""
        some = need is not None and need.together and need.experts.size + len(self._guesses) <= self.slots
        left = []
        while self._guesses:
            reading = self._guesses[0]
            if some and not reading.batch.done and (reading.layer != need.layer or reading.guess not in need.experts):
                left.append(reading)
            else:
                slots = reading.slots
                self._settle(reading, quiet=True, read=False)
                self.residents.settled(slots)
            self._guesses.pop(0)
        self._guesses = left

    def _count_guesses(self, layer: int, experts: np.ndarray) -> None:
        guessed = self._guessed.pop(layer, None)
        if guessed:
            resident = self.slots_of(layer, experts) >= 0
            self.lookahead_used += len(guessed.intersection(experts[resident].tolist()))

    def _evaluate(self) -> None:
        if self._lazy:
            mx.eval(self._lazy)
            self._lazy = []


def _common(files: dict[int, ExpertFile]) -> tuple[RecordLayout, int]:
    """The layout and number of experts that all files share."""
    if not files:
        raise ValueError("a pool for no layer")
    first = next(iter(files.values()))
    for file in files.values():
        if file.layout != first.layout or file.num_experts != first.num_experts:
            raise ValueError(f"{file.path.name} and {first.path.name} differ in shape and cannot share a pool")
    return first.layout, first.num_experts


def group_by_shape(files: dict[int, ExpertFile]) -> list[dict[int, ExpertFile]]:
    """The files that can share a pool, each group in layer order."""
    groups: dict[tuple, dict[int, ExpertFile]] = {}
    for layer, file in sorted(files.items()):
        groups.setdefault((file.layout, file.num_experts), {})[layer] = file
    return list(groups.values())


def divide(budget_bytes: int, slot_bytes: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Slots for each pool: the budget in proportion to the bytes of all its experts, one slot at least, all at most."""
    totals = [size * count for size, count in zip(slot_bytes, experts)]
    if budget_bytes >= sum(totals):
        return list(experts)
    shares = [budget_bytes * total // sum(totals) for total in totals]
    return [min(count, max(1, share // size)) for share, size, count in zip(shares, slot_bytes, experts)]
