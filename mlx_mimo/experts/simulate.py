"""A routing trace through a pool without memory or disk: the hits of any policy and budget. No MLX.

It runs the pool's own table, so its counts are the pool's. Belady's policy knows the future: no other choice of victims
reads less, though a pool that reads ahead can.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .policy import DEFAULT_HALF_LIFE_TOKENS, POLICIES, Policy, make_policy
from .residents import Need, Residents
from .trace import Call, Trace

REPLAY_POLICIES = (*POLICIES, "belady")


class BeladyPolicy:
    """Evicts the expert that is needed again last. `touch` must be called exactly as announced."""

    name = "belady"

    def __init__(self, num_keys: int, announced: Sequence[np.ndarray]):
        """`announced` holds the keys of each call to come."""
        self.score = np.full(num_keys, -float(len(announced) + 1))
        self._next: list[np.ndarray] = [np.empty(0)] * len(announced)
        following = np.full(num_keys, len(announced) + 1)
        for call in range(len(announced) - 1, -1, -1):
            keys = announced[call]
            self._next[call] = -following[keys].astype(float)
            following[keys] = call
        self._call = 0

    def seed(self, rates: np.ndarray) -> None:
        """Raises ValueError: a past changes nothing for a policy that knows the future."""
        raise ValueError("belady starts from no past")

    def touch(self, keys: np.ndarray, counts: np.ndarray, tokens: int) -> bool:
        """As LFUPolicy.touch."""
        self.score[keys] = self._next[self._call]
        self._call += 1
        return False


@dataclass(frozen=True)
class Result:
    """What one policy with so many slots came to."""

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
    """The needs of a trace's calls, without those of no token."""
    return [Need.of(call.layer, call.chosen) for call in trace.calls if call.chosen.size]


def simulate(
    trace: Trace,
    policy: str,
    slots: int,
    half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS,
    needs: Sequence[Need] | None = None,
) -> Result:
    """Runs the trace through `slots` slots that are empty at first. `needs`, where given, must be `needs_of(trace)`."""
    needs = needs_of(trace) if needs is None else needs
    keys = len(trace.layers) * trace.num_experts
    if policy == "belady":
        base = {layer: position * trace.num_experts for position, layer in enumerate(trace.layers)}
        tracker: Policy = BeladyPolicy(keys, [call.experts + base[call.layer] for call in needs])
    else:
        tracker = make_policy(policy, keys, len(trace.layers), half_life_tokens)
    table = Residents(trace.layers, trace.num_experts, min(slots, keys), tracker)
    for call in needs:
        for _ in table.schedule(call):
            pass
    return Result(policy, table.slots, table.hits, table.misses, table.evictions)


def shuffled(trace: Trace, seed: int = 0) -> Trace:
    """The control: each layer's calls in random order. Hits that a policy has beyond it are due to recency."""
    generator = np.random.default_rng(seed)
    order: dict[int, list[Call]] = {}
    for call in trace.calls:
        order.setdefault(call.layer, []).append(call)
    for calls in order.values():
        generator.shuffle(calls)
    taken = {layer: iter(calls) for layer, calls in order.items()}
    calls = [next(taken[call.layer]) for call in trace.calls]
    return Trace(trace.layers, trace.num_experts, trace.top_k, trace.model, calls, trace.slot_bytes)
