"""What a call reads, evicts and computes, and in which order: against rules, and against a simple model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mimo.experts.policy import make_policy
from mlx_mimo.experts.residents import HELD, WAVE_PAIRS, ComputeStep, Need, ReadStep, Residents

EXPERTS = 12


def table(slots, layers=(1, 2), policy="lfu", half_life=50.0) -> Residents:
    keys = len(layers) * EXPERTS
    return Residents(layers, EXPERTS, slots, make_policy(policy, keys, len(layers), half_life))


def token(layer, *experts) -> Need:
    return Need.of(layer, np.array([experts], dtype=np.int32))


def run(residents, need, **options) -> list:
    return list(residents.schedule(need, **options))


def resident(residents, layer) -> set[int]:
    base = residents.base[layer]
    return set(np.flatnonzero(residents.slot_of[base : base + EXPERTS] >= 0).tolist())


def consistent(residents) -> None:
    """slot_of and key_of are each other's inverse, and nothing is held between calls."""
    for slot, key in enumerate(residents.key_of):
        assert key < 0 or residents.slot_of[key] == slot
        assert residents.rank[slot] == (residents.policy.score[key] if key >= 0 else -np.inf)
    assert np.count_nonzero(residents.slot_of >= 0) == np.count_nonzero(residents.key_of >= 0)


def test_a_call_that_fits_reads_what_is_missing_and_computes_once():
    residents = table(6)
    read, compute = run(residents, token(1, 3, 5, 7))
    assert isinstance(read, ReadStep)
    assert read.experts.tolist() == [3, 5, 7]
    assert isinstance(compute, ComputeStep)
    assert (compute.experts.tolist(), compute.reads, compute.last) == ([3, 5, 7], 1, True)
    (compute,) = run(residents, token(1, 7, 3))
    assert (compute.reads, compute.last) == (0, True)
    assert (residents.hits, residents.misses, residents.evictions) == (2, 3, 0)


def test_equal_numbers_in_two_layers_are_two_experts():
    residents = table(6)
    run(residents, token(1, 3))
    assert len(run(residents, token(2, 3))) == 2
    assert resident(residents, 1) == resident(residents, 2) == {3}


def test_lfu_evicts_the_least_used_expert_and_keeps_its_count():
    residents = table(3)
    for experts in [(0, 1, 2), (0, 1), (0, 1), (2,)]:
        run(residents, token(1, *experts))
    run(residents, token(1, 3))
    assert resident(residents, 1) == {0, 1, 3}
    run(residents, token(1, 2))  # its two uses still count: more than the one of 3
    assert resident(residents, 1) == {0, 1, 2}
    assert residents.evictions == 2


def test_lru_evicts_the_expert_used_longest_ago():
    residents = table(3, policy="lru")
    for experts in [(0, 1, 2), (0, 1), (0, 2), (3,)]:
        run(residents, token(1, *experts))
    assert resident(residents, 1) == {0, 2, 3}


def test_a_call_never_evicts_experts_that_it_needs():
    residents = table(3)
    for _ in range(20):
        run(residents, token(1, 0))
    run(residents, token(2, 4))
    run(residents, token(1, 5))  # 4 and 5 are worth least, 0 most
    run(residents, token(2, 4, 6, 7))
    assert resident(residents, 2) == {4, 6, 7}
    consistent(residents)


def test_hits_first_computes_hits_before_it_waits_for_the_read():
    residents = table(6)
    run(residents, token(1, 0, 1))
    steps = run(residents, token(1, 0, 1, 2, 3), hits_first=True)
    assert [type(step) for step in steps] == [ReadStep, ComputeStep, ComputeStep]
    assert [(s.experts.tolist(), s.reads, s.last) for s in steps[1:]] == [([0, 1], 0, False), ([2, 3], 1, True)]


def test_one_slot_serves_one_expert_at_a_time():
    residents = table(1)
    steps = run(residents, token(1, 4, 2, 9))
    assert [type(step) for step in steps] == [ReadStep, ComputeStep] * 3
    assert sorted(int(step.experts[0]) for step in steps if isinstance(step, ReadStep)) == [2, 4, 9]
    assert [step.last for step in steps if isinstance(step, ComputeStep)] == [False, False, True]


