"""Large pages keep bytes and address, and are used only where the system allows them."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_mimo.cpu import pages


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A folder in the place of the kernel's settings."""
    monkeypatch.setattr(pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    pages.page_bytes.cache_clear()
    yield tmp_path
    pages.page_bytes.cache_clear()


def test_no_large_pages_where_the_system_forbids_them(settings):
    (settings / "enabled").write_text("always madvise [never]")
    (settings / "hpage_pmd_size").write_text("2097152")
    assert pages.page_bytes() == 0
    assert pages.make_large(np.zeros(2**23, np.uint8)) is False


def test_no_large_pages_where_the_system_has_none(settings):
    assert pages.page_bytes() == 0


def test_the_page_size_is_the_kernels(settings):
    (settings / "enabled").write_text("always [madvise] never")
    (settings / "hpage_pmd_size").write_text("2097152")
    assert pages.page_bytes() == 2**21


def test_small_arrays_keep_their_pages():
    assert pages.make_large(np.zeros(2**12, np.uint8)) is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux")
def test_moving_into_large_pages_keeps_bytes_and_address():
    pages.page_bytes.cache_clear()
    if not pages.page_bytes():
        pytest.skip("no large pages here")
    host = np.random.default_rng(0).integers(0, 256, 2**25, np.uint8)
    before, address = host.copy(), host.ctypes.data
    pages.make_large(host)
    assert host.ctypes.data == address
    assert np.array_equal(host, before)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only on Linux")
def test_an_mlx_array_moves_into_large_pages():
    import mlx.core as mx

    if not pages.page_bytes():
        pytest.skip("no large pages here")
    bank = mx.zeros((2**25,), dtype=mx.uint8)
    mx.eval(bank)
    host = np.asarray(bank)
    if not pages.make_large(host):
        pytest.skip("the kernel refuses: older than 6.1, or no free memory")
    assert _large_bytes_at(host.ctypes.data + host.nbytes // 2) >= 2**24


def _large_bytes_at(address: int) -> int:
    """The AnonHugePages of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no mapping holds {address:#x}")
