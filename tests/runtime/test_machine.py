"""What is known of a machine, and what a process says of its own memory."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import psutil
import pytest

from mlx_mimo.errors import UsageError
from mlx_mimo.runtime import machine
from mlx_mimo.runtime.budget import GB
from mlx_mimo.runtime.machine import (
    Given,
    backend_and_limits,
    machine_with,
    peak_memory_bytes,
    read_speed,
    this_machine,
)

CHILD = """
from mlx_mimo.runtime.machine import peak_memory_bytes
before = peak_memory_bytes()
memory = bytearray(b"x") * 200_000_000
del memory
print(before, peak_memory_bytes())
"""


def test_the_peak_is_the_processs_own_and_keeps_what_was_freed():
    mine = np.full(400_000_000, 1, np.uint8)  # the child must not begin with this
    assert peak_memory_bytes() >= mine.nbytes
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    before, after = (int(number) for number in child.stdout.split())
    assert before < 200_000_000
    assert 190_000_000 < after - before < 250_000_000


# The backend and its limits, on machines that are not here


@pytest.fixture
def mlx(monkeypatch):
    """Makes the system and MLX say what another machine's would."""

    def pretend(system: str, metal: bool, gpu: bool, cuda_wheel: bool = False, **limits) -> None:
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(machine, "_cuda_wheel", lambda: cuda_wheel)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu if gpu else mx.cpu))
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
        monkeypatch.setattr(mx, "device_info", lambda: limits)

    return pretend


def test_a_mac_says_its_metal_limits(mlx):
    mlx("Darwin", metal=True, gpu=True, max_recommended_working_set_size=48 * GB)
    assert backend_and_limits() == ("metal", {"max_recommended_working_set_size": 48 * GB})


def test_a_mac_set_to_its_cpu_has_no_limits(mlx):
    mlx("Darwin", metal=True, gpu=False, max_recommended_working_set_size=48 * GB)
    assert backend_and_limits() == ("cpu", {})


def test_linux_is_a_cpu_unless_the_cuda_build_is_installed(mlx):
    mlx("Linux", metal=False, gpu=True, total_memory=80 * GB)
    assert backend_and_limits() == ("cpu", {})
    mlx("Linux", metal=False, gpu=True, cuda_wheel=True, total_memory=80 * GB)
    assert backend_and_limits() == ("cuda", {"total_memory": 80 * GB})


@pytest.mark.parametrize(
    ("folder", "found"),
    [("mlx_cuda_12-0.32.4.dist-info", True), ("mlx_cuda-0.32.4.dist-info", True), ("mlx_cuda", False)],
)
def test_the_cuda_build_is_known_by_its_folder(tmp_path, monkeypatch, folder, found):
    (tmp_path / folder).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "none")])
    assert machine._cuda_wheel() == found


@pytest.mark.parametrize(("free", "available"), [(60, 48), (20, 20)])
def test_this_machine_has_at_most_metals_working_set(mlx, monkeypatch, free, available):
    mlx("Darwin", metal=True, gpu=True, max_recommended_working_set_size=48 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=free * GB))
    monkeypatch.setattr(machine, "chip_name", lambda: "Apple M4 Max")
    found = this_machine()
    assert (found.backend, found.memory, found.available) == ("metal", 64 * GB, available * GB)
    assert (found.bandwidth, found.bandwidth_from) == (546 * GB, "typical")
    assert found.item_bytes == (2, 2, 2)


def test_a_chip_that_is_not_known_is_measured(mlx, monkeypatch):
    mlx("Darwin", metal=True, gpu=True)
    monkeypatch.setattr(machine, "chip_name", lambda: "Apple M9")
    monkeypatch.setattr(machine, "copy_speed", lambda: 123.0 * GB)
    assert (this_machine().bandwidth, this_machine().bandwidth_from) == (123 * GB, "measured")


@pytest.mark.parametrize(("said", "name"), [("Apple M4 Max\n", "Apple M4 Max"), ("", "Mac")])
def test_the_chip_of_a_mac(monkeypatch, said, name):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert machine.chip_name() == name


# What is measured


def test_one_slow_copy_does_not_set_the_bandwidth(monkeypatch):
    """Four copies, the first of which touches the memory: a median of the rest, over all cores."""
    seconds = iter([0, 9.0, 10, 11.0, 20, 28.0, 30, 31.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(seconds))
    assert machine.copy_speed(1 << 20) == 2 * (1 << 20) / 1.0


def test_files_that_cannot_be_read_say_nothing_of_the_disk(tmp_path):
    link, whole = tmp_path / "link", tmp_path / "whole"
    link.symlink_to(tmp_path / "nowhere")
    assert read_speed([link]) is None
    whole.write_bytes(bytes(1 << 20))
    assert read_speed([link, whole], seconds=0, piece=1 << 16) > 0


def test_a_disk_that_fails_while_it_is_measured_is_not_measured(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(1 << 20))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(machine, "_read_past_cache", fail)
    assert read_speed([path], piece=1 << 16) is None


def test_more_cannot_be_free_than_there_is():
    with pytest.raises(UsageError, match=r"--available: 65\.0 GB of 64\.0 GB"):
        machine_with(Given(memory=64 * GB, available=65 * GB))
    with pytest.raises(UsageError, match="--available"):
        machine_with(Given(available=10**18))
    assert machine_with(Given(memory=64 * GB, available=64 * GB)).available == 64 * GB
