"""The order of eviction, on sequences worked out by hand and against the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mimo.experts.policy import LFUPolicy, LRUPolicy, make_policy


def touch(policy, *keys, count=1, tokens=1):
    return policy.touch(np.array(keys, dtype=int), np.full(len(keys), count), tokens)


def order(policy) -> list[int]:
    """Keys in the order in which they are evicted."""
    return np.argsort(policy.score, kind="stable").tolist()


def test_lfu_keeps_experts_used_more_often():
    policy = LFUPolicy(3, half_life_tokens=100)
    for key in (0, 0, 1, 2, 2, 2):
        touch(policy, key)
    assert order(policy) == [1, 0, 2]


def test_lfu_breaks_ties_by_recency():
    policy = LFUPolicy(3, half_life_tokens=100)
    for key in (2, 0, 1):
        touch(policy, key)
    assert order(policy) == [2, 0, 1]


def test_lfu_counts_halve_in_a_half_life():
    policy = LFUPolicy(2, half_life_tokens=8)
    touch(policy, 0)
    for _ in range(7):
        touch(policy)
    touch(policy, 1)
    assert policy.score[1] == pytest.approx(2 * policy.score[0])


def test_lfu_counts_a_call_by_half_and_by_half_of_its_share_of_tokens():
    policy = LFUPolicy(3, half_life_tokens=1e9)
    policy.touch(np.array([0, 1, 2]), np.array([2048, 1024, 0]), 2048)
    assert policy.score == pytest.approx([1.0, 0.75, 0.5], rel=1e-3)
    for _ in range(2):
        touch(policy, 2)
    assert order(policy) == [1, 0, 2]


def test_lfu_forgets_an_old_favourite():
    policy = LFUPolicy(2, half_life_tokens=4)
    for _ in range(100):
        touch(policy, 0)
    for _ in range(20):
        touch(policy, 1)
    assert order(policy) == [0, 1]


def test_lfu_measures_time_in_tokens_through_all_layers():
    one, four = LFUPolicy(8, layers=1, half_life_tokens=10), LFUPolicy(8, layers=4, half_life_tokens=10)
    touch(one, 0)
    for layer in range(4):
        touch(four, layer)
    touch(one, 1, count=30, tokens=30)
    for layer in range(4):
        touch(four, 4 + layer, count=30, tokens=30)
    assert one.score[1] / one.score[0] == pytest.approx(2**3)
    assert four.score[7] / four.score[3] == pytest.approx(2**3)


def test_lru_keeps_experts_used_last_and_of_one_call_those_most_tokens_used():
    policy = LRUPolicy(4)
    touch(policy, 3, count=50, tokens=50)
    policy.touch(np.array([0, 1, 2]), np.array([2, 1, 3]), 3)
    assert order(policy) == [3, 1, 0, 2]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), unique=True, max_size=5), st.integers(1, 4), st.sampled_from([1, 2, 64, 3000])
        ),
        max_size=60,
    ),
    st.sampled_from([1.0, 3.5, 20.0]),
)
def test_lfu_scores_are_sums_of_decayed_uses(calls, half_life):
    """The calls also cross the scaling of all scores, every 500 half lives."""
    policy, time, uses = LFUPolicy(10, layers=2, half_life_tokens=half_life), 0.0, []
    for keys, count, tokens in calls:
        count = min(count, tokens)
        time += tokens / 2
        policy.touch(np.array(keys, dtype=int), np.full(len(keys), count), tokens)
        uses += [(key, (1 + count / tokens) / 2, time) for key in keys]
    decayed = np.zeros(10)
    for key, count, when in uses:
        decayed[key] += count * 2.0 ** -((time - when) / half_life)
    now = 2.0**policy._exponent
    np.testing.assert_allclose(policy.score / now, decayed, rtol=1e-9, atol=1e-100)


def test_lfu_reports_that_it_scaled_all_scores():
    policy = LFUPolicy(2, half_life_tokens=1)
    scaled = [touch(policy, 0) for _ in range(1100)]
    assert sum(scaled) == 2
    assert np.isfinite(policy.score).all()
    assert policy.score[0] / 2.0**policy._exponent == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["lfu", "lru"])
def test_recent_uses_outweigh_a_seeded_past(name):
    policy = make_policy(name, 4, half_life_tokens=4)
    policy.seed(np.array([0.1, 0.9, 0.5, 0.0]))
    assert order(policy) == [3, 0, 2, 1]
    for _ in range(40):
        touch(policy, 3)
    assert order(policy)[-1] == 3


def test_a_seed_equals_the_scores_of_a_long_past():
    lived, seeded = LFUPolicy(2, half_life_tokens=50), LFUPolicy(2, half_life_tokens=50)
    for step in range(4000):
        touch(lived, *([0] if step % 4 else [0, 1]))
    seeded.seed(np.array([1.0, 0.25]))
    np.testing.assert_allclose(lived.score / 2.0**lived._exponent, seeded.score, rtol=0.05)


def test_unknown_policies_and_half_lives_are_rejected():
    with pytest.raises(ValueError, match="'fifo'"):
        make_policy("fifo", 4)
    with pytest.raises(ValueError, match="more than 0"):
        LFUPolicy(4, half_life_tokens=0)
