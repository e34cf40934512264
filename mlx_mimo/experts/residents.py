"""Which expert lies in which slot, and what one call of a layer reads, evicts and computes, in which order.

No bytes move here: the pool follows these steps with memory and a disk, `replay` follows them with nothing, and so
both count the same hits. NumPy only.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .policy import Policy

SORTED_PAIRS = 64  # from so many token-expert pairs on a call goes expert by expert; mlx-lm sorts from here on too
WAVE_EXPERTS = 32  # experts of one wave at most, and
WAVE_PAIRS = 1024  # token-expert pairs, unless one expert has more: these bound what a wave takes in memory
HELD = np.inf  # rank of a slot that must not be written
FREE = -np.inf


@dataclass(frozen=True)
class Need:
    """One call of one layer: its distinct experts, how many tokens use each, and whether it should go in one piece."""

    layer: int
    experts: np.ndarray
    counts: np.ndarray
    tokens: int
    together: bool

    @classmethod
    def of(cls, layer: int, chosen: np.ndarray) -> "Need":
        """chosen (T, K) expert numbers, as the router gave them."""
        tokens, together = chosen.shape[0], chosen.size < SORTED_PAIRS
        if tokens == 1:  # a router chooses an expert once
            return cls(layer, chosen[0], np.ones(chosen.shape[1], dtype=np.int64), 1, together)
        return cls(layer, *np.unique(chosen, return_counts=True), tokens, together)


class Read(NamedTuple):
    """Start reading `experts` into `slots`; their former residents are gone."""

    experts: np.ndarray
    slots: np.ndarray


class Compute(NamedTuple):
    """Compute with `experts`, finished before the next step is asked for unless this is the `last` one.

    `reads` says how many of the oldest unfinished reads must have ended first.
    """

    experts: np.ndarray
    reads: int
    last: bool = False


class Residents:
    """The table of one pool: `slots` slots for the experts of `layers`, `num_experts` in each.

    A call has a handful of experts, for which a loop over numbers is faster than NumPy; the loops are written for it.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, slots: int, policy: Policy):
        if slots < 1:
            raise ValueError(f"{slots} slots, at least one expected")
        self.num_experts = num_experts
        self.policy = policy
        self.base = {layer: position * num_experts for position, layer in enumerate(layers)}
        self.slot_of = np.full(len(layers) * num_experts, -1, dtype=np.int32)  # by key; -1: not resident
        self.key_of = np.full(slots, -1, dtype=np.int32)  # by slot; -1: free
        self.rank = np.full(slots, FREE)  # by slot: the resident's score, HELD or FREE
        self.uses = np.zeros(self.slot_of.size, dtype=np.int64)  # by key: tokens that used it
        self.tokens = 0.0
        self._promised: list[int] = []  # slots whose reads have not been taken over by whoever asked for the step
        self.hits = self.misses = self.evictions = 0

    @property
    def slots(self) -> int:
        return self.key_of.size

    @property
    def resident(self) -> int:
        return int(np.count_nonzero(self.key_of >= 0))

    def schedule(self, need: Need, split: bool = False, hold: bool = False) -> Iterator[Read | Compute]:
        """The steps of one call.

        One that goes together has one Compute with everything in slots at once, where the slots suffice; `split` lets
        it compute the hits while the misses are read, `hold` keeps hits from a guess that is made in between. Otherwise
        the call goes in waves: residents first, then what is missing, the most used last, each wave read while the one
        before it computes. An expert is read at most once.

        Whoever asks for the next step has taken the reads of the last one over: `drop` what fails of them. When the
        iterator ends, is closed or is interrupted, slots in use are released and those not taken over are empty.
        """
        base, held = self.base[need.layer], []
        keys = need.experts + base
        self._touch(keys, need.counts, need.tokens)
        slot_of = self.slot_of.item
        present, missing, hits = [], [], []
        for key in keys.tolist():
            slot = slot_of(key)
            if slot < 0:
                missing.append(key)
            else:
                present.append(key)
                hits.append(slot)
        self.hits += len(present)
        try:
            if not need.together or keys.size > self.slots:
                pairs = dict(zip(keys.tolist(), need.counts.tolist()))
                yield from self._waves(present, missing, pairs, base, held)
                return
            if not missing:
                self._hold(hits, held) if hold else self._release(hits)
                yield Compute(need.experts, 0, last=True)
                return
            self._hold(hits, held)
            experts = _experts(missing, base)
            yield from self._read(missing, base, held)
            if split and present:
                yield Compute(_experts(present, base), 0)
                yield Compute(experts, 1, last=True)
            else:
                yield Compute(need.experts, 1, last=True)
        finally:
            if self._promised:
                self.drop(np.array(self._promised, dtype=np.int32), read=False)
                self._promised = []
            self._release(held)

    def _read(self, keys: list[int], base: int, held: list[int]) -> Iterator[Read]:
        yield Read(_experts(keys, base), self._admit(keys, held, self._promised))
        self.misses += len(keys)
        self._promised = []

    def _waves(
        self, present: list[int], missing: list[int], pairs: dict[int, int], base: int, held: list[int]
    ) -> Iterator[Read | Compute]:
        size = max(1, min(WAVE_EXPERTS, self.slots // 4))
        ready, wanted = self._groups(present, WAVE_EXPERTS, pairs), self._groups(missing, size, pairs)
        self._hold([self.slot_of.item(key) for key in present], held)
        writable = int(np.count_nonzero(self.rank != HELD))
        reading: deque[list[int]] = deque()
        while ready or wanted or reading:
            while wanted and len(reading) < 2 and writable >= len(wanted[0]):
                group = wanted.popleft()
                reading.append(group)
                writable -= len(group)
                yield from self._read(group, base, held)
            group, reads = (ready.popleft(), 0) if ready else (reading.popleft(), 1)
            yield Compute(_experts(group, base), reads, not (ready or wanted or reading))
            self._release([self.slot_of.item(key) for key in group])
            writable += len(group)

    def _groups(self, keys: list[int], size: int, pairs: dict[int, int]) -> deque[list[int]]:
        """`keys` by score, the lowest first, in groups of at most `size`."""
        groups: deque[list[int]] = deque()
        room = 0
        for key in sorted(keys, key=self.policy.score.item):
            if not groups or len(groups[-1]) == size or room < pairs[key]:
                groups.append([])
                room = WAVE_PAIRS
            groups[-1].append(key)
            room -= pairs[key]
        return groups

    def _touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> None:
        """Counts a call. The ranks of its residents are brought up to date when they are released."""
        self.uses[keys] += counts
        self.tokens += tokens / len(self.base)
        if self.policy.touch(keys, counts, tokens):
            self._rank_all()

    def _rank_all(self) -> None:
        held = self.rank == HELD
        self.rank[:] = np.where(self.key_of >= 0, self.policy.score[self.key_of], FREE)
        self.rank[held] = HELD

    def _admit(self, keys: list[int], *lists: list[int]) -> np.ndarray:
        """Slots for `keys`, added to `lists`; who lay there is evicted. At least as many slots must be writable.

        An interrupt may come between any two lines: a slot is held, and on the lists, before its key is in the table.
        """
        rank, key_of, slot_of = self.rank, self.key_of, self.slot_of
        slots = []
        for key in keys:
            slot = int(rank.argmin())
            rank[slot] = HELD
            for each in lists:
                each.append(slot)
            former = key_of.item(slot)
            if former >= 0:
                slot_of[former] = -1
                self.evictions += 1
            key_of[slot] = key
            slot_of[key] = slot
            slots.append(slot)
        return np.array(slots, dtype=np.int32)

    def _hold(self, slots: list[int], held: list[int]) -> None:
        for slot in slots:
            self.rank[slot] = HELD
        held += slots

    def _release(self, slots: list[int]) -> None:
        rank, key_of, score = self.rank, self.key_of.item, self.policy.score.item
        for slot in slots:
            key = key_of(slot)
            rank[slot] = score(key) if key >= 0 else FREE

    def drop(self, slots: np.ndarray, read: bool = True) -> None:
        """Empties `slots`, whose reads failed: they were no misses served."""
        keys = self.key_of[slots]
        self.slot_of[keys[keys >= 0]] = -1
        self.key_of[slots] = -1
        self.rank[slots] = FREE
        self.misses -= int(np.count_nonzero(keys >= 0)) if read else 0

    def fill(self, keys: np.ndarray) -> np.ndarray:
        """Slots for absent `keys` outside of any call; held until `settled`. For preloading a profile."""
        return self._admit(keys.tolist())

    def guess(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, slots) for those absent `keys` that are worth more than who would leave; held until `settled`."""
        taken: list[tuple[int, int]] = []
        for key in keys[np.argsort(-self.policy.score[keys], kind="stable")]:
            if self.slot_of[key] < 0 and self.rank.min() < self.policy.score[key]:
                taken.append((int(key), int(self._admit([int(key)])[0])))
        rows = np.array(taken, dtype=np.int32).reshape(-1, 2)
        return rows[:, 0], rows[:, 1]

    def settled(self, slots: np.ndarray) -> None:
        """Ends the hold of `fill` or `guess`."""
        self._release(slots.tolist())

    def seed(self, uses: np.ndarray, tokens: float) -> None:
        """Starts the policy from a past of `tokens` tokens in which expert `key` was used `uses[key]` times."""
        self.uses[:] = uses
        self.tokens = tokens
        self.policy.seed(uses / max(tokens, 1.0))
        self._rank_all()

    def recover(self) -> None:
        """After an interrupt: empties every slot that is held, since nobody knows what lies there."""
        self._promised = []
        self.drop(np.flatnonzero(self.rank == HELD), read=False)
        taken = np.flatnonzero(self.key_of >= 0)
        self.slot_of[:] = -1
        self.slot_of[self.key_of[taken]] = taken

    def forget(self) -> None:
        """Empties every slot."""
        self.drop(np.arange(self.slots), read=False)

    def resize(self, slots: int) -> list[tuple[int, int]]:
        """Another number of slots, between calls. Returns the moves (from, to) of residents that stay.

        When shrinking, those worth most stay, and those beyond the new end move to slots that became free below it.
        """
        old = self.slots
        if slots < 1:
            raise ValueError(f"{slots} slots, at least one expected")
        moves: list[tuple[int, int]] = []
        if slots < old:
            leaving = np.argsort(self.rank, kind="stable")[: old - slots]
            leaving = leaving[self.key_of[leaving] >= 0]
            self.slot_of[self.key_of[leaving]] = -1
            self.key_of[leaving] = -1
            self.evictions += leaving.size
            beyond = slots + np.flatnonzero(self.key_of[slots:] >= 0)
            room = np.flatnonzero(self.key_of[:slots] < 0)[: beyond.size]
            moves = list(zip(beyond.tolist(), room.tolist()))
            self.key_of[room] = self.key_of[beyond]
            self.slot_of[self.key_of[room]] = room
            self.key_of = self.key_of[:slots].copy()
        else:
            self.key_of = np.concatenate([self.key_of, np.full(slots - old, -1, dtype=np.int32)])
        self.rank = np.full(slots, FREE)
        self._rank_all()
        return moves


def _experts(keys: list[int], base: int) -> np.ndarray:
    return np.array([key - base for key in keys], dtype=np.int32)
