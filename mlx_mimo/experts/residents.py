"""Which expert lies in which slot, and what one call of a layer reads, evicts and computes, in which order.

No bytes move here: the pool follows these steps with memory and a disk, `replay` follows them with nothing, and so
both count the same hits. NumPy only.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .policy import Policy, lowest

SORTED_PAIRS = 64  # from so many token-expert pairs on a call goes expert by expert; mlx-lm sorts from here on too
WAVE_EXPERTS = 32  # experts of one wave at most: bounds what a wave computes at once
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


@dataclass(frozen=True)
class Read:
    """Start reading `experts` into `slots`; their former residents are gone."""

    experts: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True)
class Compute:
    """Compute with `experts`, finished before the next step is asked for unless this is the `last` one.

    `reads` says how many of the oldest unfinished reads must have ended first.
    """

    experts: np.ndarray
    reads: int
    last: bool = False


class Residents:
    """The table of one pool: `slots` slots for the experts of `layers`, `num_experts` in each."""

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
        self.hits = self.misses = self.evictions = 0
        self._held: list[np.ndarray] = []

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
        before it computes. An expert is read at most once. Slots in use are released when the iterator ends or is
        closed.
        """
        experts, base = need.experts, self.base[need.layer]
        keys = experts + base
        self._touch(keys, need.counts, need.tokens)
        slots = self.slot_of[keys]
        missing = slots < 0
        misses = int(np.count_nonzero(missing))
        self.misses += misses
        self.hits += slots.size - misses
        try:
            if need.together and slots.size <= self.slots:
                present = ~missing
                if misses or hold:
                    self._hold(slots[present])
                if not misses:
                    yield Compute(experts, 0, last=True)
                    return
                yield Read(experts[missing], self._admit(keys[missing]))
                if split and misses < slots.size:
                    yield Compute(experts[present], 0)
                    yield Compute(experts[missing], 1, last=True)
                else:
                    yield Compute(experts, 1, last=True)
            else:
                yield from self._waves(keys, missing, base)
        finally:
            self._release(self._held)

    def _waves(self, keys: np.ndarray, missing: np.ndarray, base: int) -> Iterator[Read | Compute]:
        size = max(1, min(WAVE_EXPERTS, self.slots // 4))
        ready, wanted = self._groups(keys[~missing], WAVE_EXPERTS), self._groups(keys[missing], size)
        for group in ready:
            self._hold(self.slot_of[group])
        reading: deque[np.ndarray] = deque()
        while ready or wanted or reading:
            while wanted and len(reading) < 2 and self.writable >= len(wanted[0]):
                group = wanted.popleft()
                reading.append(group)
                yield Read(group - base, self._admit(group))
            group, reads = (ready.popleft(), 0) if ready else (reading.popleft(), 1)
            yield Compute(group - base, reads, last=not (ready or wanted or reading))
            self._release([self.slot_of[group]])

    def _groups(self, keys: np.ndarray, size: int) -> deque[np.ndarray]:
        keys = keys[np.argsort(self.policy.score[keys], kind="stable")]
        return deque(keys[start : start + size] for start in range(0, keys.size, size))

    @property
    def writable(self) -> int:
        return int(np.count_nonzero(self.rank != HELD))

    def _touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> None:
        self.uses[keys] += counts
        self.tokens += tokens / len(self.base)
        scaled = self.policy.touch(keys, counts, tokens)
        if scaled:
            self._rank_all()
        else:
            slots = self.slot_of[keys]
            self.rank[slots[slots >= 0]] = self.policy.score[keys[slots >= 0]]

    def _rank_all(self) -> None:
        held = self.rank == HELD
        self.rank[:] = np.where(self.key_of >= 0, self.policy.score[self.key_of], FREE)
        self.rank[held] = HELD

    def _admit(self, keys: np.ndarray) -> np.ndarray:
        """Slots for `keys`, held; who lay there is evicted. At least as many slots must be writable."""
        slots = np.array(lowest(self.rank, keys.size), dtype=np.int32)
        former = self.key_of[slots]
        former = former[former >= 0]
        self.slot_of[former] = -1
        self.evictions += former.size
        self.slot_of[keys] = slots
        self.key_of[slots] = keys
        self._hold(slots)
        return slots

    def _hold(self, slots: np.ndarray) -> None:
        self.rank[slots] = HELD
        self._held.append(slots)

    def _release(self, held: list[np.ndarray]) -> None:
        for slots in held:
            keys = self.key_of[slots]
            self.rank[slots] = np.where(keys >= 0, self.policy.score[keys], FREE)
        if held is self._held:
            self._held.clear()

    def drop(self, slots: np.ndarray, read: bool = True) -> None:
        """Empties `slots`, whose reads failed: they were no misses served."""
        keys = self.key_of[slots]
        self.slot_of[keys[keys >= 0]] = -1
        self.key_of[slots] = -1
        self.rank[slots] = FREE
        self.misses -= int(np.count_nonzero(keys >= 0)) if read else 0

    def fill(self, keys: np.ndarray) -> np.ndarray:
        """Slots for absent `keys` outside of any call; held until `settled`. For preloading a profile."""
        slots = self._admit(keys)
        self._held.pop()
        return slots

    def guess(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, slots) for those absent `keys` that are worth more than who would leave; held until `settled`."""
        taken: list[tuple[int, int]] = []
        for key in keys[np.argsort(-self.policy.score[keys], kind="stable")]:
            if self.slot_of[key] < 0 and self.rank.min() < self.policy.score[key]:
                taken.append((int(key), int(self.fill(np.array([key]))[0])))
        rows = np.array(taken, dtype=np.int32).reshape(-1, 2)
        return rows[:, 0], rows[:, 1]

    def settled(self, slots: np.ndarray) -> None:
        """Ends the hold of `fill` or `guess`."""
        self._release([slots])

    def seed(self, uses: np.ndarray, tokens: float) -> None:
        """Starts the policy from a past of `tokens` tokens in which expert `key` was used `uses[key]` times."""
        self.uses[:] = uses
        self.tokens = tokens
        self.policy.seed(uses / max(tokens, 1.0))
        self._rank_all()

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
            leaving = np.array(lowest(self.rank, old - slots))
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
