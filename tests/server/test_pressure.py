"""Experts give memory back where less than the floor is free, and take it again; answers stay what they were."""

import pytest
import requests
from support.patience import DEADLINE, wait_until
from support.serving import running_server

from mlx_mimo.server.watch import pressure
from mlx_mimo.server.watch.pressure import Pressure, wanted_bytes

GB = 10**9
CHAT = {"messages": [{"role": "user", "content": "What is 37 + 48?"}], "max_tokens": 8, "temperature": 0}


@pytest.mark.parametrize(
    ("now", "available", "wanted"),
    [
        (24 * GB, 3 * GB, 24 * GB),  # between the floor and twice that: nothing happens
        (24 * GB, 2 * GB, 24 * GB),
        (24 * GB, 1 * GB, 22 * GB),  # so that three are free
        (6 * GB, 0, 5 * GB),  # never below one token's demand
        (5 * GB, 0, 5 * GB),
        (3 * GB, 0, 3 * GB),  # which may be more than there ever was
        (24 * GB, 100 * GB, 24 * GB),  # nor above what it began with
        (20 * GB, 100 * GB, 24 * GB),
        (20 * GB, 9 * GB, 20 * GB),  # less than a sixteenth more is not worth moving the slots
        (12 * GB, 9 * GB, 12 * GB + (4 * 6 - 12) * GB // 5),  # it and the copy while it moves leave three
        (23 * GB, 100 * GB, 24 * GB),  # the last bit, however little
    ],
)
def test_what_the_experts_should_take(now, available, wanted):
    assert wanted_bytes(now, least=5 * GB, most=24 * GB, available=available, floor=2 * GB) == wanted


def test_growing_leaves_room_for_the_copy_that_moving_takes():
    for available in range(4 * GB + 1, 20 * GB, GB // 3):
        now = 10 * GB
        grown = wanted_bytes(now, least=GB, most=40 * GB, available=available, floor=2 * GB)
        assert available - (grown - now) - grown / 4 >= 3 * GB - 1 or grown == now


def settled(residency, slots) -> bool:
    """Whether a server with nothing to do comes to this many slots."""
    return wait_until(lambda: residency.counters.slots == slots)


def test_a_server_yields_and_takes_again_between_requests_and_within_one(model_directory, monkeypatch):
    with running_server(model_directory, "--expert-memory", "250KB") as running:
        residency = running.worker.loaded.residency
        full, size = residency.counters.slots, residency.counters.slot_bytes
        assert full > 2 * residency.demand_slots
        assert not residency.all_resident

        def answer():
            reply = requests.post(running.url + "/v1/chat/completions", json=CHAT, timeout=DEADLINE)
            assert reply.status_code == 200
            return reply.json()["choices"][0]["message"]["content"]

        before = answer()
        free = {"bytes": 0}
        watch = Pressure(running.worker, 2 * GB, available=lambda: free["bytes"])
        watch.look()
        assert settled(residency, residency.demand_slots), "idle, it yields down to one token's demand"
        assert answer() == before
        free["bytes"] = 3 * GB
        watch.look()
        assert residency.counters.slots == residency.demand_slots
        free["bytes"] = 50 * GB
        watch.look()
        assert settled(residency, full)
        assert answer() == before
        # A request is running: its next token finds fewer slots.
        free["bytes"] = 2 * GB - size
        calls = []

        def during(step):
            calls.append(step)
            if len(calls) == 3:
                watch.look()
            return step

        first = next(iter(residency.modules.values()))
        apply = first.before
        monkeypatch.setattr(first, "before", lambda: (during(1), apply())[1])
        assert answer() == before
        assert settled(residency, residency.demand_slots)


def test_the_watch_runs_by_itself_and_a_floor_of_0_ends_it(model_directory, monkeypatch):
    monkeypatch.setattr(pressure, "SECONDS", 0.05)
    with running_server(model_directory, "--expert-memory", "250KB", "--memory-floor", "1TB") as running:
        residency = running.worker.loaded.residency
        assert settled(residency, residency.demand_slots)
    with running_server(model_directory, "--expert-memory", "250KB", "--memory-floor", "0") as running:
        residency = running.worker.loaded.residency
        assert not running._pressure._thread.is_alive()
        assert residency.counters.slots > residency.demand_slots


def test_memory_pressure_changes_nothing_when_all_experts_are_resident(model_directory):
    with running_server(model_directory, "--expert-memory", "all") as running:
        Pressure(running.worker, 2 * GB, available=lambda: 0).look()
        assert running.worker.loaded.residency.all_resident
