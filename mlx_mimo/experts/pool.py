"""A cache of experts: those of several layers share the slots of one memory and are read when they are missing.

`Residents` decides what to read, evict and compute; a pool does it with banks and a reader. Only the thread that runs
the model may call it.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..checkpoint.record import ExpertFile, RecordLayout
from ..errors import MimoError
from .banks import Banks
from .policy import DEFAULT_HALF_LIFE_TOKENS, make_policy
from .reader import ExpertReader, ReadBatch, ReadRequest
from .residents import ComputeStep, Need, ReadStep, Residents

PRELOAD_EXPERTS = 32  # read between two calls of `progress`


@dataclass
class Counters:
    """What residency did so far. An access is one expert that one call of one layer needs, for any number of tokens."""

    policy: str = "lfu"
    slots: int = 0
    slot_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0  # wall time during which at least one read was running
    preloaded: int = 0  # experts read because a profile named them
    lookahead_reads: int = 0  # experts read on a guess; one that is used counts as a hit
    lookahead_used: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among accesses; 1.0 before the first."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 1.0


@dataclass
class _Reading:
    """Records of one layer that are being read into slots."""

    layer: int
    slots: np.ndarray
    batch: ReadBatch
    guess: int = -1  # the expert's number, where it is read on a guess
    settling: bool = field(default=False)  # whether `_settle` has begun to take the result over


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
        self._open = self._guessing = False  # True while an interrupt may leave slots whose reads are not accounted for

    @property
    def slots(self) -> int:
        return self.residents.slots

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The banks by tensor name, each (slots, *shape)."""
        return self.banks.arrays

    def slots_of(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """The slots of `experts`, in their shape; -1 for one that is not resident."""
        slots: np.ndarray = self.residents.slot_of[experts + self.residents.base[layer]]
        return slots

    def serve(self, need: Need, hits_first: bool = False, hold: bool = False) -> Generator[ComputeStep, None, None]:
        """Brings the experts of a call into slots, and yields each step that can be computed; see Residents.schedule.

        Before asking for the next step the caller must evaluate this step's outputs, since its slots may be written
        then; the `last` step's may stay lazy (see `lazily`). The caller must close the generator whatever happens
        (contextlib.closing). Raises MimoError when a record cannot be read; residents and counters are then as if its
        read had not been tried.
        """
        self._evaluate()  # costs nothing in a model's run: the router's input was computed from these outputs
        self._begin()
        self._settle_guesses(need)
        if self._guessed:
            self._count_guesses(need.layer, need.experts)
        steps = self.residents.schedule(need, hits_first, hold)
        reading = self._reading
        known = False  # whether every read is accounted for; an interrupt leaves it False
        try:
            for step in steps:
                if isinstance(step, ReadStep):
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
        """Registers an output that is not evaluated yet: it will be before a slot is written or another call served."""
        self._lazy.append(output)

    def guess(self, layer: int, experts: np.ndarray) -> None:
        """Starts reading guessed experts of a layer, unless reads are running; evicts only experts of lower score.

        A caller that computes meanwhile must have called `serve` with `hold`.
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
        """Reads the experts of highest score into free slots; returns how many were read.

        Calls `progress(done, wanted)` after each batch. A KeyboardInterrupt ends the preloading and is not raised.
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
            pass  # experts read so far stay; the others are read when they are needed
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
        """Changes the number of slots, between calls; experts of highest score stay.

        The peak of memory is all slots and a second copy of the largest bank. An error for want of memory leaves the
        pool usable, and the caller may try again.
        """
        if slots == self.slots == self.banks.slots:
            return
        self._mend()
        self._settle_guesses()
        self._evaluate()
        # An allocation that fails leaves some banks longer than the table, never shorter, so every slot stays valid.
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
        """Makes the pool consistent after an interrupt, wherever it struck: unaccounted slots become empty."""
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

    def _request(self, layer: int, expert: int, slot: int) -> ReadRequest:
        return ReadRequest(layer, expert, self.banks.buffers(slot))

    def _settle(self, reading: _Reading, quiet: bool = False, read: bool = True) -> None:
        """Waits for the reads and drops those that failed. Raises the first error unless `quiet`.

        `read` says whether these reads were counted as misses.
        """
        errors = reading.batch.wait()
        if reading.slots.size == 0:
            return
        if reading.settling:  # an interrupt came in the middle of this: none of the slots can be trusted
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
        """Waits for guesses of experts in `need`, or for all guesses where the call may need their slots."""
        some = need if need and need.together and need.experts.size + len(self._guesses) <= self.slots else None
        left = []
        while self._guesses:
            reading = self._guesses[0]
            if some and not reading.batch.done and (reading.layer != some.layer or reading.guess not in some.experts):
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
    """The layout and number of experts that all files share; raises ValueError where they differ."""
    if not files:
        raise ValueError("a pool for no layer")
    first = next(iter(files.values()))
    for file in files.values():
        if file.layout != first.layout or file.num_experts != first.num_experts:
            raise ValueError(f"{file.path.name} and {first.path.name} differ in shape and cannot share a pool")
    return first.layout, first.num_experts


def group_by_shape(files: dict[int, ExpertFile]) -> list[dict[int, ExpertFile]]:
    """Groups of files that can share a pool, each in layer order."""
    groups: dict[tuple[RecordLayout, int], dict[int, ExpertFile]] = {}
    for layer, file in sorted(files.items()):
        groups.setdefault((file.layout, file.num_experts), {})[layer] = file
    return list(groups.values())


def divide(budget_bytes: int, slot_bytes: Sequence[int], experts: Sequence[int]) -> list[int]:
    """The slots of each pool: the budget divided in proportion to the bytes of all its experts, one slot at least."""
    totals = [size * count for size, count in zip(slot_bytes, experts)]
    if budget_bytes >= sum(totals):
        return list(experts)
    shares = [budget_bytes * total // sum(totals) for total in totals]
    return [min(count, max(1, share // size)) for share, size, count in zip(shares, slot_bytes, experts)]
