"""For tests of the pool: a disk with faults, needs, and checks of what a pool holds."""

import os
import time
from contextlib import closing

import numpy as np

from mlx_mimo.experts.residents import HELD, Need
from support.tiny_experts import EXPERTS

LAYERS = (1, 2)


class Disk:
    """A preadv with faults: `fault(n)` returns "fail", "short", "slow" or None for the n-th call."""

    def __init__(self):
        self.calls = 0
        self.fault = lambda n: None

    def __call__(self, fd, views, offset):
        self.calls += 1
        fault = self.fault(self.calls)
        if fault == "fail":
            raise OSError(5, "Input/output error")
        if fault == "short":
            return os.preadv(fd, [views[0][: max(1, views[0].nbytes // 3)]], offset)
        if fault == "slow":
            time.sleep(0.02)
        return os.preadv(fd, views, offset)


def need(layer, *experts, together=True) -> Need:
    return Need(layer, np.array(experts, dtype=np.int32), np.ones(len(experts), int), 1, together)


def serve(pool, call, **options) -> set[int]:
    """Runs a call, and checks at each step that the slots of its experts hold their weights. Returns the experts."""
    computed = []
    with closing(pool.serve(call, **options)) as steps:
        for step in steps:
            for expert, slot in zip(step.experts.tolist(), pool.slots_of(call.layer, step.experts).tolist()):
                assert_holds(pool, call.layer, expert, slot)
            computed += step.experts.tolist()
    assert sorted(computed) == sorted(call.experts.tolist())
    return set(computed)


def assert_holds(pool, layer, expert, slot):
    for name in ("gate_proj.weight", "down_proj.biases"):  # the first and the last tensor, one of them widened
        assert np.array_equal(np.asarray(pool.arrays[name])[slot], pool.truth[layer][name][expert]), (layer, expert)


def assert_consistent(pool):
    table = pool.residents
    assert not (table.rank == HELD).any()
    for slot, key in enumerate(table.key_of.tolist()):
        if key >= 0:
            assert table.slot_of[key] == slot
            assert_holds(pool, LAYERS[key // EXPERTS], key % EXPERTS, slot)