def test_a_wave_is_read_while_the_one_before_computes():
    residents = table(8)
    steps = run(residents, Need(1, np.arange(12), np.ones(12, dtype=int), 40, together=False))
    reads_before_first_compute = [type(step) for step in steps].index(ComputeStep)
    assert reads_before_first_compute == 2


def test_waves_compute_residents_first_and_keep_the_most_used():
    residents = table(4)
    counts = np.arange(1, 13)
    run(residents, Need(1, np.arange(12), counts, 40, together=False))
    assert resident(residents, 1) == {8, 9, 10, 11}
    steps = run(residents, Need(1, np.arange(6, 12), np.ones(6, dtype=int), 6, together=False))
    first = next(step for step in steps if isinstance(step, ComputeStep))
    assert set(first.experts.tolist()) == {8, 9, 10, 11}


@pytest.mark.parametrize("policy", ["lfu", "lru"])
def test_the_most_used_experts_of_a_chunk_stay_resident(policy):
    residents = table(4, policy=policy)
    run(residents, token(2, 0, 1, 2, 3))
    run(residents, Need(1, np.arange(12), np.tile([200, 20, 20], 4), 320, together=False))
    assert resident(residents, 1) == {0, 3, 6, 9}


def test_a_call_closed_halfway_holds_no_slot():
    residents = table(4)
    steps = residents.schedule(Need(1, np.arange(12), np.ones(12, dtype=int), 12, together=False))
    next(steps)
    steps.close()
    assert not (residents.rank == HELD).any()
    consistent(residents)


def test_dropped_slots_are_free_and_not_counted_as_misses():
    residents = table(4)
    read, _ = run(residents, token(1, 0, 1))
    residents.drop(read.slots[:1])
    assert resident(residents, 1) == {1}
    assert residents.misses == 1
    consistent(residents)


def test_a_guess_evicts_only_experts_of_lower_score():
    residents = table(3)
    for experts in [(0, 1), (0, 1), (2,)]:
        run(residents, token(1, *experts))
    five, six = EXPERTS + 5, EXPERTS + 6  # of layer 2
    residents.policy.touch(np.array([five]), np.array([1]), 1)
    run(residents, token(1, 0, 1, 2))
    keys, _ = residents.guess(np.array([five, six]))
    assert keys.tolist() == []  # 5 was used once, 2 twice, 6 never
    for _ in range(3):
        residents.policy.touch(np.array([five]), np.array([1]), 1)
    keys, slots = residents.guess(np.array([five, six]))
    assert keys.tolist() == [five]
    assert residents.rank[slots[0]] == HELD
    assert resident(residents, 1) == {0, 1}
    residents.settled(slots)
    consistent(residents)


