"""The replay counts the pool's hits and misses, and no policy misses less than Belady's."""

import subprocess
import sys
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_experts import tiny_model

from mlx_mimo.experts import residency as residency_module
from mlx_mimo.experts.simulate import REPLAY_POLICIES, shuffled, simulate
from mlx_mimo.experts.trace import Call, Trace, read_trace
from mlx_mimo.runtime.compute import choose_compute

attach = partial(residency_module.attach, compute_for=choose_compute)


def trace_of(*experts, num_experts=6, layers=(1,)) -> Trace:
    """One token a call, one expert a token."""
    calls = [Call(layers[i % len(layers)], np.array([[expert]])) for i, expert in enumerate(experts)]
    return Trace(tuple(layers), num_experts, 1, "", calls)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize("slots", [1, 2, 5, 12, 30])
def test_the_replay_counts_as_the_pool(tmp_path, policy, slots):
    """In decode, batches, prefill in waves, and pools smaller than a token's demand."""
    import mlx.core as mx

    model = tiny_model(tmp_path)
    residency = attach(model, tmp_path, slots=slots, policy=policy, half_life_tokens=20)
    residency.trace_to(tmp_path / "t")
    for seed, length in enumerate([1, 1, 40, 1, 3, 1, 1, 17, 1, 1, 1, 2]):
        mx.eval(model(mx.random.normal((1, length, 64), key=mx.random.key(seed))))
    counters = residency.counters
    residency.close()
    result = simulate(read_trace(tmp_path / "t"), policy, slots, half_life_tokens=20)
    assert (result.hits, result.misses, result.evictions) == (counters.hits, counters.misses, counters.evictions)
    assert result.hits > 0 or slots < 12


def test_belady_on_a_sequence_worked_out_by_hand():
    result = simulate(trace_of(0, 1, 2, 0, 3, 1, 2), "belady", 2)
    assert (result.hits, result.misses) == (2, 5)
    assert simulate(trace_of(0, 1, 2, 0, 3, 1, 2), "lru", 2).hits == 0


def fewest_misses(sequence, slots) -> int:
    """The least misses, by trying every victim at every miss."""
    states = {frozenset(): 0}
    for expert in sequence:
        following: dict[frozenset, int] = {}
        for inside, misses in states.items():
            if expert in inside:
                options = [inside]
            elif len(inside) < slots:
                options, misses = [inside | {expert}], misses + 1
            else:
                options = [frozenset(kept) | {expert} for kept in combinations(inside, slots - 1)]
                misses += 1
            for option in options:
                following[option] = min(following.get(option, 10**9), misses)
        states = following
    return min(states.values())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=25), st.integers(1, 4))
@settings(max_examples=60)
def test_belady_misses_no_more_than_any_choice_of_victims(sequence, slots):
    trace = trace_of(*sequence)
    least = fewest_misses(sequence, slots)
    assert simulate(trace, "belady", slots).misses == least
    for policy in ("lfu", "lru"):
        assert simulate(trace, policy, slots).misses >= least


@pytest.mark.parametrize("policy", REPLAY_POLICIES)
def test_a_pool_for_everything_reads_everything_once(policy):
    trace = trace_of(*np.random.default_rng(0).integers(0, 6, 200), layers=(1, 2, 3))
    result = simulate(trace, policy, 100)
    assert result.slots == 18
    assert (result.misses, result.evictions) == (len({(c.layer, c.chosen[0, 0]) for c in trace.calls}), 0)


def test_the_shuffled_control_has_each_layers_calls_in_another_order():
    trace = trace_of(*range(6), *range(6), *range(6), layers=(1, 2))
    control = shuffled(trace, seed=1)
    assert [c.layer for c in control.calls] == [c.layer for c in trace.calls]
    for layer in (1, 2):
        mine = [int(c.chosen[0, 0]) for c in control.calls if c.layer == layer]
        theirs = [int(c.chosen[0, 0]) for c in trace.calls if c.layer == layer]
        assert sorted(mine) == sorted(theirs)
        assert mine != theirs
    assert simulate(control, "lru", 3).hits != simulate(trace, "lru", 3).hits


def test_replaying_needs_no_mlx():
    code = (
        "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"
        "import mlx_mimo.replay, mlx_mimo.experts.reader, mlx_mimo.experts.profile"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
