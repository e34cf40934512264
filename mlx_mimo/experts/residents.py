"""Which expert lies in which slot, and what one call of a layer reads, evicts and computes, in which order.

This moves no bytes: the pool follows these steps with memory and a disk, `replay` follows them without, so both count
the same hits. NumPy only.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .policy import Policy

SORTED_PAIRS = 64  # a call of at least as many token-expert pairs goes expert by expert; mlx-lm sorts from 64 on too
WAVE_EXPERTS = 32  # the most experts of a wave
WAVE_PAIRS = 1024  # the most token-expert pairs of a wave, unless one expert has more: bounds the memory of its outputs
HELD = np.inf  # rank of a slot that must not be written
FREE = -np.inf


@dataclass(frozen=True)
class Need:
    """What one call of one layer needs: its distinct experts, and how many of its tokens use each."""

    layer: int
    experts: np.ndarray  # distinct
    counts: np.ndarray  # tokens that use each
    tokens: int
    together: bool  # computed in one piece where the slots suffice, else in waves

    @classmethod
    def of(cls, layer: int, chosen: np.ndarray) -> "Need":
        """The need of a call for which the router chose `chosen`: (T, K) expert numbers."""
        tokens, together = chosen.shape[0], chosen.size < SORTED_PAIRS
        if tokens == 1:  # a router chooses an expert once
            return cls(layer, chosen[0], np.ones(chosen.shape[1], dtype=np.int64), 1, together)
        return cls(layer, *np.unique(chosen, return_counts=True), tokens, together)


class ReadStep(NamedTuple):
    """Start reading `experts` into `slots`, whose former residents have been evicted."""

    experts: np.ndarray
    slots: np.ndarray


class ComputeStep(NamedTuple):
    """Wait for the `reads` oldest unfinished reads, then compute with `experts`.

    Outputs must have been evaluated before the next step is asked for, unless this is the `last` one.
    """

    experts: np.ndarray
    reads: int
    last: bool = False


Step = ReadStep | ComputeStep


class Residents:
    """The table of one pool: `slots` slots for the experts of `layers`, `num_experts` in each.

    A call has a handful of experts, so loops over Python numbers are used: they are faster than NumPy there.
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
        self._promised: list[int] = []  # slots of a ReadStep whose reads the caller does not own yet
        self.hits = self.misses = self.evictions = 0

    @property
    def slots(self) -> int:
        return self.key_of.size

    @property
    def resident(self) -> int:
        return int(np.count_nonzero(self.key_of >= 0))

    def schedule(self, need: Need, hits_first: bool = False, hold: bool = False) -> Generator[Step, None, None]:
        """The steps of one call, in order.

        A call that goes together has one ComputeStep, with all its experts in slots, where the slots suffice; with
        `hits_first` it has two, so that hits are computed while misses are read. `hold` keeps the slots of hits from
        `guess` until the call has ended. Otherwise the call goes in waves: residents first, then the missing experts,
        the most used last, each wave read while the one before it computes. No expert is read twice.

        By asking for the next step the caller takes over the reads of the step before and must `drop` those that
        failed. When the generator ends, is closed or is interrupted, all slots are released, and slots whose reads the
        caller does not own are empty.
        """
        base = self.base[need.layer]
        held: list[int] = []
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
                yield ComputeStep(need.experts, 0, last=True)
                return
            self._hold(hits, held)
            experts = _experts(missing, base)
            yield from self._read(missing, base, held)
            if hits_first and present:
                yield ComputeStep(_experts(present, base), 0)
                yield ComputeStep(experts, 1, last=True)
            else:
                yield ComputeStep(need.experts, 1, last=True)
        finally:
            if self._promised:
                self.drop(np.array(self._promised, dtype=np.int32), read=False)
                self._promised = []
            self._release(held)

    def _read(self, keys: list[int], base: int, held: list[int]) -> Generator[ReadStep, None, None]:
        yield ReadStep(_experts(keys, base), self._admit(keys, held, self._promised))
        self.misses += len(keys)
        self._promised = []

    def _waves(
        self, present: list[int], missing: list[int], pairs: dict[int, int], base: int, held: list[int]
    ) -> Generator[Step, None, None]:
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
            yield ComputeStep(_experts(group, base), reads, not (ready or wanted or reading))
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
        """Counts a call. The ranks of its experts are updated when their slots are released."""
        self.uses[keys] += counts
        self.tokens += tokens / len(self.base)
        if self.policy.touch(keys, counts, tokens):
            self._rank_all()

    def _rank_all(self) -> None:
        held = self.rank == HELD
        self.rank[:] = np.where(self.key_of >= 0, self.policy.score[self.key_of], FREE)
        self.rank[held] = HELD

    def _admit(self, keys: list[int], *lists: list[int]) -> np.ndarray:
        """Evicts the residents of lowest rank and returns their slots for `keys`, held and appended to each of `lists`.

        At least as many slots must not be held. An interrupt may come between any two lines, so a slot is held and on
        the lists before its key is in the table.
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
        """Empties `slots`, whose reads failed. With `read`, they no longer count as misses."""
        keys = self.key_of[slots]
        self.slot_of[keys[keys >= 0]] = -1
        self.key_of[slots] = -1
        self.rank[slots] = FREE
        self.misses -= int(np.count_nonzero(keys >= 0)) if read else 0

    def fill(self, keys: np.ndarray) -> np.ndarray:
        """Slots for absent `keys`, to preload them between calls. The caller must call `settled` after the reads."""
        return self._admit(keys.tolist())

    def guess(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, slots) for the absent `keys` of higher score than the resident that would be evicted for each.

        The caller must call `settled` after the reads.
        """
        taken: list[tuple[int, int]] = []
        for key in keys[np.argsort(-self.policy.score[keys], kind="stable")]:
            if self.slot_of[key] < 0 and self.rank.min() < self.policy.score[key]:
                taken.append((int(key), int(self._admit([int(key)])[0])))
        rows = np.array(taken, dtype=np.int32).reshape(-1, 2)
        return rows[:, 0], rows[:, 1]

    def settled(self, slots: np.ndarray) -> None:
        """Releases slots that `fill` or `guess` returned."""
        self._release(slots.tolist())

    def seed(self, uses: np.ndarray, tokens: float) -> None:
        """Starts the policy as after `tokens` tokens in which expert `key` was used `uses[key]` times."""
        self.uses[:] = uses
        self.tokens = tokens
        self.policy.seed(uses / max(tokens, 1.0))
        self._rank_all()

    def recover(self) -> None:
        """After an interrupt: empties every held slot, whose content is unknown, and makes the table consistent."""
        self._promised = []
        self.drop(np.flatnonzero(self.rank == HELD), read=False)
        taken = np.flatnonzero(self.key_of >= 0)
        self.slot_of[:] = -1
        self.slot_of[self.key_of[taken]] = taken

    def forget(self) -> None:
        """Empties every slot."""
        self.drop(np.arange(self.slots), read=False)

    def resize(self, slots: int) -> list[tuple[int, int]]:
        """Changes the number of slots, between calls. Returns moves (from, to); the caller must copy those slots.

        When shrinking, residents of highest score stay; those beyond the new end move to free slots below it.
        Raises ValueError for less than one slot.
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
