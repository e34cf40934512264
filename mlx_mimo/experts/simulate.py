"""A routing trace through a pool without memory or disk: what any policy and budget would have hit. No MLX.

It runs the pool's own table, so its counts are the pool's. Belady, who knows the future, is one more policy here: no
other choice of who leaves reads less, though one that reads ahead of need can.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .policy import DEFAULT_HALF_LIFE_TOKENS, POLICIES, make_policy
from .residents import Need, Residents
from .trace import Call, Trace

REPLAY_POLICIES = (*POLICIES, "belady")


class BeladyPolicy:
    """Who is needed again last leaves first. Its calls must come exactly as announced."""

    name = "belady"

    def __init__(self, num_keys: int, announced: Sequence[np.ndarray]):
        """`announced`: the keys of each call to come."""
        self.score = np.full(num_keys, -float(len(announced) + 1))
        self._next: list[np.ndarray] = [None] * len(announced)
        following = np.full(num_keys, len(announced) + 1)
        for call in range(len(announced) - 1, -1, -1):
            keys = announced[call]
            self._next[call] = -following[keys].astype(float)
            following[keys] = call
        self._call = 0

    def touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> bool:
        self.score[keys] = self._next[self._call]
        self._call += 1
        return False


@dataclass(frozen=True)
class Result:
    policy: str
    slots: int
    hits: int
    misses: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 1.0


def needs_of(trace: Trace) -> list[Need]:
    return [Need.of(call.layer, call.chosen) for call in trace.calls if call.chosen.size]


def simulate(
    trace: Trace,
    policy: str,
    slots: int,
    half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS,
    needs: Sequence[Need] | None = None,
) -> Result:
    """The trace through `slots` slots, empty at first. `needs`, where given, are `needs_of(trace)`."""
    needs = needs_of(trace) if needs is None else needs
    keys = len(trace.layers) * trace.num_experts
    if policy == "belady":
        base = {layer: position * trace.num_experts for position, layer in enumerate(trace.layers)}
        tracker = BeladyPolicy(keys, [call.experts + base[call.layer] for call in needs])
    else:
        tracker = make_policy(policy, keys, len(trace.layers), half_life_tokens)
    table = Residents(trace.layers, trace.num_experts, min(slots, keys), tracker)
    for call in needs:
        for _ in table.schedule(call):
            pass
    return Result(policy, table.slots, table.hits, table.misses, table.evictions)


def shuffled(trace: Trace, seed: int = 0) -> Trace:
    """The control: the same calls of each layer in random order. What a policy hits beyond it, it owes to recency."""
    generator = np.random.default_rng(seed)
    order: dict[int, list[Call]] = {}
    for call in trace.calls:
        order.setdefault(call.layer, []).append(call)
    for calls in order.values():
        generator.shuffle(calls)
    taken = {layer: iter(calls) for layer, calls in order.items()}
    calls = [next(taken[call.layer]) for call in trace.calls]
    return Trace(trace.layers, trace.num_experts, trace.top_k, trace.model, calls, trace.slot_bytes)
