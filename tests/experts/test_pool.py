"""After every fault a pool holds right bytes or none, and serves the next call."""

import os
import threading
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from support.patience import DEADLINE
from support.pool_cases import assert_consistent, need, serve
from support.tiny_experts import EXPERTS, random_experts, write_expert_file

from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.errors import MimoError
from mlx_mimo.experts.pool import Counters, Pool, divide, group_by_shape
from mlx_mimo.experts.reader import ExpertReader

pytestmark = pytest.mark.usefixtures("where_reads_run")


@pytest.mark.parametrize(
    ("slots", "together", "in_place"),
    [(1, True, False), (5, True, True), (5, False, True), (8, False, False), (32, True, True)],
)
def test_a_pool_serves_right_bytes_and_reads_each_miss_once(make, disk, slots, in_place, together):
    pool, rng = make(slots, in_place=in_place), np.random.default_rng(0)
    for step in range(30):
        serve(pool, need(1 + step % 2, *rng.permutation(EXPERTS)[: rng.integers(1, 9)], together=together))
    assert_consistent(pool)
    record = pool.layout.nbytes
    assert pool.reader.bytes_read == pool.residents.misses * record
    assert disk.calls == pool.residents.misses, "one system call a miss"


@pytest.mark.parametrize(("slots", "fault"), [(1, "slow"), (3, "short"), (8, "slow"), (8, "short")])
def test_short_and_slow_reads_change_nothing(make, disk, slots, fault):
    disk.fault = lambda n: fault if n % 3 == 0 else None
    pool = make(slots)
    for step in range(6):
        serve(pool, need(1 + step % 2, *range(step, step + 6)))
    assert_consistent(pool)
    assert pool.reader.bytes_read == pool.residents.misses * pool.layout.nbytes


@pytest.mark.parametrize(
    ("slots", "nth", "together", "in_place"),
    [
        (1, 1, True, True),
        (1, 6, False, False),
        (3, 2, True, False),
        (3, 5, False, True),
        (8, 1, False, False),
        (8, 6, True, True),
        (20, 2, True, False),
        (20, 6, False, True),
    ],
)
def test_when_the_nth_read_fails_the_next_call_is_right(make, disk, slots, nth, together, in_place):
    pool = make(slots, in_place=in_place)
    serve(pool, need(2, 0, 1, 2))
    misses, first = pool.residents.misses, disk.calls
    disk.fault = lambda n: "fail" if n == first + nth else None
    call = need(1, 3, 4, 5, 6, 7, 8, together=together)
    with pytest.raises(
        MimoError, match=r"model-experts-1.safetensors: layer 1 expert \d+ cannot be read .*Input/output"
    ):
        serve(pool, call)
    assert_consistent(pool)
    record = pool.layout.nbytes
    assert pool.reader.bytes_read == pool.residents.misses * record
    assert misses <= pool.residents.misses <= misses + 5
    disk.fault = lambda n: None
    serve(pool, call)
    assert pool.reader.bytes_read == pool.residents.misses * record
    serve(pool, need(2, 0, 1, 2))
    assert_consistent(pool)


def test_a_pool_recovers_after_every_read_failed(make, disk):
    pool = make(8)
    disk.fault = lambda n: "fail"
    for _ in range(3):
        for together in (True, False):
            with pytest.raises(MimoError):
                serve(pool, need(1, 0, 1, 2, 3, together=together))
            assert pool.residents.resident == 0
    assert (pool.residents.hits, pool.residents.misses) == (0, 0)
    disk.fault = lambda n: None
    serve(pool, need(1, 0, 1, 2, 3))
    assert pool.residents.misses == 4


def test_a_truncated_file_fails_only_for_experts_beyond_its_end(make):
    pool = make(8)
    file = pool.files[1]
    os.truncate(file.path, file.offset(5))
    serve(pool, need(1, 0, 4))
    with pytest.raises(MimoError, match=r"expert 5 ends .* early"):
        serve(pool, need(1, 1, 5))
    serve(pool, need(1, 0, 1, 4))
    assert_consistent(pool)


def test_a_file_removed_while_open_is_still_read(make):
    pool = make(4)
    for file in pool.files.values():
        file.path.unlink()
    serve(pool, need(1, *range(12)))
    assert_consistent(pool)


def test_a_call_closed_halfway_leaves_the_pool_consistent(make, disk):
    disk.fault = lambda n: "slow"
    pool = make(8)
    for together in (True, False):
        steps = pool.serve(need(1, *range(12), together=together))
        next(steps)
        steps.close()
        assert_consistent(pool)
        assert pool.reader.bytes_read == pool.residents.misses * pool.layout.nbytes
    serve(pool, need(1, *range(12)))


def test_lazy_outputs_are_computed_before_their_slots_are_written(make):
    pool = make(2)
    kept = []
    for expert in range(8):
        with closing(pool.serve(need(1, expert))) as steps:
            for _ in steps:
                slot = int(pool.slots_of(1, np.array([expert]))[0])
                output = pool.arrays["gate_proj.scales"][slot] * 2
                pool.lazily(output)
                kept.append(output)
    for expert, output in enumerate(kept):
        assert mx.array_equal(output, mx.array(pool.truth[1]["gate_proj.scales"][expert]) * 2)