def test_a_wave_holds_a_bounded_number_of_pairs():
    counts = np.array([WAVE_PAIRS // 2, 1, WAVE_PAIRS + 5, WAVE_PAIRS // 2, 3, 3])
    residents = table(8 * counts.size, layers=(1,))
    for _ in range(2):  # everything is missing, then everything is there
        sums = [
            counts[step.experts].sum()
            for step in residents.schedule(Need(1, np.arange(counts.size), counts, 2 * WAVE_PAIRS, False))
            if isinstance(step, ComputeStep)
        ]
        assert sum(sums) == counts.sum()
        assert sorted(sums)[-1] == WAVE_PAIRS + 5, "an expert's own pairs stay together"
        assert all(pairs <= WAVE_PAIRS for pairs in sorted(sums)[:-1])


needs = st.lists(
    st.tuples(
        st.sampled_from([1, 2]), st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), st.booleans()
    ),
    max_size=40,
)


@given(needs, st.integers(1, 30), st.sampled_from(["lfu", "lru"]), st.booleans())
@settings(max_examples=150)
def test_every_call_reads_each_missing_expert_once_and_computes_it_after_its_read(calls, slots, policy, hits_first):
    residents = table(min(slots, 24), policy=policy, half_life=5.0)
    for layer, experts, together in calls:
        base = residents.base[layer]
        before = resident(residents, layer)
        read: list[int] = []
        computed: list[int] = []
        unread: list[list[int]] = []
        for step in residents.schedule(
            Need(layer, np.array(experts), np.ones(len(experts), int), 3, together), hits_first
        ):
            if isinstance(step, ReadStep):
                assert len(set(step.slots.tolist())) == step.slots.size
                read += step.experts.tolist()
                unread.append(step.experts.tolist())
                continue
            for _ in range(step.reads):
                unread.pop(0)
            in_flight = {expert for group in unread for expert in group}
            for expert in step.experts.tolist():
                assert residents.slot_of[base + expert] >= 0, "computed without being in a slot"
                assert expert not in in_flight, "computed while it is being read"
            computed += step.experts.tolist()
            done = step.last
        assert done
        assert sorted(computed) == sorted(experts)
        assert sorted(read) == sorted(set(experts) - before), "each missing expert is read once, no other at all"
        assert not unread
        consistent(residents)


class SlowCache:
    """A call that goes together, in plain Python: scores by definition, victims by full search."""

    def __init__(self, slots, policy, half_life):
        self.slots, self.policy, self.half_life = slots, policy, half_life
        self.inside: set = set()
        self.uses: dict = {}
        self.time = 0.0
        self.hits = 0

    def worth(self, key):
        if self.policy == "lru":
            return max((when for when in self.uses.get(key, [])), default=0)
        return sum(2.0 ** ((when - self.time) / self.half_life) for when in self.uses.get(key, []))

    def call(self, layer, experts, layers=2):
        self.time += 1 / layers
        needed = {(layer, expert) for expert in experts}
        for key in needed:
            self.uses.setdefault(key, []).append(self.time)
        self.hits += len(needed & self.inside)
        missing = needed - self.inside
        leave = len(self.inside) + len(missing) - self.slots
        others = sorted(self.inside - needed, key=self.worth)
        self.inside = (self.inside | missing) - set(others[: max(0, leave)])


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2]), st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True)),
        max_size=60,
    ),
    st.integers(3, 12),
    st.sampled_from(["lfu", "lru"]),
)
@settings(max_examples=100)
def test_hits_equal_those_of_a_simple_cache(calls, slots, policy):
    """Calls have one expert each, so no two victims are equally good."""
    residents, slow = table(slots, policy=policy, half_life=5.0), SlowCache(slots, policy, 5.0)
    for layer, experts in calls:
        for expert in experts:
            run(residents, token(layer, expert))
            slow.call(layer, [expert])
        inside = {(layer, e) for layer in (1, 2) for e in resident(residents, layer)}
        assert inside == slow.inside
    assert residents.hits == slow.hits


@given(needs, st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=100)
def test_resize_keeps_the_experts_of_highest_score(calls, before, after):
    residents = table(before)
    for layer, experts, together in calls:
        run(residents, Need(layer, np.array(experts), np.ones(len(experts), int), 1, together))
    worth = {int(key): residents.policy.score[key] for key in residents.key_of if key >= 0}
    former = residents.key_of.copy()
    moves = residents.resize(after)
    consistent(residents)
    kept = {int(key) for key in residents.key_of if key >= 0}
    assert len(kept) == min(len(worth), after)
    assert all(worth[k] >= worth[g] for k in kept for g in worth.keys() - kept)
    moved = {target: former[source] for source, target in moves}
    for slot, key in enumerate(residents.key_of):
        if key >= 0:
            assert moved.get(slot, former[slot] if slot < former.size else -1) == key
    assert not {source for source, _ in moves} & {target for _, target in moves}


def test_less_than_one_slot_is_rejected():
    with pytest.raises(ValueError, match="at least one"):
        table(0)
    with pytest.raises(ValueError, match="at least one"):
        table(3).resize(0)