@pytest.mark.parametrize("in_place", [True, False])
def test_resize_keeps_experts_and_serves_on(make, in_place):
    pool, rng = make(8, in_place=in_place), np.random.default_rng(1)
    for slots in (8, 3, 1, 20, 32, 5, 6):
        pool.resize(slots)
        assert pool.slots == slots
        assert_consistent(pool)
        before = pool.residents.resident
        for step in range(8):
            serve(pool, need(1 + step % 2, *rng.permutation(EXPERTS)[:4]))
        assert pool.residents.resident >= min(before, slots)
        assert_consistent(pool)


def test_experts_that_resize_keeps_are_not_read_again(make, disk):
    pool = make(6)
    for _ in range(3):
        serve(pool, need(1, 0, 1, 2))
    serve(pool, need(1, 3, 4, 5))
    pool.resize(3)
    calls = disk.calls
    serve(pool, need(1, 0, 1, 2))
    assert disk.calls == calls


@pytest.mark.parametrize("target", [12, 3])
def test_a_resize_that_finds_no_memory_leaves_the_pool_right(make, monkeypatch, target):
    pool = make(6)
    serve(pool, need(1, 0, 1, 2, 3))
    allocate, calls = pool.banks._allocate, []

    def out_of_memory(tensor, slots):
        calls.append(tensor)
        if len(calls) == 4:
            raise RuntimeError("[malloc] Unable to allocate")
        allocate(tensor, slots)

    monkeypatch.setattr(pool.banks, "_allocate", out_of_memory)
    with pytest.raises(RuntimeError, match="malloc"):
        pool.resize(target)
    monkeypatch.setattr(pool.banks, "_allocate", allocate)
    assert_consistent(pool)
    serve(pool, need(2, 0, 1, 2, 3, 4, 5))
    pool.resize(target)
    assert {bank.shape[0] for bank in pool.arrays.values()} == {target}
    serve(pool, need(1, 0, 1, 2, 3, 4, 5))
    assert_consistent(pool)


def test_a_right_guess_is_a_hit(make, disk):
    pool = make(12)
    for _ in range(2):
        serve(pool, need(2, 0, 1, 2))
    pool.resize(3)
    pool.resize(12)
    serve(pool, need(1, 5))
    pool.guess(2, np.array([3, 0]))  # never used: free slots take anything, 0 is resident
    assert pool.lookahead_reads == 1
    misses = pool.residents.misses
    serve(pool, need(2, 0, 3))
    assert (pool.residents.misses, pool.lookahead_used) == (misses, 1)
    assert disk.calls == misses + 1
    assert_consistent(pool)


def test_a_guess_that_cannot_be_read_fails_only_where_it_is_needed(make, disk):
    pool = make(8)
    disk.fault = lambda n: "fail"
    pool.guess(1, np.array([4, 5]))
    pool.reader.drain()
    disk.fault = lambda n: None
    serve(pool, need(2, 0))
    assert_consistent(pool)
    serve(pool, need(1, 4, 5))
    assert pool.lookahead_used == 0


def test_a_call_waits_only_for_guesses_of_its_own_experts(make, disk):
    pool, gate = make(8), threading.Event()
    serve(pool, need(1, 0))
    disk.fault = lambda n: gate.wait(DEADLINE) and None
    pool.guess(2, np.array([4, 5]))
    serve(pool, need(1, 0))  # a hit, while both guesses wait for the disk
    assert not pool.reader.idle
    disk.fault = lambda n: None
    gate.set()
    serve(pool, need(2, 4))
    assert pool.lookahead_used == 1
    assert pool.residents.misses == 1
    pool.reader.drain()
    serve(pool, need(1, 0))
    assert_consistent(pool)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_guesses_do_not_take_the_slots_that_a_call_needs(make, disk, slots):
    disk.fault = lambda n: "slow"
    pool = make(slots)
    for step in range(8):
        pool.guess(2, np.array([4, 5, step % 3]))
        serve(pool, need(1, *range(step, step + 3)))
        serve(pool, need(1, step, step + 1), hold=True)
    pool.reader.drain()
    serve(pool, need(1, 0))
    assert_consistent(pool)


def test_counters_have_a_hit_rate():
    assert Counters(hits=3, misses=1).hit_rate == 0.75
    assert Counters().hit_rate == 1.0


def test_pools_share_a_budget_in_proportion_to_their_bytes():
    assert divide(1000, [10, 20], [100, 50]) == [50, 25]
    assert divide(300, [10, 20], [100, 50]) == [15, 7]
    assert divide(1, [10, 20], [100, 50]) == [1, 1]
    assert divide(10**6, [10, 20], [100, 50]) == [100, 50]


def test_files_of_different_shapes_get_pools_of_their_own(tmp_path):
    for layer, form in {1: "affine4", 2: "mxfp4", 5: "affine4"}.items():
        write_expert_file(tmp_path, layer, random_experts(form))
    files = expert_files(tmp_path)
    assert [list(group) for group in group_by_shape(files)] == [[1, 5], [2]]
    with pytest.raises(ValueError, match="cannot share a pool"):
        Pool(files, 4, ExpertReader(files))
